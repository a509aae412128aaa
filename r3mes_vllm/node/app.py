"""The node inside vLLM's server: the endpoint plugin that puts its parts together."""

import asyncio
import os
from argparse import Namespace
from collections.abc import AsyncIterator, Mapping
from contextlib import ExitStack, asynccontextmanager
from typing import Any

from fastapi import FastAPI
from prometheus_client import REGISTRY
from starlette.datastructures import State

from r3mes_vllm import __version__, report, settings, state_dir
from r3mes_vllm.adapters.supply import Supply
from r3mes_vllm.bounded_http import bounded
from r3mes_vllm.engine import carrying, ending, watching
from r3mes_vllm.engine.canary import Canary
from r3mes_vllm.engine.host import Host
from r3mes_vllm.engine.model import shape_of
from r3mes_vllm.engine.names import BY_CID
from r3mes_vllm.engine.unreadable import refuse_unreadable
from r3mes_vllm.errors import AdapterRefused, ConfigError, EngineError
from r3mes_vllm.identity import Identity, access_key, operator_key
from r3mes_vllm.node import admin, chat, health, identify, journal, restart, status, tls
from r3mes_vllm.node.adapters import Named, obtain_all
from r3mes_vllm.node.backend_client import BackendClient
from r3mes_vllm.node.carrying import Carrying
from r3mes_vllm.node.choice import policy
from r3mes_vllm.node.drain import Drain
from r3mes_vllm.node.early import Early
from r3mes_vllm.node.endings import Endings
from r3mes_vllm.node.guard import Guard
from r3mes_vllm.node.heartbeat import Registration
from r3mes_vllm.node.hold import Hold
from r3mes_vllm.node.journal import Journal
from r3mes_vllm.node.limits import Limits
from r3mes_vllm.node.load import Load
from r3mes_vllm.node.measures import Measures
from r3mes_vllm.node.metrics import NodeMetrics
from r3mes_vllm.node.mistakes import Mistakes
from r3mes_vllm.node.rates import Rates, charge
from r3mes_vllm.node.registry import Registry
from r3mes_vllm.node.signer import Signer
from r3mes_vllm.request_id import RequestIds, surround
from r3mes_vllm.settings import Settings
from r3mes_vllm.wire import RegisterNode

_FAREWELL_S = 10.0


class Node:
    """What the routes share: the adapters, where more come from, the engine's health."""

    def __init__(
        self, settings: Settings, supply: Supply, registry: Registry, host: Host, canary: Canary
    ) -> None:
        self.settings = settings
        self.supply = supply
        self.registry = registry
        self.host = host
        self.canary = canary
        self.policy = policy(settings.chat)
        self.identity = Identity.load(settings.state_dir)
        self._wallet = settings.wallet_address or self.identity.wallet_address
        self._access_key = access_key(settings.state_dir)

    def describe(self) -> RegisterNode:
        adapters = {name: version.cid for name, version in self.host.adapters.items()}
        return RegisterNode(
            wallet_address=self._wallet,
            endpoint_url=self.settings.public_url,
            available_lora_list=list(adapters),
            adapters=adapters,
            base_model=self.host.base_model,
            version=__version__,
            access_key=self._access_key,
        )

    def failure(self, reason: str) -> restart.Failure:
        """Of the engine. An adapter whose answers had NaN logits is not taken along; one that is
        named by its CID comes back when it is asked for."""
        adapters = self.describe().adapters
        blamed = {name.rpartition("@")[2] for name in self.canary.blamed}
        for name in (name for name, cid in adapters.items() if cid in blamed):
            report.warn(f"adapter {name!r} is left out: its answers had NaN logits")
        kept = {
            name: cid
            for name, cid in adapters.items()
            if cid not in blamed and not name.startswith(BY_CID)
        }
        return restart.Failure(
            reason,
            [f"{name}={cid}" for name, cid in kept.items()],
            sorted(kept.keys() - self.registry.fixed),
            sorted(name for name in kept if not self.host.adapters[name].keep),
        )


