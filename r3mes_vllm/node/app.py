"""The node inside vLLM's server: the endpoint plugin that puts its parts together."""

import asyncio
import os
import signal
from argparse import Namespace
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from prometheus_client import REGISTRY
from starlette.datastructures import State

from r3mes_vllm import __version__, report, settings
from r3mes_vllm.adapters.supply import Supply
from r3mes_vllm.engine import ending
from r3mes_vllm.engine.canary import Canary
from r3mes_vllm.engine.host import Host
from r3mes_vllm.engine.model import shape_of
from r3mes_vllm.errors import AdapterRefused, ConfigError, EngineError
from r3mes_vllm.identity import Identity
from r3mes_vllm.node import admin, chat, health, restart
from r3mes_vllm.node.adapters import Named, obtain_all
from r3mes_vllm.node.backend_client import BackendClient
from r3mes_vllm.node.choice import policy
from r3mes_vllm.node.endings import Endings
from r3mes_vllm.node.guard import Guard
from r3mes_vllm.node.heartbeat import Registration
from r3mes_vllm.node.hold import Hold
from r3mes_vllm.node.limits import Limits
from r3mes_vllm.node.load import InFlight
from r3mes_vllm.node.metrics import AdapterMetrics
from r3mes_vllm.node.registry import Registry
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
        self._wallet = settings.wallet_address or Identity.load(settings.state_dir).wallet_address

    def describe(self) -> RegisterNode:
        adapters = {name: version.cid for name, version in self.host.adapters.items()}
        return RegisterNode(
            wallet_address=self._wallet,
            endpoint_url=self.settings.public_url,
            available_lora_list=list(adapters),
            adapters=adapters,
            base_model=self.host.base_model,
            version=__version__,
        )

    def failure(self, reason: str) -> restart.Failure:
        """Of the engine. An adapter whose answers had NaN logits is not taken along."""
        adapters = self.describe().adapters
        blamed = {name.rpartition("@")[2] for name in self.canary.blamed}
        for name in (name for name, cid in adapters.items() if cid in blamed):
            report.warn(f"adapter {name!r} is left out: its answers had NaN logits")
        return restart.Failure(
            reason,
            [f"{name}={cid}" for name, cid in adapters.items() if cid not in blamed],
            sorted(adapters.keys() - self.registry.fixed),
        )


class NodeEndpoints:
    """vLLM's `endpoint_plugins` entry point; settings come from the environment."""

    name = "r3mes"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        self._settings = settings.load()
        app.include_router(chat.router)
        app.include_router(health.router)
        app.include_router(admin.router)
        app.add_middleware(Endings)
        app.add_middleware(Hold)
        app.add_middleware(InFlight)
        app.add_middleware(Limits, settings=self._settings)
        app.add_middleware(Guard, settings=self._settings)
        ending.no_tracebacks()
        app.state.in_flight = 0
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
        models = state.openai_serving_models
        supply = Supply.of(
            self._settings,
            base=shape_of(args.model, models.base_model_paths[0].name),
            max_rank=args.max_lora_rank,
        )
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
        for it in named:
            await _add(host, it)
        ending.refuse_aborted(engine_client)
        canary = Canary(
            engine_client,
            interval_s=self._settings.canary_interval,
            timeout_s=self._settings.canary_timeout,
        )
        if (trouble := await canary.check()) is not None:
            raise EngineError(trouble)
        served = ", ".join(f"{name} ({it.cid})" for name, it in host.adapters.items())
        report.done("engine", "started, adapters loaded, canary passed")
        report.say(f"LoRA adapters initialized: {served or 'none'}")
        REGISTRY.register(AdapterMetrics(host))
        state.r3mes = Node(self._settings, supply, registry, host, canary)

    @asynccontextmanager
    async def _in_network(self, app: FastAPI) -> AsyncIterator[None]:
        node: Node = app.state.r3mes
        async with BackendClient(self._settings.backend) as client:
            registration = Registration(
                client,
                node.describe,
                lambda: app.state.in_flight,
                self._settings.heartbeat_interval,
            )
            node.host.changed = registration.adapters_changed
            tasks = [
                asyncio.create_task(_open(app, self._settings, registration), name="network"),
                asyncio.create_task(node.registry.follow(node.host), name="registry"),
            ]
            watching = asyncio.create_task(
                _watch(app, registration, network=tasks[0]), name="canary"
            )
            tasks.append(watching)
            for task in tasks:
                task.add_done_callback(_say_why)
            try:
                yield
            finally:
                if node.canary.engine_failed:
                    # vLLM saw it first, and ends this server as if all were well.
                    await asyncio.wait({watching}, timeout=_FAREWELL_S)
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                await registration.goodbye()
                await node.host.aclose()
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


async def _add(host: Host, it: Named) -> None:
    """One adapter that the engine will not load is a warning: the node serves the others."""
    try:
        await host.add(it.name, it.adapter)
    except AdapterRefused as error:
        report.warn(f"adapter {it.name!r} is left out: {error}")


def _say_why(network: asyncio.Task[None]) -> None:
    if not network.cancelled() and (error := network.exception()):
        report.warn(f"the node's {network.get_name()} task ended: {error!r}; restart the node")


async def _open(app: FastAPI, settings: Settings, registration: Registration) -> None:
    # vLLM opens the port after this application has started, and signals it nowhere
    while not app.state.server.started:  # noqa: ASYNC110
        await asyncio.sleep(0.02)
    asyncio.get_running_loop().add_signal_handler(signal.SIGINT, _interrupt)
    report.say(f"Inference server listening on {_address(settings)}")
    await registration.run()


def _interrupt() -> None:
    """Ctrl-C ends the server as SIGTERM does, in vLLM's own handler, but is remembered."""
    Interrupted.seen = True
    os.kill(os.getpid(), signal.SIGTERM)


class Interrupted:
    seen = False


def _address(settings: Settings) -> str:
    host = settings.serving_node_host
    return f"http://{f'[{host}]' if ':' in host else host}:{settings.serving_node_port}"
