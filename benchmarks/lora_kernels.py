"""Settings of vLLM's LoRA kernels for the GPU that is here, and what a step costs with them.

    python -m benchmarks.lora_kernels find [--out lora_kernels] [--seconds 90]
    python -m benchmarks.lora_kernels compare [--out lora_kernels]

`find` times the kernels alone, each candidate in a CUDA graph over so many layers that their
weights are not in the cache, and writes the best as the files that vLLM reads from
`VLLM_TUNED_CONFIG_FOLDER`. What it had no time for keeps vLLM's own setting. `compare` times the
linear layers of a step of Llama 8B: the base model, vLLM's way and settings, ours.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.shapes import SHAPES, Shape

SHRINK, EXPAND = "shrink", "expand"
SLOTS, TOKENS, RANKS = (8, 32), (64, 16, 256, 2048), (16, 64)
ATTENTION = ("qkv", "o")
MODELS = ("llama-8b", "llama-1b")
CACHE = 120 << 20
"""Bytes that no GPU's cache holds."""
REPLAYS = 3
EVENT: Any = torch.cuda.Event
Setting = dict[str, int | None]


@dataclass(frozen=True)
class Kernel:
    """One of vLLM's kernels, for a matrix of a model."""

    kind: str
    inputs: int
    outputs: tuple[int, ...]
    """Of each of the matrices that vLLM keeps as one."""
    slots: int
    tokens: int
    rank: int

    @property
    def slices(self) -> int:
        return len(self.outputs)

    @property
    def key(self) -> tuple[int, int, int, int, int]:
        """Where vLLM looks for its setting."""
        k, n = (self.inputs, self.rank) if self.kind == SHRINK else (self.rank, max(self.outputs))
        return self.slots + 1, self.slices, self.tokens, k, n

    def candidates(self) -> Iterator[Setting]:
        decodes = self.tokens <= 64
        blocks = (16,) if decodes else (32, 64)
        if self.kind == SHRINK:
            for m, n, k, split, warps, stages in itertools.product(
                blocks,
                sorted({16, self.rank}),
                (128, 256) if decodes else (32, 64, 128),
                (4, 8, 16, 32) if decodes else (1, 4, 8),
                (4, 8) if decodes else (4,),
                (2, 3),
            ):
                if k * split <= self.inputs:
                    yield _setting(m, n, k, warps, stages, split)
        else:
            for m, n, k, warps, stages in itertools.product(
                blocks,
                (32, 64, 128, 256) if decodes else (64, 128, 256),
                sorted({16, min(self.rank, 32), self.rank}) if decodes else (self.rank,),
                (2, 4, 8) if decodes else (4, 8),
                (2,),
            ):
                yield _setting(m, n, k, warps, stages, None)


def _setting(m: int, n: int, k: int, warps: int, stages: int, split: int | None) -> Setting:
    setting: Setting = {"block_m": m, "block_n": n, "block_k": k, "num_warps": warps}
    setting |= {"num_ctas": 1, "num_stages": stages, "max_nreg": None}
    return setting if split is None else setting | {"split_k": split, "group_size_m": 8}


def matrices(shape: Shape) -> dict[str, tuple[int, tuple[int, ...]]]:
    """Inputs and outputs of those that vLLM keeps as one."""
    of = {name.rpartition(".")[2]: pair for name, pair in shape.linear.items()}
    together: dict[str, Sequence[str]] = {
        "qkv": "qkv",
        "o": "o",
        "gate_up": ("gate", "up"),
        "down": ("down",),
    }
    return {
        name: (
            of[f"{parts[0]}_proj"][0],
            tuple(of[f"{part}_proj"][1] for part in parts),
        )
        for name, parts in together.items()
    }


def kernels() -> list[Kernel]:
    """What matters most first: attention of the largest model, a full batch of new tokens."""
    found = [
        Kernel(kind, *pair, slots, tokens, rank)
        for model in MODELS
        for name, pair in matrices(SHAPES[model]).items()
        for kind in (SHRINK, EXPAND)
        for slots in SLOTS
        for tokens in TOKENS
        for rank in RANKS
        if name in ATTENTION or rank == RANKS[0]
    ]
    attention = {pair for model in MODELS for pair in _attention(model)}
    found.sort(
        key=lambda it: (
            (it.inputs, it.outputs) not in attention,
            TOKENS.index(it.tokens),
            it.rank,
        )
    )
    return list({(it.kind, it.key): it for it in reversed(found)}.values())[::-1]