class NodeEndpoints:
    """vLLM's `endpoint_plugins` entry point; settings come from the environment."""

    name = "r3mes"
    required_tasks = None
    """Whatever the model does: without the plugin vLLM's routes would be open."""

    def attach_router(self, app: FastAPI) -> None:
        self._settings = settings.load()
        state_dir.prepare(self._settings.state_dir)
        if not Early.current:  # plain `vllm serve`: this process has not taken it yet
            self._in_use = ExitStack()
            self._in_use.enter_context(state_dir.used_by_a_node(self._settings.state_dir))
        app.include_router(chat.router)
        app.include_router(health.router)
        app.include_router(admin.router)
        app.include_router(identify.router)
        app.include_router(status.router)
        app.add_middleware(Mistakes)
        app.add_middleware(Endings)
        app.add_middleware(Hold)
        app.add_middleware(Carrying)
        app.state.load = Load(self._settings.requests_at_once)
        app.state.drain = Drain(app.state.load, self._settings.drain_timeout)
        app.add_middleware(Limits, settings=self._settings, load=app.state.load)
        app.add_middleware(Rates, settings=self._settings.rates)
        app.add_middleware(
            Guard,
            settings=self._settings,
            backend_key=access_key(self._settings.state_dir),
            operator_key=operator_key(self._settings.state_dir),
        )
        self._measures = Measures()
        app.state.standing = status.Standing(self._measures)
        ended = [*journal.ends(self._settings, self._measures), app.state.standing.refused]
        surround(app, lambda whole: RequestIds(Journal(whole, ended)))
        ending.no_tracebacks()
        inner = app.router.lifespan_context

        @asynccontextmanager
        async def lifespan(app: FastAPI) -> AsyncIterator[Any]:
            async with inner(app) as state, self._in_network(app):
                yield state

        app.router.lifespan_context = lifespan

    async def init_state(self, engine_client: Any, state: State, args: Namespace) -> None:
        """Load the adapters. Raises R3mesError when the engine is not well afterwards."""
        if args.api_server_count and args.api_server_count > 1:
            raise ConfigError(
                f"--api-server-count {args.api_server_count}: each server would number its "
                "adapters by itself",
                hint="pass --api-server-count 1",
            )
        if "generate" not in await engine_client.get_supported_tasks():
            raise ConfigError(
                f"{args.model} generates no text, and a node serves models that do",
                hint="vllm serve serves it",
            )
        models = state.openai_serving_models
        loaded = list(models.lora_requests.values())
        for it in loaded:
            await engine_client.remove_lora(it.lora_int_id)
        modules = {it.lora_name: it.lora_path for it in loaded}
        self._settings = _with_modules(self._settings, modules)
        supply = Supply.of(
            self._settings,
            base=shape_of(args.model, models.base_model_paths[0].name, args.lora_target_modules),
            max_rank=args.max_lora_rank,
        )
        supply.timed = self._measures.loaded
        named = await obtain_all(self._settings, supply)
        registry = Registry(self._settings, supply, {it.name for it in named if not it.listed})
        host = Host(
            engine_client,
            models,
            supply.obtain,
            registry.lookup,
            room=args.max_cpu_loras or args.max_loras,
            load_wait_s=self._settings.load_wait,
            loads=self._settings.loads_waiting,
            allow_cid=self._settings.allow_cid,
        )
        host.timed = self._measures.loaded
        self._measures.served = lambda: host.adapters
        for it in named:
            registry.take_system_prompt(it.name, it.adapter.cid)
            await _add(host, it, keep=it.name not in self._settings.passing)
        ending.refuse_aborted(engine_client)
        refuse_unreadable(engine_client)
        canary = Canary(
            engine_client,
            interval_s=self._settings.canary_interval,
            timeout_s=self._settings.canary_timeout,
        )
        canary.checked = self._measures.checked
        watching.watch(engine_client, [self._measures.observe, journal.observe, charge])
        carrying.carry(engine_client)
        if (trouble := await canary.check()) is not None:
            raise EngineError(trouble)
        served = ", ".join(f"{name} ({it.cid})" for name, it in host.adapters.items())
        report.done("engine", "started, adapters loaded, canary passed")
        report.say(f"LoRA adapters initialized: {served or 'none'}")
        self._metrics = NodeMetrics(host, supply, self._measures)
        REGISTRY.register(self._metrics)
        state.r3mes = Node(self._settings, supply, registry, host, canary)

    @asynccontextmanager
    async def _in_network(self, app: FastAPI) -> AsyncIterator[None]:
        node: Node = app.state.r3mes
        app.state.server.config.http_protocol_class = bounded(
            self._settings.header_bytes, self._settings.header_timeout
        )
        async with BackendClient.of(self._settings, Signer(node.identity)) as client:
            registration = Registration(
                client,
                node.describe,
                lambda: app.state.load.running,
                self._settings.heartbeat_interval,
            )
            node.host.changed = registration.adapters_changed
            self._metrics.registration = app.state.standing.registration = registration
            tasks = [
                asyncio.create_task(_open(app, self._settings, registration), name="network"),
            ]
            if not self._settings.base_only:
                following = node.registry.follow(node.host)
                tasks.append(asyncio.create_task(following, name="registry"))
            canary = asyncio.create_task(_watch(app, registration, network=tasks[0]), name="canary")
            draining = _drain(app, registration, network=tasks[0])
            tasks += [canary, asyncio.create_task(draining, name="drain")]
            if (certificate := app.state.server.config.ssl) and self._settings.ssl_certfile:
                following = tls.follow(certificate, self._settings)
                tasks.append(asyncio.create_task(following, name="certificate"))
            for task in tasks:
                task.add_done_callback(_say_why)
            if Early.current:
                await asyncio.to_thread(Early.current.end)
            try:
                yield
            finally:
                if node.canary.engine_failed:
                    # vLLM saw it first, and ends this server as if all were well.
                    await asyncio.wait({canary}, timeout=_FAREWELL_S)
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                await registration.goodbye()
                await node.host.aclose()
                await node.supply.pins.aclose()
                restart.end_unsupervised()


