"""What this machine shows within milliseconds."""

import shutil
import socket
import tempfile
from pathlib import Path
from urllib.parse import urlsplit

import httpx

from r3mes_vllm.node.doctor.findings import Finding
from r3mes_vllm.node.guard import LOOPBACK
from r3mes_vllm.node.line import NETWORK_PORTS
from r3mes_vllm.settings import Settings, misspelt

_ASKING_S = 2.0
_NEEDED = 1 << 30
"""Bytes free for the cache: a small base model and a few adapters."""


def serving_mode(settings: Settings) -> Finding:
    """Embedding programs start a node only where they are told to."""
    if settings.enable_serving_node:
        return Finding("ok", "R3MES_ENABLE_SERVING_NODE is set")
    return Finding("ok", "R3MES_ENABLE_SERVING_NODE is not set: only embedding programs need it")


def variables() -> Finding:
    """A misspelt variable is one that is silently not followed."""
    found = misspelt()
    if found:
        return Finding("warn", "; ".join(found), "env | grep R3MES_")
    return Finding("ok", "every R3MES_* variable is known")


def directories(settings: Settings) -> Finding:
    """The cache and the node's key are written to."""
    for option, path in (("CACHE", settings.cache_dir), ("STATE", settings.state_dir)):
        if not _is_writable(_existing(path)):
            fix = f"export R3MES_{option}_DIR=DIRECTORY  # one that you may write to"
            return Finding("fail", f"{path} can't be written to", fix)
    return Finding("ok", f"{settings.cache_dir} and {settings.state_dir} can be written to")


def _is_writable(folder: Path) -> bool:
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def disk(settings: Settings) -> Finding:
    """A cache that may grow larger than the disk fills it."""
    free = shutil.disk_usage(_existing(settings.cache_dir)).free
    said = f"{free / (1 << 30):.1f} GiB free for {settings.cache_dir}"
    if free < _NEEDED:
        return Finding("fail", said, "r3mes-vllm doctor --cache-dir DIRECTORY  # on a larger disk")
    if free < settings.cache_size:
        fix = f"r3mes-vllm serve --cache-size {max(free * 9 // 10 >> 30, 1)}G"
        return Finding("warn", f"{said}, less than the cache may take", fix)
    return Finding("ok", said)


def network_port(settings: Settings) -> Finding:
    """The existing backend calls nodes on some ports only."""
    backend, public = urlsplit(settings.backend), urlsplit(settings.public_url)
    port = public.port or (443 if public.scheme == "https" else 80)
    if backend.hostname in LOOPBACK or port in NETWORK_PORTS:
        return Finding("ok", f"port {port}")
    ports = ", ".join(map(str, NETWORK_PORTS))
    return Finding(
        "warn",
        f"the R3MES network calls nodes on the ports {ports} only, so nobody will call "
        f"{settings.public_url}",
        "r3mes-vllm serve --port 8080",
    )


def port_free(settings: Settings) -> Finding:
    """Two programs can't listen on one port."""
    host, port = settings.serving_node_host, settings.serving_node_port
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as door:
        door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            door.bind((host, port))
        except OSError as error:
            if is_ours(settings):
                return Finding("ok", f"this node is running on {host}:{port}")
            fix = f"r3mes-vllm serve --port {port + 1 if port < 65535 else 8080}"
            return Finding("fail", f"can't listen on {host}:{port}: {error.strerror}", fix)
    return Finding("ok", f"{host}:{port} is free")


def is_ours(settings: Settings) -> bool:
    """Whether a node answers at its place on this machine."""
    try:
        answer = httpx.get(
            f"{settings.local_url}/health",
            timeout=_ASKING_S,
            trust_env=False,
            verify=False,  # noqa: S501 - its certificate is for its public name; nothing is told
        )
        return "available_loras" in answer.json() or answer.json().get("status") == "starting"
    except (httpx.HTTPError, ValueError, TypeError, AttributeError):
        return False


def _existing(path: Path) -> Path:
    """`path`, or the nearest folder above it that is there."""
    return next((it for it in (path, *path.parents) if it.exists()), Path("/"))
