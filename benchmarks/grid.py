"""Tokens a second with 1 to 64 adapters and 1 to 64 requests at once.

    r3mes-vllm bench grid [--rounds 5] [--only "8 adapters"] [--dtype float32]

As `kept`, over a grid: ours and stock vLLM with the same flags in processes of their own, each of
its own base model too, and PEFT, which has one adapter at a time and gets the requests of each as
one batch. Requests are dealt to the adapters in turn; with fewer requests than adapters only as
many adapters have one.
"""

import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from benchmarks import cpu_lora, peft_peer
from benchmarks.harness import Plan, Record, alone, in_turn
from benchmarks.results import Target
from benchmarks.shapes import shape_of, told
from benchmarks.side_by_side import Worker

PROMPT = 32


@dataclass(frozen=True)
class Grid:
    adapters: tuple[int, ...]
    at_once: tuple[int, ...]
    slots: int
    ranks: tuple[int, ...]
    answer: int
    peft: tuple[tuple[int, int], ...]
    """Adapters and requests at once; it takes too long for all."""


QUICK = Grid((1, 4), (4,), 4, (8,), 8, ((4, 4),))
CPU = Grid((1, 2, 4, 8, 16, 64), (1, 4, 16, 64), 32, (8,), 48, ((1, 16), (8, 16), (64, 64)))
GPU = Grid((1, 2, 4, 8, 16, 64), (1, 4, 16, 64), 32, (8, 16, 64), 128, ((1, 16), (8, 16), (64, 64)))


def run(plan: Plan, record: Record) -> None:
    shape = shape_of(plan.model, plan.quick)
    grid = plan.pick(GPU if shape.dummy else CPU, QUICK)
    record.describe(
        cpu_lora.SAMPLER,
        dtype=plan.dtype,
        slots=grid.slots,
        modules="q, k, v, o",
        prompt_tokens=PROMPT,
        answer_tokens=grid.answer,
    )
    for rank in grid.ranks:
        cells = [
            (adapters, at_once)
            for at_once in grid.at_once
            for adapters in grid.adapters
            if plan.only in f"{adapters} adapters, {at_once} at once, rank {rank}"
        ]
        if not cells:
            continue
        with tempfile.TemporaryDirectory() as name, ExitStack() as until_end:
            folder = Path(name)
            most = max(adapters for adapters, _ in cells)
            folders = cpu_lora.adapters(folder / "adapters", shape, [rank] * most, plan.seed)
            flags = {
                "max_loras": grid.slots,
                "max_cpu_loras": max(most, grid.slots),
                "max_lora_rank": rank,
                "max_num_seqs": max(grid.at_once),
            }
            peft = not set(cells).isdisjoint(grid.peft)
            asked = told(plan, folder) | {"adapters": folders, "seed": plan.seed, "flags": flags}
            asked["engines"] = 3 if peft else 2
            workers = {
                "stock": until_end.enter_context(Worker(cpu_lora.__name__, asked, "none")),
                "ours": until_end.enter_context(Worker(cpu_lora.__name__, asked, "r3mes")),
            }
            if peft:
                workers["PEFT"] = until_end.enter_context(Worker(peft_peer.__name__, asked, "none"))
            for adapters, at_once in cells:
                _cell(plan, record, grid, workers, rank, adapters, at_once)


def _cell(
    plan: Plan,
    record: Record,
    grid: Grid,
    workers: dict[str, Worker],
    rank: int,
    adapters: int,
    at_once: int,
) -> None:
    job = {"requests": at_once, "prompt": PROMPT, "answer": grid.answer, "adapters": adapters}
    sides = [it for it in workers if it != "PEFT" or (adapters, at_once) in grid.peft]
    for turn in range(plan.rounds + 1):
        found = {}
        for side in in_turn(turn, sides):
            if side != "PEFT":
                found[f"{side} base"] = cpu_lora.rate(workers[side], job | {"adapters": 0})
            found[side] = cpu_lora.rate(workers[side], job)
        if turn:  # the first warms up
            _note(record, plan, rank, adapters, at_once, found)


def _note(
    record: Record, plan: Plan, rank: int, adapters: int, at_once: int, found: dict[str, float]
) -> None:
    aimed = plan.model.startswith("llama") and (rank, adapters, at_once) == (16, 8, 64)
    for peer, name in (
        ("ours base", "our base model"),
        ("stock", "stock vLLM"),
        ("PEFT", "PEFT"),
    ):
        if peer not in found:
            continue
        record.pair(
            f"{adapters} adapters of rank {rank}, {at_once} at once",
            "tokens/s",
            ours=found["ours"],
            peer=found[peer],
            sides=("ours", name),
            target=Target(at_least=0.92) if aimed and peer == "ours base" else None,
            chart=f"Tokens a second, of {name}'s, rank {rank}",
            series=f"{at_once} at once",
            x=adapters,
            x_axis="adapters",
        )
    record.pair(
        f"{adapters} adapters of rank {rank}, {at_once} at once",
        "tokens/s",
        ours=found["stock"],
        peer=found["stock base"],
        sides=("stock vLLM", "its base model"),
        chart=f"Stock vLLM's tokens a second, of its base model's, rank {rank}",
        series=f"{at_once} at once",
        x=adapters,
        x_axis="adapters",
    )


if __name__ == "__main__":
    alone("grid")
