"""Tokens a second with 1 to 64 adapters and 1 to 64 requests at once.

    r3mes-vllm bench grid [--rounds 5] [--only "8 adapters"] [--dtype float32]

As `kept`, over a grid: ours and stock vLLM with the same flags in processes of their own, each of
its own base model too, and PEFT and llama.cpp, which have one adapter at a time and get the
requests of each as one batch. Requests are dealt to the adapters in turn; there are no more
adapters than requests.
"""

import itertools
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from benchmarks import cpu_lora, llama_cpp_peer, peft_peer
from benchmarks.harness import Plan, Record, alone, in_turn
from benchmarks.results import Target
from benchmarks.shapes import shape_of, told
from benchmarks.side_by_side import Worker, ready

PROMPT = 32
ONE_BY_ONE = ("PEFT", "llama.cpp")


@dataclass(frozen=True)
class Grid:
    adapters: tuple[int, ...]
    at_once: tuple[int, ...]
    slots: tuple[int, ...]
    """Of engines, each for as many adapters as it has room for: a GPU's kernels start blocks for
    every slot. The last one for more, too."""
    ranks: tuple[int, ...]
    answer: int
    one_by_one: tuple[tuple[int, int], ...]
    """Adapters and requests at once, where those with one adapter at a time are asked."""


QUICK = Grid((1, 4), (4,), (2, 4), (8,), 8, ((4, 4),))
CPU = Grid((1, 2, 4, 8, 16, 64), (1, 4, 16, 64), (32,), (8,), 48, ((1, 16), (8, 16), (16, 16)))
GPU = Grid(
    (1, 2, 4, 8, 16, 64),
    (1, 4, 16, 64),
    (8, 32),
    (8, 16, 64),
    128,
    ((1, 16), (8, 16), (64, 64)),
)


def run(plan: Plan, record: Record) -> None:
    shape = shape_of(plan.model, plan.quick)
    grid = plan.pick(GPU if shape.dummy else CPU, QUICK)
    record.describe(
        cpu_lora.SAMPLER,
        dtype=plan.dtype,
        slots=", ".join(map(str, grid.slots)),
        modules="q, k, v, o",
        take_adapters="q, k, v, o" if shape.dummy else "all linear",
        prompt_tokens=PROMPT,
        answer_tokens=grid.answer,
    )
    for rank, slots in itertools.product(grid.ranks, grid.slots):
        cells = [
            (adapters, at_once)
            for at_once in grid.at_once
            for adapters in grid.adapters
            if adapters <= at_once
            and slots == next((it for it in grid.slots if adapters <= it), grid.slots[-1])
            and plan.wants(f"{adapters} adapters, {at_once} at once, rank {rank}")
        ]
        if not cells:
            continue
        with tempfile.TemporaryDirectory() as name, ExitStack() as until_end:
            folder = Path(name)
            most = max(adapters for adapters, _ in cells)
            folders = cpu_lora.adapters(folder / "adapters", shape, [rank] * most, plan.seed)
            flags: dict[str, object] = {
                "max_loras": slots,
                "max_cpu_loras": max(most, slots),
                "max_lora_rank": rank,
                "max_num_seqs": max(grid.at_once),
            }
            if shape.dummy:  # else a GPU's kernels start for modules without adapters too
                flags["lora_target_modules"] = [it.rpartition(".")[2] for it in shape.attention]
            modules = {"stock": cpu_lora, "ours": cpu_lora}
            if not set(cells).isdisjoint(grid.one_by_one):
                modules["PEFT"] = peft_peer
                if not shape.dummy and llama_cpp_peer.available():
                    modules["llama.cpp"] = llama_cpp_peer
                elif not shape.dummy:
                    record.note(llama_cpp_peer.MISSING)
            asked = told(plan, folder) | {"adapters": folders, "seed": plan.seed, "flags": flags}
            workers = {
                side: until_end.enter_context(
                    Worker(module.__name__, asked, "r3mes" if side == "ours" else "none")
                )
                for side, module in modules.items()
            }
            ready(*workers.values())
            for number, (adapters, at_once) in enumerate(cells, 1):
                record.say(f"{adapters} adapters, {at_once} at once: {number} of {len(cells)}")
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
    one_by_one = (adapters, at_once) in grid.one_by_one
    sides = [it for it in workers if it not in ONE_BY_ONE or one_by_one]
    for turn in range(plan.rounds + 1):
        found = {}
        for side in in_turn(turn, sides):
            if side not in ONE_BY_ONE:
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
        *((it, it) for it in ONE_BY_ONE),
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