async def _watch(app: FastAPI, registration: Registration, network: asyncio.Task[None]) -> None:
    """Until the engine is not well: then leave, and start again."""
    node: Node = app.state.r3mes
    trouble = await node.canary.run()
    if trouble is None:
        return
    restart.begin(node.failure(trouble))
    ending.kill(app.state.engine_client)
    network.cancel()
    await asyncio.gather(network, return_exceptions=True)
    await registration.goodbye()
    restart.end(app.state.server)


async def _drain(app: FastAPI, registration: Registration, network: asyncio.Task[None]) -> None:
    drain: Drain = app.state.drain
    await drain.run(app.state.server, registration, network)
    if app.state.load.running:
        app.state.r3mes.canary.stopping = True  # what becomes of its own request is no trouble
        await ending.abort(app.state.engine_client)


def _with_modules(settings: Settings, modules: Mapping[str, str]) -> Settings:
    """What vLLM loaded for its `--lora-modules` is served as the node's own: vetted, by CID."""
    items = [f"{name}={os.path.abspath(path)}" for name, path in modules.items()]
    return settings.model_copy(update={"loras": [*settings.loras, *items]})


async def _add(host: Host, it: Named, *, keep: bool) -> None:
    """One adapter that the engine will not load is a warning: the node serves the others."""
    try:
        await host.add(it.name, it.adapter, keep=keep)
    except AdapterRefused as error:
        report.warn(f"adapter {it.name!r} is left out: {error}")


def _say_why(network: asyncio.Task[None]) -> None:
    if not network.cancelled() and (error := network.exception()):
        report.warn(f"the node's {network.get_name()} task ended: {error!r}; restart the node")


async def _open(app: FastAPI, settings: Settings, registration: Registration) -> None:
    # vLLM opens the port after this application has started, and signals it nowhere
    while not app.state.server.started:  # noqa: ASYNC110
        await asyncio.sleep(0.02)
    app.state.drain.catch_signals()
    report.say(f"Inference server listening on {settings.url_of(settings.serving_node_host)}")
    if not settings.base_only:
        await registration.run()
