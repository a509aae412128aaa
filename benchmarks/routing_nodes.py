"""The backend in front of four nodes of unequal speed, beside choosing blindly.

    r3mes-vllm bench routing-nodes [--rounds 5] [--seconds 30]

Real engines and the real backend. The nodes share the machine by turns: in each tenth of a second
one after the other runs, for 1, 1, 2 and 4 slices of it, while the others are stopped (SIGSTOP); so
each has a speed of its own, which is measured first. Requests come at random moments and are of
random length. The peers choose a node themselves, at random or in turn, and ask it directly.
"""

import asyncio
import itertools
import os
import random
import signal
import statistics
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import aiohttp
import psutil

from benchmarks.client import Answer, Asked, ask, at, session, streams
from benchmarks.harness import Plan, Record, alone, in_turn
from benchmarks.results import Target
from benchmarks.servers import Servers, registered
from benchmarks.shapes import adapter, shape_of
from benchmarks.side_by_side import on_gpu
from tests.programs import Program

SPEEDS = (1, 1, 2, 4)
SLICE_S = 0.1 / sum(SPEEDS)
SEATS, PROMPT, TOKENS, LOAD = 2, 16, 12, 0.45
"""Answers at a time of a node; tokens asked; mean tokens of an answer; of what the nodes can do.
From a half on those who choose blindly give the slow ones too much, and wait ever longer."""
BEAT_S = 5


def run(plan: Plan, record: Record) -> None:
    for_s = plan.lasts(30, 4)
    record.describe(
        "greedy, end of text ignored",
        dtype=plan.dtype,
        speeds=", ".join(map(str, SPEEDS)),
        answers_at_a_time=SEATS,
        load=LOAD,
        seconds=for_s,
        prompt_tokens=PROMPT,
        mean_answer_tokens=TOKENS,
    )
    if on_gpu():
        record.leave_out("all", "what shares a GPU has no speed of its own")
        return
    with ExitStack() as until_end:
        folder = Path(until_end.enter_context(tempfile.TemporaryDirectory()))
        legal = adapter(folder / "legal", shape_of(plan.model, plan.quick), seed=plan.seed)
        servers = Servers(plan, folder, slots=1, kept=2, rank=8, seats=SEATS)
        backend = until_end.enter_context(servers.backend())
        nodes = []
        for number in range(len(SPEEDS)):
            node = servers.node(
                *("--backend-url", backend.url),
                loras={"legal": legal},
                name=f"node-{number}",
                R3MES_HEARTBEAT_INTERVAL=str(BEAT_S),
                VLLM_CPU_KVCACHE_SPACE="1",
            )
            nodes.append(until_end.enter_context(node))
            record.say(f"node {number + 1} of {len(SPEEDS)} is there")
        servers.ready()
        registered(*nodes)
        with _by_turns(nodes):
            asyncio.run(_measured(plan, record, backend.url, [it.url for it in nodes], for_s))


@contextmanager
def _by_turns(nodes: Sequence[Program]) -> Iterator[None]:
    """Only one of them runs at a time, each for its share."""
    tops = [psutil.Process(it.process.pid) for it in nodes]
    trees = [[it.pid for it in (top, *top.children(recursive=True))] for top in tops]
    ended = threading.Event()

    def send(tree: Sequence[int], number: signal.Signals) -> None:
        for process in tree:
            with suppress(ProcessLookupError):
                os.kill(process, number)

    def share() -> None:
        while not ended.is_set():
            for tree, speed in zip(trees, SPEEDS, strict=True):
                send(tree, signal.SIGCONT)
                ended.wait(speed * SLICE_S)
                send(tree, signal.SIGSTOP)

    sharing = threading.Thread(target=share)
    try:
        for tree in trees:
            send(tree, signal.SIGSTOP)
        sharing.start()
        yield
    finally:
        ended.set()
        try:
            sharing.join()
        finally:
            for tree in trees:
                send(tree, signal.SIGCONT)


async def _measured(
    plan: Plan, record: Record, backend: str, nodes: Sequence[str], for_s: float
) -> None:
    async with session() as http:
        can: list[float] = []
        for url in [*nodes, *nodes]:  # the first time warms up
            found = await streams(
                http, url, SEATS, lambda number: Asked("legal", PROMPT, TOKENS, number), for_s / 4
            )
            can = [*can, found["tokens_per_s"]][-len(nodes) :]
        record.note(f"tokens a second of each node alone: {', '.join(f'{it:.3g}' for it in can)}")
        rate = LOAD * sum(can) / TOKENS
        record.describe(record.sampler, requests_per_s=round(rate, 2))
        for turn in range(plan.rounds + 1):
            seed = plan.seed + turn
            chance, cycle = random.Random(seed), itertools.cycle(nodes)
            choices: dict[str, Callable[[], str]] = {
                "the backend": lambda: backend,
                "random": lambda chance=chance: chance.choice(nodes),  # type: ignore[misc]
                "round robin": lambda cycle=cycle: next(cycle),  # type: ignore[misc]
            }
            found_of = {
                name: await _offered(http, choose, rate, for_s, seed)
                for name, choose in in_turn(turn, tuple(choices.items()))
            }
            for peer in ("random", "round robin") if turn else ():  # the first warms up
                _note(record, found_of["the backend"], peer, found_of[peer])


async def _offered(
    http: aiohttp.ClientSession, choose: Callable[[], str], rate: float, for_s: float, seed: int
) -> dict[str, float]:
    """Seconds until the first token and the last."""
    rng = random.Random(seed)
    loop = asyncio.get_running_loop()
    ends = loop.time() + for_s
    asking: list[asyncio.Task[Answer]] = []
    async with asyncio.TaskGroup() as tasks:
        while loop.time() < ends:
            await asyncio.sleep(rng.expovariate(rate))
            length = 1 + int(rng.expovariate(1 / (TOKENS - 0.5)))
            asked = Asked("legal", PROMPT, length, len(asking))
            asking.append(tasks.create_task(ask(http, choose(), asked)))
    answers = [it.result() for it in asking]
    if failed := [it.error for it in answers if it.error]:
        raise RuntimeError(f"{len(failed)} of {len(answers)} requests failed: {failed[0]}")
    firsts = [it.first_s for it in answers]
    wholes = [it.times[-1] - it.asked_at for it in answers]
    return {
        "first": statistics.mean(firsts),
        "first_p90": at(firsts, 0.9),
        "whole": statistics.mean(wholes),
        "whole_p90": at(wholes, 0.9),
    }


def _note(record: Record, ours: dict[str, float], peer: str, other: dict[str, float]) -> None:
    names = {
        "first": "until the first token, mean",
        "first_p90": "until the first token, p90",
        "whole": "whole answer, mean",
        "whole_p90": "whole answer, p90",
    }
    for key, name in names.items():
        record.pair(
            f"{name}, beside {peer}",
            "s",
            ours=ours[key],
            peer=other[key],
            sides=("the backend chooses", peer),
            better="lower",
            target=Target(at_most=1.0) if key.startswith("first") else None,
            chart="Four nodes of unequal speed",
        )


if __name__ == "__main__":
    alone("routing-nodes")
