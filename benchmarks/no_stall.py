"""The longest silence of running streams while a large adapter is loaded and first used.

    python -m benchmarks.no_stall [--rounds 5] [--only NAME] [--file NAME] [--json]

SmolLM2-135M, an adapter of 200 MB on all linear layers. Two engines, ours and stock vLLM
with a plain `add_lora`, run in processes of their own with the same flags and take turns. A gap is
the time between two tokens of one stream; the target of each is `max(50 ms, 3 x median)`, the
median being that of the same streams before anything is loaded. The load is over when the adapter
may be asked for. Whatever request comes, its prompt is computed in one step with the streams' next
tokens: the second use of the adapter computes the same as the first, so what the first takes longer
is the loading; the same request to the base model shows what is no adapter's doing.
"""

import argparse
import asyncio
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs
import torch
from safetensors.torch import save_file

from benchmarks.cpu_lora import LAYERS, LINEAR

SMALL_RANK = 8
PROMPT, ANSWER = 4, 2
"""Tokens of a request to the adapter that was loaded."""
QUIET_S = 2.0
PHASES = ("quiet", "load", "first use", "second use", "base request")


@dataclass(frozen=True)
class Case:
    name: str
    streams: int
    adapted: bool = False
    """Whether the streams are of a small adapter, not of the base model."""


