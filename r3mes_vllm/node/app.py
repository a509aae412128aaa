"""The node inside vLLM's server: the endpoint plugin that puts its parts together."""

import asyncio
import os
import signal
from argparse import Namespace
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

from fastapi import FastAPI
from starlette.datastructures import State

from r3mes_vllm import __version__, report, settings
from r3mes_vllm.engine.canary import Canary
from r3mes_vllm.engine.host import Host
from r3mes_vllm.engine.model import shape_of
from r3mes_vllm.errors import AdapterRefused, EngineError
from r3mes_vllm.identity import Identity
from r3mes_vllm.node import chat, health
from r3mes_vllm.node.adapters import Named, obtain_all
from r3mes_vllm.node.backend_client import BackendClient
from r3mes_vllm.node.choice import policy
from r3mes_vllm.node.guard import Guard
from r3mes_vllm.node.heartbeat import Registration
from r3mes_vllm.node.load import InFlight
from r3mes_vllm.settings import Settings
from r3mes_vllm.wire import RegisterNode


class Node:
    """What the routes share: the adapters on the engine, its health, the network client."""

    def __init__(self, settings: Settings, host: Host, canary: Canary, held: list[Named]) -> None:
        self.settings = settings
        self.host = host
        self.canary = canary
        self.policy = policy(settings.chat)
        self._held = held  # the leases end with the node
        self._wallet = settings.wallet_address or Identity.load(settings.state_dir).wallet_address

    def describe(self) -> RegisterNode:
        adapters = {hosted.name: hosted.cid for hosted in self.host.adapters}
        return RegisterNode(
            wallet_address=self._wallet,
            endpoint_url=self.settings.public_url,
            available_lora_list=list(adapters),
            adapters=adapters,
            base_model=self.host.base_model,
            version=__version__,
        )


class NodeEndpoints:
    """vLLM's `endpoint_plugins` entry point; settings come from the environment."""

    name = "r3mes"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        self._settings = settings.load()
        app.include_router(chat.router)
        app.include_router(health.router)
        app.add_middleware(InFlight)
        app.add_middleware(Guard, settings=self._settings)
        app.state.in_flight = 0
        inner = app.router.lifespan_context

        @asynccontextmanager
        async def lifespan(app: FastAPI) -> AsyncIterator[Any]:
            async with inner(app) as state, self._in_network(app):
                yield state

        app.router.lifespan_context = lifespan

    async def init_state(self, engine_client: Any, state: State, args: Namespace) -> None:
        """Load the adapters. Raises R3mesError when the engine is not well afterwards."""
        host = Host(engine_client, state.openai_serving_models)
        named = await obtain_all(
            self._settings,
            base=shape_of(args.model, host.base_model),
            max_rank=args.max_lora_rank,
        )
        for it in named:
            await _add(host, it)
        canary = Canary(engine_client)
        if (trouble := await canary.trouble()) is not None:
            raise EngineError(trouble)
        served = ", ".join(f"{hosted.name} ({hosted.cid})" for hosted in host.adapters)
        report.done("engine", "started, adapters loaded, canary passed")
        report.say(f"LoRA adapters initialized: {served or 'none'}")
        state.r3mes = Node(self._settings, host, canary, named)

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
            task = asyncio.create_task(_open(app, self._settings, registration), name="network")
            task.add_done_callback(_say_why)
            try:
                yield
            finally:
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task
                await registration.goodbye()


async def _add(host: Host, it: Named) -> None:
    """One adapter that the engine will not load is a warning: the node serves the others."""
    adapter = it.adapter
    try:
        await host.add(
            it.name,
            str(adapter.cid),
            adapter.path,
            rank=adapter.facts.rank,
            size=adapter.facts.size,
        )
    except AdapterRefused as error:
        report.warn(f"adapter {it.name!r} is left out: {error}")


def _say_why(network: asyncio.Task[None]) -> None:
    if not network.cancelled() and (error := network.exception()):
        report.warn(f"the node sends no more heartbeats: {error!r}; restart it")


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
