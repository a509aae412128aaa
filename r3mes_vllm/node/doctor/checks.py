"""All checks by name, and what is printed of them."""

from collections.abc import Awaitable, Callable
from functools import partial

from r3mes_vllm.node.doctor import checks_adapters, checks_engine, checks_local, checks_network
from r3mes_vllm.node.doctor.findings import Check, Finding
from r3mes_vllm.settings import Settings


def checks(settings: Settings) -> dict[str, Check]:
    local: dict[str, Callable[[], Finding]] = {
        "serving mode": partial(checks_local.serving_mode, settings),
        "variables": checks_local.variables,
        "directories": partial(checks_local.directories, settings),
        "disk": partial(checks_local.disk, settings),
        # Before the public URL, whose check listens on the port.
        "port free": partial(checks_local.port_free, settings),
        "network port": partial(checks_local.network_port, settings),
        "memory": partial(checks_engine.memory, settings),
        "GPU": partial(checks_engine.gpu, settings),
        "compiler": partial(checks_engine.compiler, settings),
    }
    outside: dict[str, Callable[[Settings], Awaitable[Finding]]] = {
        "backend": checks_network.backend,
        "clock": checks_network.clock,
        "public URL": checks_network.public_url,
        "IPFS daemon": checks_network.ipfs_daemon,
        "gateways": checks_adapters.gateways,
        "adapters registered": checks_adapters.registered,
        "CIDs retrievable": checks_adapters.retrievable,
        "model": checks_engine.model,
        "tokenizer": checks_engine.tokenizer,
        "adapters load": checks_adapters.load,
        "heartbeat": checks_adapters.heartbeat,
    }
    return {name: partial(_at_once, check) for name, check in local.items()} | {
        name: partial(check, settings) for name, check in outside.items()
    }


async def _at_once(check: Callable[[], Finding]) -> Finding:
    return check()