CASES = [
    Case("1 stream", 1),
    Case("8 streams", 8),
    Case("8 streams of a small adapter", 8, adapted=True),
]
FILES = {
    "bf16, rank 320": (320, torch.bfloat16, "bfloat16"),
    "fp32, rank 160": (160, torch.float32, "bfloat16"),
    "fp32, rank 160, engine in fp32": (160, torch.float32, "float32"),
}
"""Each is 195 MB on disk. A processor without instructions for bf16 is faster in fp32, and then the
target is the 50 ms."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", help="a part of a case's name", default="")
    parser.add_argument("--file", help="a part of a file's name", default="")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--engine", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.engine:
        asyncio.run(_work(json.loads(options.engine)))
        return
    result = measure(options.rounds, options.only, options.file)
    print(json.dumps(result, indent=1) if options.json else _told(result))


def measure(rounds: int, only: str, file: str) -> dict[str, Any]:
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        small = _adapter(Path(name) / "small", SMALL_RANK, torch.bfloat16)
        for kind, (rank, dtype, computing) in FILES.items():
            if file not in kind:
                continue
            large = _adapter(Path(name) / kind, rank, dtype)
            told = {"small": str(small), "large": str(large), "dtype": computing}
            with _Engine("stock", told) as stock, _Engine("ours", told) as ours:
                for case in CASES:
                    if only in case.name:
                        found.append(_measured(case, kind, ours, stock, rounds))
    return {
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "model": "SmolLM2-135M-Instruct",
        "rounds": rounds,
        "cases": found,
    }


def _measured(
    case: Case, file: str, ours: "_Engine", stock: "_Engine", rounds: int
) -> dict[str, Any]:
    """Of each engine and phase: the longest gaps of the rounds."""
    seen: dict[str, list[dict[str, float]]] = {"ours": [], "stock": []}
    for turn in range(rounds + 1):
        for kind, engine in (("ours", ours), ("stock", stock)):
            row = engine.run(case)
            print(case.name, file, kind, row, file=sys.stderr)
            if turn:  # the first warms up
                seen[kind].append(row)
    return asdict(case) | {"file": file} | seen


def _told(result: dict[str, Any]) -> str:
    lines = [f"{result['model']}, {result['machine']}, {result['rounds']} rounds, alternating"]
    lines.append("Longest gap between two tokens, ms: median (least-most) of the rounds")
    lines.append("| streams | file | engine | median gap | target | load | first use | second use")
    lines[-1] += " | base request | load took, s |"
    lines.append("|---|---|---|---|---|---|---|---|---|---|")
    for case in result["cases"]:
        for kind in ("ours", "stock"):
            rows = case[kind]
            usual = statistics.median(row["median"] for row in rows)
            cells = [_spread([row[phase] for row in rows]) for phase in PHASES[1:]]
            took = statistics.median(row["load_s"] for row in rows)
            lines.append(
                f"| {case['name']} | {case['file']} | {kind} | {usual:.0f}"
                f" | {max(50, 3 * usual):.0f} | {' | '.join(cells)} | {took:.2f} |"
            )
    return "\n".join(lines)


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.0f} ({min(values):.0f}-{max(values):.0f})"


class _Engine:
    """A process with an engine; it works only when it is asked to."""

    def __init__(self, kind: str, told: dict[str, Any]) -> None:
        environment = os.environ | {
            "VLLM_PLUGINS": "r3mes" if kind == "ours" else "none",
            "VLLM_LOGGING_LEVEL": "ERROR",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.no_stall", "--engine", json.dumps(told)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def __enter__(self) -> "_Engine":
        self._read()
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()

    def run(self, case: Case) -> dict[str, float]:
        assert self._process.stdin
        self._process.stdin.write(json.dumps(asdict(case)) + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, float]:
        assert self._process.stdout
        for line in self._process.stdout:
            if line.startswith("gaps "):
                return dict(json.loads(line.removeprefix("gaps ")))
        raise RuntimeError(f"the engine ended with {self._process.wait()}")


async def _work(told: dict[str, Any]) -> None:
    """An engine that takes a case a line from standard input, and answers with its gaps."""
    from vllm import SamplingParams
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.lora.request import LoRARequest
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.async_llm import AsyncLLM

    from r3mes_vllm.engine.base_model import embedded_base_model

    engine = AsyncLLM.from_engine_args(
        AsyncEngineArgs(
            str(embedded_base_model(Path(platformdirs.user_cache_dir("r3mes-vllm")))),
            dtype=told["dtype"],
            enable_lora=True,
            max_model_len=2048,
            max_num_seqs=16,
            max_loras=3,
            max_cpu_loras=4,
            max_lora_rank=320,
            enable_prefix_caching=False,
            seed=0,
        )
    )
    small = LoRARequest("small", 1, told["small"])
    await engine.add_lora(small)
    names = iter(range(10_000_000))
    print("gaps {}", flush=True)

    async def stream(
        adapter: LoRARequest | None, prompt: int, answer: int, times: list[float]
    ) -> None:
        number = next(names)
        tokens = np.random.default_rng(number).integers(1000, 40000, prompt).tolist()
        params = SamplingParams(
            temperature=0,
            max_tokens=answer,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        asked: Any = {"prompt_token_ids": tokens}
        async for _ in engine.generate(asked, params, f"r{number}", lora_request=adapter):
            times.append(time.perf_counter())

    async def load(adapter: LoRARequest) -> None:
        from r3mes_vllm.engine import staging

        await staging.load(engine, adapter, 60)  # stock's workers have no extension: add_lora

    async def run(case: dict[str, Any]) -> dict[str, float]:
        number = next(names) + 2
        large = LoRARequest(f"large-{number}", number, told["large"])
        streams: list[list[float]] = [[] for _ in range(case["streams"])]
        marks = []
        tasks = [
            asyncio.create_task(stream(small if case["adapted"] else None, 16, 2000, times))
            for times in streams
        ]
        while any(len(times) < 3 for times in streams):
            await asyncio.sleep(0.01)
        marks.append(time.perf_counter())
        await asyncio.sleep(QUIET_S)
        marks.append(time.perf_counter())
        await load(large)
        marks.append(time.perf_counter())
        for adapter in (large, large, None):
            await stream(adapter, PROMPT, ANSWER, [])
            marks.append(time.perf_counter())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await engine.remove_lora(number)
        return {"load_s": round(marks[2] - marks[1], 3)} | _gaps(streams, marks)

    for line in await asyncio.to_thread(lambda: iter(sys.stdin.readline, "")):
        print("gaps", json.dumps(await run(json.loads(line))), flush=True)
    engine.shutdown()


def _gaps(streams: list[list[float]], marks: list[float]) -> dict[str, float]:
    """The median of the quiet phase and the longest of each, in ms."""
    found: dict[str, float] = {}
    for phase, (begin, end) in zip(PHASES, pairwise(marks), strict=True):
        gaps = [
            1000 * (after - before)
            for times in streams
            for before, after in pairwise(times)
            if after > begin and before < end
        ]
        if phase == "quiet":
            found["median"] = round(statistics.median(gaps), 1)
        found[phase] = round(max(gaps), 1)
    return found


def _adapter(folder: Path, rank: int, dtype: torch.dtype) -> Path:
    folder.mkdir(parents=True)
    random = torch.Generator().manual_seed(rank)
    tensors = {}
    for layer in range(LAYERS):
        for module, (inputs, outputs) in LINEAR.items():
            name = f"base_model.model.model.layers.{layer}.{module}"
            for part, shape in (("A", (rank, inputs)), ("B", (outputs, rank))):
                values = torch.randn(shape, generator=random) * 0.01
                tensors[f"{name}.lora_{part}.weight"] = values.to(dtype)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": sorted(module.rpartition(".")[2] for module in LINEAR),
        "base_model_name_or_path": "HuggingFaceTB/SmolLM2-135M-Instruct",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


if __name__ == "__main__":
    main()
