"""What the node adds to bare `vllm serve`, and the backend to the node.

    r3mes-vllm bench front-cost [--rounds 5] [--seconds 20]

The same model, adapter, flags and client: streams of `/v1/completions`, each client asking again as
soon as it has its answer, of stock vLLM's own server, of the node, and of the backend that leads to
that node. One is asked while the others wait.
"""

import asyncio
import tempfile
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from benchmarks.client import Asked, session, streams
from benchmarks.harness import Plan, Record, alone, in_turn
from benchmarks.servers import Servers, registered
from benchmarks.shapes import adapter, shape_of
from benchmarks.side_by_side import SETTLES_S

STREAMS = (1, 4, 16, 64)
PROMPT, ANSWER = 32, 48
NAMES = {
    "first_p50": ("until the first token, p50", "ms"),
    "first_p99": ("until the first token, p99", "ms"),
    "gap_p50": ("between tokens, p50", "ms"),
    "gap_p99": ("between tokens, p99", "ms"),
    "tokens_per_s": ("tokens", "tokens/s"),
}


def run(plan: Plan, record: Record) -> None:
    for_s = plan.lasts(20, 2)
    record.describe(
        "greedy, end of text ignored",
        dtype=plan.dtype,
        rank=8,
        prompt_tokens=PROMPT,
        answer_tokens=ANSWER,
        seconds=for_s,
    )
    with ExitStack() as until_end:
        folder = Path(until_end.enter_context(tempfile.TemporaryDirectory()))
        shape = shape_of(plan.model, plan.quick)
        legal = adapter(folder / "legal", shape, seed=plan.seed)
        servers = Servers(plan, folder, slots=2, kept=4, rank=8)
        backend = until_end.enter_context(servers.backend())
        loras = {"legal": legal}
        stock = until_end.enter_context(servers.stock(loras=loras))
        node = until_end.enter_context(
            servers.node("--backend-url", backend.url, loras=loras, R3MES_HEARTBEAT_INTERVAL="5")
        )
        servers.ready()
        registered(node)
        urls = {"vllm serve": stock.url, "node": node.url, "backend": backend.url}
        asyncio.run(_measured(plan, record, urls, servers.name, for_s))


async def _measured(
    plan: Plan, record: Record, urls: dict[str, str], base: str, for_s: float
) -> None:
    async with session() as http:
        for model in (base, "legal"):
            sides = {it: url for it, url in urls.items() if it != "backend" or model == "legal"}
            for count in plan.pick(STREAMS, (1, 4)):
                kind = "an adapter" if model == "legal" else "the base model"
                case = f"{count} streams of {kind}"
                if not plan.wants(case):
                    continue
                for turn in range(plan.rounds + 1):
                    found = {}
                    for side, url in in_turn(turn, tuple(sides.items())):
                        await asyncio.sleep(SETTLES_S)
                        found[side] = await streams(http, url, count, partial(_asked, model), for_s)
                    if turn:  # the first warms up
                        _note(record, case, count, found)


def _asked(model: str, number: int) -> Asked:
    return Asked(model, PROMPT, ANSWER, number)


def _note(record: Record, case: str, count: int, found: dict[str, dict[str, float]]) -> None:
    for ours, peer in (("node", "vllm serve"), ("backend", "node")):
        if ours not in found:
            continue
        # where both have the same kernels: on a CPU the node has its own for adapters
        charted = ours == "backend" or "base" in case
        for key, (name, unit) in NAMES.items():
            record.pair(
                f"{case}: {name}",
                unit,
                ours=found[ours][key],
                peer=found[peer][key],
                sides=(ours, peer),
                better="higher" if key == "tokens_per_s" else "lower",
                chart=f"{name.capitalize()}, {ours} of {peer}" if charted else "",
                series=f"{ours} of {peer}",
                x=count,
                x_axis="streams",
            )


if __name__ == "__main__":
    alone("front-cost")
