"""Throughput that is kept with adapters: ours and stock vLLM, side by side.

    r3mes-vllm bench kept [--rounds 5] [--only NAME] [--dtype float32]

The two engines run in processes of their own with the same flags, one works while the other waits,
and they alternate. Each round measures the base model and the adapters on each engine; ratios are
of one round, then the median and the spread of the rounds.
"""

import json
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.harness import Plan, Record, alone, in_turn, worker_told
from benchmarks.results import Target
from benchmarks.shapes import Shape, adapter, engine_flags, shape_of, told
from benchmarks.side_by_side import Worker, jobs, ready, tell

SAMPLER = "greedy, end of text ignored"
ADAPTERS = 16


@dataclass(frozen=True)
class Case:
    name: str
    engine: str
    adapters: int
    of_base: float | None
    """Target on the CPU: this share of the base model's throughput."""
    of_stock: float | None
    """Target on the CPU: so many times stock's throughput."""
    requests: int = 16
    prompt: int = 32
    """Tokens."""
    answer: int = 48
    """Tokens."""


ENGINES = {
    "8 slots": {"max_loras": 8, "max_cpu_loras": 32, "max_lora_rank": 8},
    "8 slots, all linear": {"max_loras": 8, "max_cpu_loras": 32, "max_lora_rank": 8},
    "32 slots": {"max_loras": 32, "max_cpu_loras": 32, "max_lora_rank": 16},
}
CASES = [
    Case("8 adapters, 8 slots", "8 slots", 8, 0.93, 2.1),
    Case("1 adapter, 8 slots", "8 slots", 1, 0.95, None),
    Case("prefill of 2,000 tokens", "8 slots", 1, 0.9, None, requests=1, prompt=2000, answer=1),
    Case("16 adapters over 8 slots", "8 slots", 16, None, 2.2),
    Case("8 adapters, all linear layers", "8 slots, all linear", 8, 0.87, None),
    Case("16 adapters, 32 slots, rank 16", "32 slots", 16, 0.85, 2.3),
]


def run(plan: Plan, record: Record) -> None:
    record.describe(
        SAMPLER,
        dtype=plan.dtype,
        rank="8 where a name says nothing else",
        requests_at_once=16,
        prompt_tokens=32,
        answer_tokens=48,
    )
    shape = shape_of(plan.model, plan.quick)
    with tempfile.TemporaryDirectory() as name:
        for engine in plan.pick(list(ENGINES), ["8 slots"]):
            cases = [it for it in CASES if it.engine == engine and plan.wants(it.name)]
            if cases:
                _engine(plan, record, shape, engine, cases, Path(name))


def _engine(
    plan: Plan, record: Record, shape: Shape, engine: str, cases: list[Case], folder: Path
) -> None:
    modules = shape.linear if "all linear" in engine else shape.attention
    flags = ENGINES[engine]
    ranks = [flags["max_lora_rank"]] * ADAPTERS
    folders = adapters(folder / engine, shape, ranks, plan.seed, modules)
    asked = told(plan, folder) | {"adapters": folders, "seed": plan.seed, "flags": flags}
    with Worker(__name__, asked, "none") as stock, Worker(__name__, asked, "r3mes") as ours:
        ready(ours, stock)
        for case in cases:
            for turn in range(plan.rounds + 1):
                rates = _round(turn, case, ours, stock)
                if turn:  # the first warms up
                    _note(record, plan, case, rates)


def _round(turn: int, case: Case, ours: Worker, stock: Worker) -> dict[str, float]:
    rates = {}
    for kind, engine in in_turn(turn, [("ours", ours), ("stock", stock)]):
        for what, count in (("base", 0), ("adapters", case.adapters)):
            rates[f"{kind} {what}"] = rate(engine, asdict(case) | {"adapters": count})
    return rates


def _note(record: Record, plan: Plan, case: Case, rates: Mapping[str, float]) -> None:
    aimed = plan.model == "smol"
    unit = "tokens/s" if case.answer > 1 else "prompt tokens/s"
    for sides, names, target, chart in (
        (
            ("ours with adapters", "ours without"),
            ("ours adapters", "ours base"),
            case.of_base,
            "Kept of the base model's tokens a second",
        ),
        (
            ("ours", "stock vLLM"),
            ("ours adapters", "stock adapters"),
            case.of_stock,
            "Times stock vLLM's tokens a second",
        ),
        (("stock with adapters", "stock without"), ("stock adapters", "stock base"), None, ""),
        (("ours, base model", "stock, base model"), ("ours base", "stock base"), None, ""),
    ):
        record.pair(
            case.name,
            unit,
            ours=rates[names[0]],
            peer=rates[names[1]],
            sides=sides,
            target=Target(at_least=target) if target and aimed else None,
            chart=chart,
        )


def rate(engine: Worker, job: Mapping[str, Any]) -> float:
    """Tokens a second, of the prompt if the answer is one token."""
    seconds: float = engine.ask(dict(job))
    tokens: int = job["answer"] if job["answer"] > 1 else job["prompt"]
    return int(job["requests"]) * tokens / seconds


def adapters(
    folder: Path,
    shape: Shape,
    ranks: list[int],
    seed: int,
    modules: Mapping[str, tuple[int, int]] | None = None,
) -> list[str]:
    """Their folders, one for each rank."""
    return [
        str(
            adapter(
                folder / str(number),
                shape,
                seed=seed * 10_000 + number,
                rank=rank,
                modules=modules,
                dtype=torch.float32,
            )
        )
        for number, rank in enumerate(ranks)
    ]


def work(given: dict[str, Any]) -> None:
    """A worker: answers with the seconds that a job takes."""
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    flags: dict[str, Any] = {"max_num_seqs": 16} | given["flags"]
    engine = LLM(
        enable_lora=True,
        max_model_len=2304,
        max_num_batched_tokens=2304,
        enable_prefix_caching=False,
        **engine_flags(given),
        **flags,
    )
    requests = [LoRARequest(f"a{i}", i + 1, folder) for i, folder in enumerate(given["adapters"])]
    most = engine.llm_engine.model_config.get_vocab_size() - 1
    tell(None)
    for job in jobs():
        rng = np.random.default_rng(given["seed"])
        prompts: Any = [
            {"prompt_token_ids": rng.integers(min(1000, most // 2), most, job["prompt"]).tolist()}
            for _ in range(job["requests"])
        ]
        count = job["adapters"]
        chosen = [requests[i % count] if count else None for i in range(job["requests"])]
        params = SamplingParams(
            temperature=0, max_tokens=job["answer"], ignore_eos=True, detokenize=False
        )
        began = time.perf_counter()
        engine.generate(prompts, params, lora_request=chosen, use_tqdm=False)
        tell(time.perf_counter() - began)


if __name__ == "__main__":
    if given := worker_told():
        work(json.loads(given))
    else:
        alone("kept")
