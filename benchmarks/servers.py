"""Servers that are asked over HTTP: our node and stock `vllm serve`, with the same flags."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from benchmarks.harness import Plan
from benchmarks.shapes import KV_GIB, OF_GPU, made, shape_of
from benchmarks.side_by_side import on_gpu
from r3mes_vllm.engine import environment
from tests.programs import Program, free_port, program, wait_until

STARTS_S = 600
_GPU_FLAGS = (
    *("--kv-cache-memory-bytes", f"{KV_GIB << 30}"),
    *("--gpu-memory-utilization", f"{OF_GPU}"),
)
_NOBODY = "http://127.0.0.1:9"


class Servers:
    """What all servers of a run have alike. Call `ready` when all of them have been entered."""

    def __init__(
        self,
        plan: Plan,
        folder: Path,
        *,
        slots: int,
        kept: int,
        rank: int,
        seats: int = 64,
    ) -> None:
        shape = shape_of(plan.model, plan.quick)
        self._together = on_gpu()
        self.folder = folder
        self.model = made(shape, folder)
        self.name = self.model.name
        """Of the base model, to those who ask."""
        self._sizes = (("--max-loras", str(slots)), ("--max-lora-rank", str(rank)))
        self._common = [
            *("--max-cpu-loras", str(kept), "--max-num-seqs", str(seats)),
            *("--max-model-len", "2048", "--dtype", plan.dtype, "--seed", "0"),
            "--no-enable-prefix-caching",
            *(("--load-format", "dummy") if shape.dummy else ()),
            *(_GPU_FLAGS if self._together else ()),
        ]
        self._starting: list[tuple[Program, str]] = []

    def ready(self) -> None:
        """Wait until all have started: on a GPU they start at once."""
        for it, path in self._starting:
            it.wait_for(path, STARTS_S)
        self._starting.clear()

    def _started(self, it: Program, path: str) -> Program:
        self._starting.append((it, path))
        if not self._together:
            self.ready()
        return it

    @contextmanager
    def backend(self) -> Iterator[Program]:
        """`r3mes-vllm backend`, which takes nodes of this machine."""
        port, folder = free_port(), self.folder / "backend"
        with program(
            folder,
            *("backend", "--port", str(port), "--allow-private-nodes"),
            *("--database-url", f"sqlite:///{folder / 'registry.sqlite3'}"),
            url=f"http://127.0.0.1:{port}",
        ) as it:
            it.wait_for("/health", 60)
            yield it

    @contextmanager
    def node(
        self, *options: str, loras: Mapping[str, Path], name: str = "node", **env: str
    ) -> Iterator[Program]:
        """`r3mes-vllm serve`; its store is `folder / name / "cache"`."""
        port = free_port()
        given = ",".join(f"{it}={path}" for it, path in loras.items())
        backend = () if "--backend-url" in options else ("--backend-url", _NOBODY)
        with program(
            self.folder / name,
            *("serve", "--loras", given, "--model", str(self.model), "--host", "127.0.0.1"),
            *("--port", str(port), *backend, *self._sizes[0], *self._sizes[1], *options),
            *("--", *self._common),
            url=f"http://127.0.0.1:{port}",
            env={"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CPU_KVCACHE_SPACE": "2"} | env,
        ) as it:
            yield self._started(it, "/ready")

    @contextmanager
    def stock(self, *, loras: Mapping[str, Path], name: str = "stock") -> Iterator[Program]:
        """`vllm serve` without any plugin, to which adapters may be loaded."""
        port = free_port()
        modules = [f"{it}={path}" for it, path in loras.items()]
        with program(
            self.folder / name,
            *("--model", str(self.model), "--served-model-name", self.name, "--enable-lora"),
            *("--api-server-count", "1", "--uvicorn-log-level", "warning"),
            *("--host", "127.0.0.1", "--port", str(port), *self._sizes[0], *self._sizes[1]),
            *self._common,
            *(("--lora-modules", *modules) if modules else ()),
            module="benchmarks.stock",
            url=f"http://127.0.0.1:{port}",
            env=environment.of_kernels(os.environ)
            | {
                "VLLM_PLUGINS": "none",
                "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
                "VLLM_LOGGING_LEVEL": "ERROR",
                "VLLM_CPU_KVCACHE_SPACE": "2",
                "VLLM_NO_USAGE_STATS": "1",
                "HF_HUB_OFFLINE": "1",
            },
        ) as it:
            yield self._started(it, "/health")


def registered(*nodes: Program) -> None:
    """Wait until their backend has taken them."""
    for it in nodes:
        wait_until(partial(_has_registered, it), 60, "its registration", it.output)


def _has_registered(node: Program) -> bool:
    return "registered with" in node.output()
