"""From settings to a serving node: everything before vLLM's server takes over."""

import asyncio
import os
import socket
from collections.abc import Sequence
from urllib.parse import urlsplit

from r3mes_vllm import report
from r3mes_vllm.adapters.supply import Supply
from r3mes_vllm.adapters.vetting import LARGEST_RANK
from r3mes_vllm.engine import environment
from r3mes_vllm.engine.model import served_name, shape_of
from r3mes_vllm.errors import AdapterError, EngineError, PortTaken
from r3mes_vllm.identity import Identity
from r3mes_vllm.node import restart
from r3mes_vllm.node.adapters import obtain_all
from r3mes_vllm.node.guard import LOOPBACK, refuse_open_door
from r3mes_vllm.settings import Settings, misspelt

# The existing backend calls no node on another port.
NETWORK_PORTS = (80, 443, 3000, 5000, 8000, 8080, 8443)


def serve(settings: Settings, passed_on: Sequence[str], *, verbose: bool = False) -> bool:
    """Serve until a signal comes; True if that was Ctrl-C.

    `passed_on` goes to vLLM's own argument parser. Raises R3mesError for all that a person can
    mend.
    """
    restart.Restart.again = restart.Again(tuple(settings.restarts))
    restart.reap()
    if settings.restored:
        settings = settings.model_copy(update={"loras": settings.restored})
    for text in misspelt():
        report.warn(text)
    refuse_open_door(settings)
    require_free_port(settings.serving_node_host, settings.serving_node_port)
    _warn_of_uncalled_port(settings)
    report.begin("identity")
    wallet = settings.wallet_address or Identity.load(settings.state_dir).wallet_address
    report.done("identity", f"wallet {wallet}")

    report.begin("base model")
    model = _model(settings)
    environment.prepare(local_model=os.path.isdir(model), verbose=verbose)
    name = served_name(model)
    base = shape_of(model, name)
    report.done("base model", name)

    report.begin("adapters")
    supply = Supply.of(settings, base=base, max_rank=settings.max_lora_rank or LARGEST_RANK)
    with report.Downloads() as downloads:
        named = asyncio.run(obtain_all(settings, supply, progress=downloads.show))
    if not named:
        raise AdapterError(
            "none of the adapters can be served",
            hint="name one that can: r3mes-vllm serve --loras NAME=CID",
        )
    fetched = sum(it.adapter.fetched for it in named)
    report.done("adapters", f"{len(named)} verified, {fetched} of them fetched now")

    report.begin("engine")
    # Only now: importing vLLM takes seconds, and it reads the environment that was prepared.
    from r3mes_vllm.engine import launch
    from r3mes_vllm.engine.sizes import Memory, Sizes
    from r3mes_vllm.node.app import Interrupted

    sizes = Sizes.of(
        [(it.adapter.facts.rank, it.adapter.facts.size) for it in named],
        base,
        Memory.now(model),
        max_loras=settings.max_loras,
        max_rank=settings.max_lora_rank,
    )
    pinned = settings.model_copy(
        update={
            "loras": [f"{it.name}={it.adapter.cid}" for it in named],
            "followed": [it.name for it in named if it.listed],
        }
    )
    os.environ.update(pinned.environ())
    command_line = launch.arguments(
        model=model,
        served_name=name,
        host=settings.serving_node_host,
        port=settings.serving_node_port,
        sizes=sizes,
        passed_on=passed_on,
    )
    report.say(f"engine: {sizes.arithmetic}")
    report.say("engine: starting; this takes half a minute")
    try:
        launch.run(command_line)
    except EngineError as error:
        if not settings.restarts:
            raise
        restart.follow(restart.Failure(error.message, settings.restored, settings.followed))
    if not Interrupted.seen:
        restart.follow()
    return Interrupted.seen


def require_free_port(host: str, port: int) -> None:
    """Raise PortTaken now rather than after minutes of starting."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise PortTaken(
                f"can't listen on {host}:{port}: {error.strerror}",
                hint=f"stop what listens there, or pass --port {port + 1}",
            ) from error


def _model(settings: Settings) -> str:
    if settings.model:
        # vLLM takes a relative path that does not exist for a hub repository
        return os.path.abspath(settings.model) if os.path.isdir(settings.model) else settings.model
    from r3mes_vllm.engine.base_model import embedded_base_model

    return str(embedded_base_model(settings.cache_dir, say=report.say))


def _warn_of_uncalled_port(settings: Settings) -> None:
    backend, public = urlsplit(settings.backend), urlsplit(settings.public_url)
    port = public.port or (443 if public.scheme == "https" else 80)
    if backend.hostname not in LOOPBACK and port not in NETWORK_PORTS:
        ports = ", ".join(map(str, NETWORK_PORTS))
        report.warn(
            f"the R3MES network calls nodes on the ports {ports} only, so nobody will call "
            f"{settings.public_url}: pass --port 8080, or forward one and set --public-url"
        )
