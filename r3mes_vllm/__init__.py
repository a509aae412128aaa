"""Serve many LoRA adapters, fetched and verified from IPFS, on one vLLM engine.

For programs: `ServingNode` runs a node as a child process of yours; `fetch` and `vet` bring an
adapter here and judge it; `AdapterStore` is the cache that nodes on this machine share. Importing
this package loads nothing else; each name is loaded when it is first used.

    >>> from r3mes_vllm import vet
    >>> report = vet("./my-adapter")
    >>> report.accepted
    True
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from r3mes_vllm.adapter_library import AdapterStore, afetch, fetch, vet
    from r3mes_vllm.adapters.inspection import Finding, Inspection
    from r3mes_vllm.adapters.store import Damaged, Lease, Stored
    from r3mes_vllm.errors import AdapterRefused, R3mesError
    from r3mes_vllm.serving_node import NodeStatus, ServingNode

    __version__: str

__all__ = [
    "AdapterRefused",
    "AdapterStore",
    "Damaged",
    "Finding",
    "Inspection",
    "Lease",
    "NodeStatus",
    "R3mesError",
    "ServingNode",
    "Stored",
    "__version__",
    "afetch",
    "fetch",
    "vet",
]

_FROM = {
    "AdapterRefused": "r3mes_vllm.errors",
    "AdapterStore": "r3mes_vllm.adapter_library",
    "Damaged": "r3mes_vllm.adapters.store",
    "Finding": "r3mes_vllm.adapters.inspection",
    "Inspection": "r3mes_vllm.adapters.inspection",
    "Lease": "r3mes_vllm.adapters.store",
    "NodeStatus": "r3mes_vllm.serving_node",
    "R3mesError": "r3mes_vllm.errors",
    "ServingNode": "r3mes_vllm.serving_node",
    "Stored": "r3mes_vllm.adapters.store",
    "afetch": "r3mes_vllm.adapter_library",
    "fetch": "r3mes_vllm.adapter_library",
    "vet": "r3mes_vllm.adapter_library",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        value: Any = version("r3mes-vllm")
    elif name in _FROM:
        value = getattr(import_module(_FROM[name]), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
