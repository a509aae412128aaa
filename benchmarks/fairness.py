"""What a cold adapter's request waits beside a hot one's traffic, and what that costs in all.

    r3mes-vllm bench fairness [--rounds 5] [--seconds 30] [--dtype float32]

One slot: a hot adapter always has twice as many requests as there are seats, a cold one is asked
one question every few seconds. Three processes with the same flags work in turn: stock vLLM, ours,
and ours without turns, which has our kernel and vLLM's order; ratios are of a pair. Where the
request of a figure never began, ours counts as one that waited for the whole measurement, and the
peer has none.
"""

import json
import math
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.client import at
from benchmarks.cpu_lora import SAMPLER, adapters
from benchmarks.harness import Plan, Record, alone, in_turn, worker_told
from benchmarks.results import Target
from benchmarks.shapes import engine_flags, shape_of, told
from benchmarks.side_by_side import Worker, jobs, ready, tell

SEATS, PROMPT, ANSWER, COLD_ANSWER = 16, 32, 64, 24
"""Requests at once; tokens."""
LEAST_S = 5.0
"""That a cold request has to begin in."""
OURS, TURNLESS, STOCK = "our schedule", "vLLM's schedule", "stock vLLM"


def run(plan: Plan, record: Record) -> None:
    seconds = plan.lasts(30, 4)
    every = min(5.0, seconds / 4)
    record.describe(
        SAMPLER,
        dtype=plan.dtype,
        rank=8,
        slots=1,
        seats=SEATS,
        seconds=seconds,
        cold_request_every_s=every,
    )
    with tempfile.TemporaryDirectory() as name:
        shape = shape_of(plan.model, plan.quick)
        folders = adapters(Path(name) / "adapters", shape, [8, 8], plan.seed)
        asked = told(plan, Path(name)) | {"adapters": folders}
        with (
            Worker(__name__, asked, "none") as stock,
            Worker(__name__, asked, "r3mes", R3MES_ADAPTER_CYCLE="0") as turnless,
            Worker(__name__, asked, "r3mes") as ours,
        ):
            ready(ours, turnless, stock)
            sides = [(STOCK, stock), (TURNLESS, turnless), (OURS, ours)]
            for turn in range(plan.rounds):
                found = {
                    kind: engine.ask({"every": every, "seconds": seconds})
                    for kind, engine in in_turn(turn, sides)
                }
                if found[OURS]["never"]:
                    record.note(f"{found[OURS]['never']} cold requests never began with {OURS}")
                for peer in (TURNLESS, STOCK):
                    _note(record, peer, found[OURS], found[peer])


def _note(record: Record, peer: str, ours: dict[str, Any], found: dict[str, Any]) -> None:
    chart, sides = f"A hot and a cold adapter in one slot, beside {peer}", (OURS, peer)
    record.pair(
        "cold request waits, median",
        "s",
        ours=_waited(ours, 0.5) or ours["seconds"],
        peer=_waited(found, 0.5),
        sides=sides,
        better="lower",
        target=Target(of="ours", at_most=2.0),
        chart=chart,
    )
    record.pair(
        "cold request waits, longest",
        "s",
        ours=_waited(ours, 1.0) or ours["seconds"],
        peer=_waited(found, 1.0),
        sides=sides,
        better="lower",
        chart=chart,
    )
    record.pair(
        "cold requests that never began",
        "of all",
        ours=_never(ours),
        peer=_never(found),
        sides=sides,
        better="lower",
        target=Target(of="ours", at_most=0.0),
    )
    record.pair(
        "all tokens",
        "tokens/s",
        ours=ours["tokens_per_s"],
        peer=found["tokens_per_s"],
        sides=sides,
        target=Target(at_least=0.9),
        chart=chart,
    )


def _waited(found: dict[str, Any], part: float) -> float | None:
    """Seconds that `part` of the cold requests do not exceed; None if that one never began."""
    waits = [*found["waits"], *([math.inf] * found["never"])]
    waited = at(waits, part)
    return None if math.isinf(waited) else waited


def _never(found: dict[str, Any]) -> float:
    return float(found["never"] / (len(found["waits"]) + found["never"]))


def _work(given: dict[str, Any]) -> None:
    """Answers with what a measurement found."""
    from vllm import EngineArgs, LLMEngine, SamplingParams
    from vllm.lora.request import LoRARequest

    engine = LLMEngine.from_engine_args(
        EngineArgs(
            enable_lora=True,
            max_loras=1,
            max_cpu_loras=2,
            max_lora_rank=8,
            max_model_len=1024,
            max_num_seqs=SEATS,
            **engine_flags(given),
        )
    )
    hot, cold = (LoRARequest(f"a{i}", i, it) for i, it in enumerate(given["adapters"], 1))
    most = min(31_000, engine.model_config.get_vocab_size() - 1)
    least = min(1000, most // 2)
    asked = 0

    def ask(name: str, adapter: LoRARequest, answer: int) -> None:
        nonlocal asked
        asked += 1
        tokens = [least + (asked * 37 + i) % (most - least) for i in range(PROMPT)]
        prompt: Any = {"prompt_token_ids": tokens}
        params = SamplingParams(temperature=0, max_tokens=answer, ignore_eos=True, detokenize=False)
        engine.add_request(name, prompt, params, lora_request=adapter)

    def measured(every: float, seconds: float) -> dict[str, Any]:
        began, count, number = time.monotonic(), 0, 0
        seen: dict[str, int] = {}
        asked_at: dict[str, float] = {}
        waits: dict[str, float] = {}
        while (now := time.monotonic()) < began + seconds:
            while sum(name.startswith("hot") for name in seen) < 2 * SEATS:
                number += 1
                seen[name := f"hot-{number}"] = 0
                ask(name, hot, ANSWER + 7 * (number % 9))  # not all to end at once
            late = now > began + seconds - min(LEAST_S, seconds / 3)
            if not late and now - began > every * (len(asked_at) + 0.5):
                asked_at[name := f"cold-{len(asked_at)}"] = now
                seen[name] = 0
                ask(name, cold, COLD_ANSWER)
            for output in engine.step():
                name, length = output.request_id, len(output.outputs[0].token_ids)
                count += length - seen[name]
                seen[name] = length
                if name in asked_at and length:
                    waits.setdefault(name, time.monotonic() - asked_at[name])
                if output.finished:
                    del seen[name]
        ended = time.monotonic()
        engine.abort_request(list(seen))
        while engine.has_unfinished_requests():
            engine.step()
        return {
            "waits": [*waits.values()],
            "never": len(asked_at) - len(waits),
            "seconds": ended - began,
            "tokens_per_s": count / (ended - began),
        }

    measured(1, 5)
    tell(None)
    for job in jobs():
        tell(measured(**job))


if __name__ == "__main__":
    if given := worker_told():
        _work(json.loads(given))
    else:
        alone("fairness")