def _attention(model: str) -> list[tuple[int, tuple[int, ...]]]:
    return [pair for name, pair in matrices(SHAPES[model]).items() if name in ATTENTION]


class Weights:
    """Random adapters' of one matrix in all slots, in so many layers that no cache holds them."""

    def __init__(self, inputs: int, outputs: Sequence[int], slots: int, rank: int) -> None:
        used = min(slots, 8) * rank * 2 * min(inputs * len(outputs), sum(outputs))
        self.layers = max(4, min(32, CACHE // used))

        made = [stacked(inputs, outputs, slots, rank) for _ in range(self.layers)]
        self.a, self.b = [a for a, _ in made], [b for _, b in made]


def stacked(
    inputs: int, outputs: Sequence[int], slots: int, rank: int
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """A and B of random adapters in all slots of a layer, as vLLM keeps them."""

    def made(*size: int) -> torch.Tensor:
        return torch.randn(slots, 1, *size, dtype=torch.bfloat16, device="cuda") * 0.02

    return [made(rank, inputs) for _ in outputs], [made(it, rank) for it in outputs]


def meta(slots: int, tokens: int) -> Any:
    """vLLM's own notes of which row has which adapter: dealt to all slots in turn."""
    from vllm.lora.ops.triton_ops import LoRAKernelMeta

    made = LoRAKernelMeta.make(slots, tokens, device="cuda")
    made.prepare_tensors(torch.arange(tokens, device="cuda", dtype=torch.int32) % slots)
    return made


def _forget() -> None:
    """vLLM keeps the shape of weights by their address, which the next ones may get."""
    from vllm.lora.ops.triton_ops import utils

    utils._LORA_A_PTR_DICT.clear()
    utils._LORA_B_PTR_DICT.clear()


class Bench:
    """Times one kernel with any setting."""

    def __init__(self, it: Kernel) -> None:
        from vllm.lora.ops.triton_ops import lora_expand_op, lora_shrink_op

        _forget()
        self._it = it
        self._module: Any = lora_shrink_op if it.kind == SHRINK else lora_expand_op
        self._weights = Weights(it.inputs, it.outputs, it.slots, it.rank)
        self._told = meta(it.slots, it.tokens).meta_args(it.tokens, False)
        self._x = torch.randn(it.tokens, it.inputs, dtype=torch.bfloat16, device="cuda")
        self._between = torch.zeros(it.slices, it.tokens, it.rank, device="cuda")
        self._y = torch.zeros(it.tokens, sum(it.outputs), dtype=torch.bfloat16, device="cuda")

    def once(self, setting: Setting, layers: int) -> None:
        self._module.get_lora_op_configs = lambda *_, **__: setting
        for layer in range(layers):
            if self._it.kind == SHRINK:
                a = self._weights.a[layer]
                self._module._lora_shrink(self._x, a, self._between, *self._told, 1.0)
            else:
                b = self._weights.b[layer]
                self._module._lora_expand(self._between, b, self._y, *self._told, add_inputs=True)

    def microseconds(self, setting: Setting) -> float:
        """Of one layer; infinite if the GPU has no room for it."""
        layers = self._weights.layers
        try:
            self.once(setting, layers)
            graph = captured(lambda: self.once(setting, layers))
            return 1e6 * min(graph_s(graph, REPLAYS)) / layers
        except Exception as error:  # noqa: BLE001 - Triton raises its own for what does not fit
            print(f"{self._it.kind} {setting}: {error}", file=sys.stderr)
            return float("inf")


def captured(work: Callable[[], object]) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph


def graph_s(graph: torch.cuda.CUDAGraph, replays: int) -> list[float]:
    graph.replay()
    found = []
    for _ in range(replays):
        start, end = (EVENT(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end) / 1000)
    return found


def compile_part(part: int, parts: int) -> None:
    """In a process of its own: Triton keeps what it compiled on the disk."""
    known: set[str] = set()
    number = 0
    for it in kernels():
        bench = None
        for setting in it.candidates():
            split = setting.get("split_k") or 1
            even = it.key[3] % ((setting["block_k"] or 1) * split) == 0
            alike = f"{it.kind} {it.slices} {len(set(it.outputs))} {even} {setting}"
            if alike in known:
                continue
            known.add(alike)
            number += 1
            if number % parts == part:
                bench = bench or Bench(it)
                try:
                    bench.once(setting, 1)
                except Exception as error:  # noqa: BLE001 - as in `microseconds`
                    print(f"{alike}: {error}", file=sys.stderr)
        del bench


def find(out: Path, seconds: float) -> None:
    began = time.monotonic()
    until, compiled = began + seconds, began + seconds / 2
    context = multiprocessing.get_context("spawn")
    parts = max((os.cpu_count() or 2) - 2, 1)
    compilers = [context.Process(target=compile_part, args=(it, parts)) for it in range(parts)]
    for compiler in compilers:
        compiler.start()
    for compiler in compilers:
        compiler.join(max(compiled - time.monotonic(), 0))
        compiler.terminate()
    print(f"compiled; {until - time.monotonic():.0f} s are left", flush=True)
    from vllm.lora.ops.triton_ops.utils import get_lora_op_configs

    settings: dict[Kernel, Setting] = {}
    measured = 0
    for it in kernels():
        k, n = it.key[3:]
        stock = get_lora_op_configs(
            it.kind,
            it.slots + 1,
            it.tokens,
            k if it.kind == SHRINK else n,
            it.rank,
            it.slices,
            True if it.kind == EXPAND else None,
        )
        best = stock
        if time.monotonic() < until:
            bench = Bench(it)
            took = [(bench.microseconds(setting), setting) for setting in it.candidates()]
            usual, (least, found) = bench.microseconds(stock), min(took, key=lambda it: it[0])
            if least < usual:
                best = found
            measured += 1
            told = {name: value for name, value in best.items() if value is not None}
            print(f"{it}: {usual:.1f} -> {least:.1f} us {told}", flush=True)
        settings[it] = best
    write(out, torch.cuda.get_device_name().replace(" ", "_").replace("-", "_"), settings)
    print(f"{measured} of {len(settings)} kernels measured, {out}")


def write(out: Path, card: str, settings: Mapping[Kernel, Setting]) -> None:
    """As vLLM reads them."""
    out.mkdir(parents=True, exist_ok=True)
    for kind, name in ((SHRINK, f"{card}_SHRINK"), (EXPAND, f"{card}_EXPAND_TRUE")):
        tree: dict[str, Any] = {}
        for kernel, setting in settings.items():
            if kernel.kind == kind:
                place = tree
                for key in kernel.key[:-1]:
                    place = place.setdefault(str(key), {})
                place[str(kernel.key[-1])] = setting
        (out / f"{name}.json").write_text(json.dumps(tree, indent=1) + "\n")


class Layer:
    """A linear layer as vLLM's `BaseLinearLayerWithLoRA` has it; the real one needs a model."""

    def __init__(
        self, inputs: int, outputs: Sequence[int], adapters: tuple[Any, int, int] | None
    ) -> None:
        self.base_layer = torch.randn(sum(outputs), inputs, dtype=torch.bfloat16, device="cuda")
        self.base_layer *= 0.015
        self.output_slices = tuple(outputs)
        if adapters:
            from vllm.lora.layers.utils import _get_lora_aux_cuda_stream

            self.punica_wrapper, slots, rank = adapters
            self.lora_a_stacked, self.lora_b_stacked = stacked(inputs, outputs, slots, rank)
            self._events = [EVENT(), EVENT()]
            self._lora_stream = _get_lora_aux_cuda_stream()
            self.device = self.base_layer.device

    def _get_quant_method(self) -> "Layer":
        return self

    def apply(self, layer: torch.Tensor, x: torch.Tensor, bias: None) -> torch.Tensor:
        return F.linear(x, layer)

    def base(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.base_layer)

    def in_turn(self, x: torch.Tensor) -> torch.Tensor:
        """As vLLM has it where nothing is set."""
        y = self.base(x)
        self.punica_wrapper.add_lora_linear(
            y, x, self.lora_a_stacked, self.lora_b_stacked, 1.0, self.output_slices
        )
        return y


class Step:
    """The linear layers of Llama 8B, an adapter in each slot, whose requests take turns."""

    def __init__(self, slots: int, tokens: int, rank: int) -> None:
        from vllm.lora.punica_wrapper.punica_gpu import PunicaWrapperGPU

        _forget()
        shape = SHAPES["llama-8b"]
        config = SimpleNamespace(max_loras=slots, specialize_active_lora=False)
        wrapper = PunicaWrapperGPU(tokens, tokens, "cuda", lora_config=config)
        wrapper.token_mapping_meta = meta(slots, tokens)
        self._sizes = matrices(shape)
        self._layers = [
            {
                name: Layer(*pair, (wrapper, slots, rank) if name in ATTENTION else None)
                for name, pair in self._sizes.items()
            }
            for _ in range(shape.layers)
        ]
        self._x = torch.randn(tokens, shape.hidden, dtype=torch.bfloat16, device="cuda")

    def once(self, way: "Way") -> torch.Tensor:
        y = self._x
        for layers in self._layers:
            for name, layer in layers.items():
                y = y[:, : self._sizes[name][0]].contiguous()
                y = way(layer, y) if name in ATTENTION else layer.base(y)
        return y


Way = Callable[[Any, torch.Tensor], torch.Tensor]


def compare(settings: Path, tokens: int = 64, rank: int = 16) -> None:
    """Milliseconds of a step's linear layers with an adapter in each slot, by arrangement."""
    os.environ["VLLM_LORA_ENABLE_DUAL_STREAM"] = "1"
    from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
    from vllm.lora.ops.triton_ops.utils import (
        get_lora_op_configs,
        load_lora_op_config,
        supports_pdl,
    )

    from r3mes_vllm.engine import gpu_lora

    two_streams = BaseLinearLayerWithLoRA._apply_async_impl
    set_, early = ("VLLM_TUNED_CONFIG_FOLDER", str(settings)), ("VLLM_LORA_DISABLE_PDL", "0")
    ways: dict[str, tuple[Way, dict[str, str]]] = {
        "base": (Layer.base, {}),
        "stock": (Layer.in_turn, {}),
        "stock, settings": (Layer.in_turn, dict([set_])),
        "stock's two streams": (two_streams, dict([early])),
        "stock's two streams, settings": (two_streams, dict([set_, early])),
        "ours": (gpu_lora.apply, {}),
        "ours, settings": (gpu_lora.apply, dict([set_])),
    }
    for slots in SLOTS:
        step = Step(slots, tokens, rank)
        graphs, answers = {}, {}
        for name, (way, environment) in ways.items():
            os.environ["VLLM_LORA_DISABLE_PDL"] = "1"
            os.environ.pop("VLLM_TUNED_CONFIG_FOLDER", None)
            os.environ |= environment
            for kept in (get_lora_op_configs, load_lora_op_config, supports_pdl):
                kept.cache_clear()
            answers[name] = step.once(way).float()
            graphs[name] = captured(partial(step.once, way))
        found_s: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(7):
            for name, graph in graphs.items():
                found_s[name] += graph_s(graph, 5)
        base = statistics.median(found_s["base"])
        for name, seconds in found_s.items():
            median = statistics.median(seconds)
            off = (answers[name] - answers["stock"]).abs().max() / answers["stock"].abs().max()
            print(
                f"{slots} slots, {name}: {1e3 * median:.3f} ms ({1e3 * min(seconds):.3f} to "
                f"{1e3 * max(seconds):.3f}), base is {base / median:.3f} of it; "
                f"from stock's answer {off:.2g}",
                flush=True,
            )
        for name in ("stock", "ours, settings"):
            profile(name, graphs[name])


def profile(name: str, graph: torch.cuda.CUDAGraph) -> None:
    """Where its time goes."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiled

    with profiled(activities=[ProfilerActivity.CUDA]) as found:
        graph.replay()
        torch.cuda.synchronize()
    print(name)
    for it in sorted(found.key_averages(), key=lambda it: -it.self_device_time_total)[:8]:
        each = it.self_device_time_total / max(it.count, 1)
        print(f"  {it.self_device_time_total:9.0f} us {it.count:5} x {each:7.1f} {it.key[:70]}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("find", "compare"))
    parser.add_argument("--out", type=Path, default=Path("lora_kernels"))
    parser.add_argument("--seconds", type=float, default=90)
    given = parser.parse_args()
    if given.what == "find":
        find(given.out, given.seconds)
    else:
        compare(given.out)
