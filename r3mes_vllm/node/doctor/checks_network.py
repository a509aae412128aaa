"""What others answer: the backend, the IPFS daemon."""

import errno
import json
import socket
import time
from contextlib import AsyncExitStack
from email.utils import parsedate_to_datetime

import httpx

from r3mes_vllm.identity import Identity
from r3mes_vllm.node.doctor.findings import Finding
from r3mes_vllm.node.doctor.listener import answering
from r3mes_vllm.node.line import refuse_plain_http, trusted
from r3mes_vllm.node.signer import Signer
from r3mes_vllm.settings import Settings

_CLOCK_S = 2.0
_REACH = "/api/serving-node/reach"
_WHY = {
    "refused": "the connection is refused",
    "timed_out": "nothing answers in time",
    "not_a_node": "what answers there is no node",
    "other_key": "another key, or a node with another --public-url, answers there",
    "not_allowed": "the backend calls no such address (a private one, a name without one, or "
    "another protocol's port)",
}


def _client(settings: Settings) -> httpx.AsyncClient:
    if not settings.insecure:
        refuse_plain_http(settings.backend)
    return httpx.AsyncClient(
        base_url=settings.backend,
        trust_env=False,
        timeout=httpx.Timeout(9.0, connect=4.0),
        verify=trusted(settings.backend_ca),
    )


async def backend(settings: Settings) -> Finding:
    """A node without a backend gets no requests."""
    async with _client(settings) as http:
        try:
            answer = await http.get("/health")
        except httpx.HTTPError as error:
            return _unreachable(settings, error)
    if answer.status_code != 200:
        fix = "r3mes-vllm doctor --backend-url URL"
        return Finding("fail", f"{settings.backend}/health answered {answer.status_code}", fix)
    try:
        said = answer.json()
    except ValueError:
        said = None
    if not isinstance(said, dict):
        fix = "r3mes-vllm doctor --backend-url URL"
        return Finding("fail", f"what answers at {settings.backend} is no R3MES backend", fix)
    version = str(said.get("version", "which does not say its version"))[:40]
    return Finding("ok", f"{settings.backend}, {version}")


async def clock(settings: Settings) -> Finding:
    """Signed requests are of now: the backend's clock and this one must agree."""
    async with _client(settings) as http:
        began = time.time()
        try:
            answer = await http.get("/health")
        except httpx.HTTPError as error:
            return Finding("skip", f"the backend tells no time: {_said(error)}")
        ended = time.time()
    if "date" not in answer.headers:
        return Finding("skip", "the backend tells no time")
    there = parsedate_to_datetime(answer.headers["date"]).timestamp()
    # The header leaves out the part of a second, and was written some time in between.
    off = max(there - ended, began - (there + 1.0), 0.0)
    if off > _CLOCK_S:
        fix = "sudo timedatectl set-ntp true"
        return Finding("fail", f"this clock is {off:.0f} s or more off the backend's", fix)
    return Finding("ok", f"within {_CLOCK_S:g} s of the backend's")


async def public_url(settings: Settings) -> Finding:
    """Requests come to the public URL: the backend is asked to call it."""
    identity = Identity.load(settings.state_dir, make=False)
    wallet = settings.wallet_address or identity.wallet_address
    asked = {"wallet_address": wallet, "endpoint_url": settings.public_url}
    body = json.dumps(asked).encode()
    headers = Signer(identity).headers("POST", _REACH, body)
    async with AsyncExitStack() as stack:
        try:
            await stack.enter_async_context(answering(settings, identity))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            # A node of ours may listen there: then that one is called.
        http = await stack.enter_async_context(_client(settings))
        headers["content-type"] = "application/json"
        try:
            answer = await http.post(_REACH, content=body, headers=headers)
        except httpx.HTTPError as error:
            return Finding("skip", f"the backend can't be asked: {_said(error)}")
    if answer.status_code in (404, 405):
        return Finding("skip", "this backend cannot call back")
    if answer.status_code == 429:
        return Finding("skip", "the backend was asked too often: try again in a minute")
    if answer.status_code == 401:
        fix = "sudo timedatectl set-ntp true"
        return Finding("fail", "the backend refuses this node's signature", fix)
    if answer.status_code != 200:
        return Finding("fail", f"the backend answered {answer.status_code}", "r3mes-vllm doctor")
    said = answer.json()
    if said.get("reachable") is True:
        return Finding("ok", f"the backend reaches {settings.public_url}")
    port = settings.serving_node_port
    why = _WHY.get(str(said.get("reason")), "no reason given")
    return Finding(
        "fail",
        f"port {port} is not reachable from outside at {settings.public_url}: {why}",
        f"forward it to {_lan_address()}:{port} on your router, or pass --public-url URL",
    )


async def ipfs_daemon(settings: Settings) -> Finding:
    """A daemon finds what no gateway has; without one gateways and CARs still serve."""
    async with httpx.AsyncClient(
        base_url=settings.ipfs_api_url, trust_env=False, timeout=5.0
    ) as http:
        try:
            said = (await http.post("/api/v0/id")).raise_for_status().json()
            peers = (await http.post("/api/v0/swarm/peers")).raise_for_status().json()
            name, count = str(said["AgentVersion"])[:60], len(peers.get("Peers") or [])
        except (httpx.HTTPError, ValueError, KeyError, TypeError, AttributeError) as error:
            said_of = f"no IPFS daemon at {settings.ipfs_api_url}: {_said(error)}"
            return Finding("warn", said_of, "ipfs daemon")
    if not count:
        return Finding("warn", f"{name} has no peers", "ipfs swarm peers")
    return Finding("ok", f"{name}, {count} peers")


def _unreachable(settings: Settings, error: Exception) -> Finding:
    fix = "r3mes-vllm doctor --backend-url URL"
    return Finding("fail", f"{settings.backend} can't be reached: {_said(error)}", fix)


def _said(error: Exception) -> str:
    """Timeouts say nothing."""
    return str(error) or type(error).__name__


def _lan_address() -> str:
    """By which this machine is known to its router. A UDP socket that connects sends nothing."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as it:
            it.connect(("192.0.2.1", 9))
            return str(it.getsockname()[0])
    except OSError:
        return "THIS-MACHINE"
