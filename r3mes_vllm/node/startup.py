"""From settings to a serving node: everything before vLLM's server takes over."""

import asyncio
import os
from collections.abc import Sequence

from r3mes_vllm import report, state_dir
from r3mes_vllm.adapters.supply import Supply
from r3mes_vllm.adapters.vetting import LARGEST_RANK
from r3mes_vllm.engine import environment, weights
from r3mes_vllm.engine.model import served_name, shape_of, targets_of
from r3mes_vllm.errors import AdapterError, EngineError
from r3mes_vllm.identity import Identity
from r3mes_vllm.node import restart, tls
from r3mes_vllm.node.adapters import obtain_all
from r3mes_vllm.node.doctor import checks_engine, checks_local
from r3mes_vllm.node.early import Early
from r3mes_vllm.node.guard import refuse_open_door
from r3mes_vllm.node.line import refuse_plain_http, trusted
from r3mes_vllm.node.standing import note_place
from r3mes_vllm.settings import Settings, misspelt


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
    settings, passed_on = tls.taken_over(settings, passed_on)
    refuse_open_door(settings)
    if not settings.insecure:
        refuse_plain_http(settings.backend)
    trusted(settings.backend_ca)
    _warn_of_trouble(settings)
    certificate = tls.context(settings)
    state_dir.prepare(settings.state_dir)
    with state_dir.used_by_a_node(settings.state_dir):
        note_place(settings)
        early = Early(settings.serving_node_host, settings.serving_node_port, certificate)
        Early.current = early
        try:
            return _serve(settings, passed_on, early, verbose=verbose)
        finally:
            early.close()


def _serve(settings: Settings, passed_on: Sequence[str], early: Early, *, verbose: bool) -> bool:
    report.begin("identity")
    wallet = settings.wallet_address or Identity.load(settings.state_dir).wallet_address
    report.done("identity", f"wallet {wallet}")

    report.begin("base model")
    model = _model(settings)
    environment.prepare(local_model=os.path.isdir(model), verbose=verbose)
    if settings.vllm or passed_on:
        from r3mes_vllm.engine import launch

        launch.check(model, settings.vllm, [*settings.vllm_arguments, *passed_on])
    name = served_name(model)
    base = shape_of(model, name, targets_of([*settings.vllm_arguments, *passed_on]))
    report.done("base model", name)

    report.begin("adapters")
    early.reason = "adapters are being fetched and verified"
    supply = Supply.of(
        settings.model_copy(update={"ipfs_pin": False}),  # the server pins them, while it serves
        base=base,
        max_rank=settings.max_lora_rank or LARGEST_RANK,
    )
    with report.Downloads() as downloads:
        named = asyncio.run(obtain_all(settings, supply, progress=downloads.show))
    if not named and not settings.base_only:
        raise AdapterError(
            "none of the adapters can be served",
            hint="name one that can, --loras NAME=CID, or publish one: r3mes-vllm adapter publish",
        )
    fetched = sum(it.adapter.fetched for it in named)
    report.done("adapters", f"{len(named)} verified, {fetched} of them fetched now")

    report.begin("engine")
    early.reason = "the engine is starting"
    # Only now: importing vLLM takes seconds, and it reads the environment that was prepared.
    from r3mes_vllm.engine import launch
    from r3mes_vllm.engine.sizes import Memory, Sizes
    from r3mes_vllm.node.drain import Interrupted

    workers = launch.workers([*settings.vllm_arguments, *passed_on])
    sizes = Sizes.of(
        [(it.adapter.facts.rank, it.adapter.facts.size) for it in named],
        base,
        Memory.now(model, workers),
        workers,
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
        passed_on=[*tls.options(settings), *settings.vllm_arguments, *passed_on],
    )
    report.say(f"engine: {sizes.arithmetic}")
    weights.follow(model, command_line, report.say)
    report.say("engine: starting; this takes half a minute, and minutes with a large model")
    try:
        launch.run(command_line, early.socket_for)
    except EngineError as error:
        if not settings.restarts:
            raise
        restart.follow(
            restart.Failure(error.message, settings.restored, settings.followed, settings.passing)
        )
    if not Interrupted.seen:
        restart.follow()
    return Interrupted.seen


def _model(settings: Settings) -> str:
    if settings.model:
        # vLLM takes a relative path that does not exist for a hub repository
        return os.path.abspath(settings.model) if os.path.isdir(settings.model) else settings.model
    from r3mes_vllm.engine.base_model import embedded_base_model

    return str(embedded_base_model(settings.cache_dir, say=report.say))


def _warn_of_trouble(settings: Settings) -> None:
    """The part of `r3mes-vllm doctor` that takes milliseconds."""
    local = (checks_local.directories, checks_local.disk, checks_local.network_port)
    for check in (*local, checks_engine.gpu, checks_engine.compiler, checks_engine.memory):
        found = check(settings)
        if found.status in ("warn", "fail"):
            report.warn(f"{found.message}; try: {found.fix}")
