"""The longest silence of running streams while a large adapter is loaded and first used.

    r3mes-vllm bench no-stall [--rounds 5] [--only NAME] [--dtype float32]

An adapter of 200 MB on all linear layers. Two engines, ours and stock vLLM
with a plain `add_lora`, run in processes of their own with the same flags and take turns. A gap is
the time between two tokens of one stream; the target of each is `max(50 ms, 3 x median)`, the
median being that of the same streams before anything is loaded. The load is over when the adapter
may be asked for. Whatever request comes, its prompt is computed in one step with the streams' next
tokens: the second use of the adapter computes the same as the first, so what the first takes longer
is the loading; the same request to the base model shows what is no adapter's doing.
"""

import asyncio
import json
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.cpu_lora import SAMPLER
from benchmarks.harness import Plan, Record, alone, in_turn, worker_told
from benchmarks.results import Target
from benchmarks.shapes import adapter, engine_flags, served_rank, shape_of, told
from benchmarks.side_by_side import Worker, jobs, ready, tell

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
    "bf16, rank 320": (320, torch.bfloat16),
    "fp32, rank 160": (160, torch.float32),
}
"""Of SmolLM2 each is 195 MB on disk. A processor without instructions for bf16 is faster with
`--dtype float32`, and then the target is the 50 ms."""
LARGER = {"bf16, rank 64": (64, torch.bfloat16)}
"""Of the models of billions of weights: 90 and 335 MB."""


def run(plan: Plan, record: Record) -> None:
    record.describe(SAMPLER, dtype=plan.dtype, streams_rank=SMALL_RANK, modules="all linear")
    shape = shape_of(plan.model, plan.quick)
    files = LARGER if shape.dummy else plan.pick(FILES, dict([*FILES.items()][:1]))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        small = adapter(folder / "small", shape, seed=1, rank=SMALL_RANK, modules=shape.linear)
        for file, (rank, dtype) in files.items():
            large = adapter(
                folder / file, shape, seed=2, rank=rank, modules=shape.linear, dtype=dtype
            )
            asked = told(plan, folder) | {"small": str(small), "large": str(large), "rank": rank}
            with Worker(__name__, asked, "none") as stock, Worker(__name__, asked, "r3mes") as ours:
                ready(ours, stock)
                for case in plan.pick(CASES, CASES[1:2]):
                    if plan.wants(f"{case.name}, {file}"):
                        _measured(plan, record, case, file, ours, stock)


def _measured(
    plan: Plan, record: Record, case: Case, file: str, ours: Worker, stock: Worker
) -> None:
    for turn in range(plan.rounds + 1):
        found = {
            kind: engine.ask(asdict(case))
            for kind, engine in in_turn(turn, [("ours", ours), ("stock", stock)])
        }
        if turn:  # the first warms up
            _note(record, f"{case.name}, {file}", found["ours"], found["stock"])


def _note(record: Record, case: str, ours: dict[str, float], stock: dict[str, float]) -> None:
    for phase in ("median", *PHASES[1:], "load_s"):
        what = {"median": "median gap before it", "load_s": "the load takes"}
        loading = phase in ("load", "first use")
        record.pair(
            f"{case}: {what.get(phase, f'longest gap, {phase}')}",
            "s" if phase == "load_s" else "ms",
            ours=ours[phase],
            peer=stock[phase],
            sides=("ours", "stock vLLM"),
            better="lower",
            target=Target(of="ours", at_most=max(50, 3 * ours["median"])) if loading else None,
            chart="Longest silence of streams beside a load" if loading else "",
        )


async def _work(given: dict[str, Any]) -> None:
    """Answers with the gaps of a case."""
    from vllm import SamplingParams
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.lora.request import LoRARequest
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.async_llm import AsyncLLM

    engine = AsyncLLM.from_engine_args(
        AsyncEngineArgs(
            enable_lora=True,
            max_model_len=2048,
            max_num_seqs=16,
            max_loras=3,
            max_cpu_loras=4,
            max_lora_rank=served_rank(given["rank"]),
            enable_prefix_caching=False,
            **engine_flags(given),
        )
    )
    beside = LoRARequest("small", 1, given["small"])
    await engine.add_lora(beside)
    names = iter(range(10_000_000))
    most = engine.model_config.get_vocab_size() - 1
    tell(None)

    async def stream(
        adapter: LoRARequest | None, prompt: int, answer: int, times: list[float]
    ) -> None:
        number = next(names)
        tokens = np.random.default_rng(number).integers(min(1000, most // 2), most, prompt).tolist()
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
        adapter = LoRARequest(f"large-{number}", number, given["large"])
        streams: list[list[float]] = [[] for _ in range(case["streams"])]
        marks = []
        tasks = [
            asyncio.create_task(stream(beside if case["adapted"] else None, 16, 2000, times))
            for times in streams
        ]
        while any(len(times) < 3 for times in streams):
            await asyncio.sleep(0.01)
        marks.append(time.perf_counter())
        await asyncio.sleep(QUIET_S)
        marks.append(time.perf_counter())
        await load(adapter)
        marks.append(time.perf_counter())
        for asked in (adapter, adapter, None):
            await stream(asked, PROMPT, ANSWER, [])
            marks.append(time.perf_counter())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await engine.remove_lora(number)
        return {"load_s": round(marks[2] - marks[1], 3)} | _gaps(streams, marks)

    for job in jobs():
        tell(await run(job))
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


if __name__ == "__main__":
    if given := worker_told():
        asyncio.run(_work(json.loads(given)))
    else:
        alone("no-stall")
