"""Servers that are asked over HTTP: our node and stock `vllm serve`, with the same flags."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from benchmarks.harness import Plan
from benchmarks.shapes import made, shape_of
from tests.programs import Program, free_port, program

STARTS_S = 600
_NOBODY = "http://127.0.0.1:9"


class Servers:
    """What all servers of a run have alike. `engines` share a GPU."""

    def __init__(
        self,
        plan: Plan,
        folder: Path,
        *,
        slots: int,
        kept: int,
        rank: int,
        seats: int = 64,
        engines: int = 2,
    ) -> None:
        shape = shape_of(plan.model, plan.quick)
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
            *(("--gpu-memory-utilization", f"{0.85 / engines:.2f}") if _on_gpu() else ()),
        ]

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
            it.wait_for("/ready", STARTS_S)
            yield it

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
            env={
                "VLLM_PLUGINS": "none",
                "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
                "VLLM_LOGGING_LEVEL": "ERROR",
                "VLLM_CPU_KVCACHE_SPACE": "2",
                "VLLM_NO_USAGE_STATS": "1",
                "HF_HUB_OFFLINE": "1",
            },
        ) as it:
            it.wait_for("/health", STARTS_S)
            yield it


def _on_gpu() -> bool:
    from vllm.platforms import current_platform

    return not current_platform.is_cpu()
