"""What a request waits for its node, by how the router chooses one.

    r3mes-vllm bench routing [--seed 1]

The backend's own balancer on a simulated clock, beside other ways of choosing. Requests come at
random moments (Poisson); their work is of random size (exponential, with a mean of 4 s on a node of
mean speed, a fifth of it before the first byte). A node works on as many at once as it has slots
and keeps the rest waiting; where the streams of a node slow each other down, that is said.
"""

import heapq
import random
import statistics
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import Any, Protocol

from benchmarks.harness import Plan, Record, alone, in_turn
from benchmarks.results import Target
from r3mes_vllm.backend.balancer import Balancer
from r3mes_vllm.backend.flights import Flight
from r3mes_vllm.backend.known import KnownNode

MEAN_S, PREFILL = 4.0, 0.2
BYTES = 2000
"""Of a mean answer."""
TURNS, PAUSE_S = 6, 10.0
"""Of a conversation: how many, and the mean time until the next."""
BREAKS_S = 0.2
"""After which a failing node breaks off."""


@dataclass(frozen=True)
class Case:
    name: str
    speeds: Sequence[float] = (1.0,)
    """Of the nodes in turn."""
    slots: Sequence[int] = (1,)
    nodes: int = 20
    crowding: float = 0.0
    """With all slots taken a stream has 1 / (1 + this) of the speed that it has alone."""
    routers: int = 1
    conversations: bool = False
    """A turn at the node that had the one before needs no prefill, which is half of the work."""
    failing: bool = False
    """One node breaks off everything for a third of the time."""


CASES = [
    Case("alike"),
    Case("speeds 1:2:4", speeds=(1, 2, 4)),
    Case("alike, 8 slots", slots=(8,)),
    Case("1:2:4, 4 and 16 slots", speeds=(1, 2, 4), slots=(4, 16)),
    Case("1:2:4, 16 slots that crowd", speeds=(1, 2, 4), slots=(16,), crowding=3),
    Case("alike, conversations", conversations=True),
    Case("1:2:4, one fails", speeds=(1, 2, 4), failing=True),
    Case("alike, 4 routers", routers=4),
    Case("1:2:4, 4 routers", speeds=(1, 2, 4), routers=4),
]
LOADS = {"alike": (50, 70, 90), "speeds 1:2:4": (50, 70, 90)}
"""Per cent of what the nodes can do; 70 for the other cases."""


class Policy(Protocol):
    def order(
        self, nodes: Sequence[KnownNode], *, conversation: str | None = None
    ) -> list[KnownNode]: ...

    def flight(self, node: KnownNode, conversation: str | None = None) -> Flight: ...


class _Counting(Balancer):
    """The others count what is in flight by the same means."""

    def __init__(self, chance: random.Random, clock: Callable[[], float]) -> None:
        super().__init__(chance, clock)
        self.chance, self.turn = chance, 0


class Random(_Counting):
    def order(
        self, nodes: Sequence[KnownNode], *, conversation: str | None = None
    ) -> list[KnownNode]:
        return self.chance.sample(nodes, len(nodes))


class RoundRobin(_Counting):
    def order(
        self, nodes: Sequence[KnownNode], *, conversation: str | None = None
    ) -> list[KnownNode]:
        self.turn += 1
        start = self.turn % len(nodes)
        return [*nodes[start:], *nodes[:start]]


class LeastInFlight(_Counting):
    """Of all, whatever their speed."""

    def order(
        self, nodes: Sequence[KnownNode], *, conversation: str | None = None
    ) -> list[KnownNode]:
        mixed = self.chance.sample(nodes, len(nodes))
        return sorted(mixed, key=lambda node: self.state(node).in_flight)


class OfTwo(Balancer):
    """Ours, but of two choices."""

    def __init__(self, chance: random.Random, clock: Callable[[], float]) -> None:
        super().__init__(chance, clock, drawn=2)


POLICIES = {
    "random": Random,
    "round robin": RoundRobin,
    "least in flight": LeastInFlight,
    "ours, of two": OfTwo,
    "ours": Balancer,
}


@dataclass(eq=False)
class Job:
    came: float
    stages: list[float]
    """What is left to do before the first byte, and from then on, in s at speed 1."""
    conversation: str | None
    turn: int
    router: Policy
    order: list[KnownNode] = field(default_factory=list)
    stack: ExitStack = field(default_factory=ExitStack)
    flight: Flight | None = None
    size: int = 0
    wait: float = 0.0
    total: float = 0.0
    failures: int = 0


@dataclass(eq=False)
class Node:
    known: KnownNode
    speed: float
    slots: int
    crowding: float
    active: list[Job] = field(default_factory=list)
    waiting: deque[Job] = field(default_factory=deque)
    at: float = 0.0
    version: int = 0

    def rate(self) -> float:
        crowd = (len(self.active) - 1) / (self.slots - 1) if self.slots > 1 else 0
        return self.speed / (1 + self.crowding * crowd)

    def advance(self, now: float) -> None:
        done = (now - self.at) * self.rate() if self.active else 0.0
        for job in self.active:
            job.stages[0] -= done
        self.at = now

    def next_at(self) -> float | None:
        if not self.active:
            return None
        return self.at + max(min(job.stages[0] for job in self.active), 0.0) / self.rate()


class Simulation:
    def __init__(self, case: Case, policy: str, load: float, requests: int, seed: int) -> None:
        self.now = 0.0
        self.case, self.requests = case, requests
        self.chance = random.Random(seed)
        self.nodes = {node.known.wallet_address: node for node in self._nodes(case)}
        self.known = [node.known for node in self.nodes.values()]
        kind = POLICIES[policy]
        self.routers = [
            kind(random.Random(seed * 100 + i), lambda: self.now) for i in range(case.routers)
        ]
        capacity = sum(n.speed * n.slots / (1 + n.crowding) for n in self.nodes.values()) / MEAN_S
        self.pause = 1 / (load * capacity)
        self.span = requests * self.pause
        self.events: list[tuple[float, int, Callable[[], None]]] = []
        self.number = 0
        self.cached: dict[str, str] = {}
        self.done: list[Job] = []
        self.hits = self.turns = 0

    def _nodes(self, case: Case) -> list[Node]:
        mean = statistics.mean(case.speeds[i % len(case.speeds)] for i in range(case.nodes))
        return [
            Node(
                _known(i),
                case.speeds[i % len(case.speeds)] / mean,
                case.slots[i // len(case.speeds) % len(case.slots)],
                case.crowding,
            )
            for i in range(case.nodes)
        ]

    def at(self, when: float, what: Callable[[], None]) -> None:
        self.number += 1
        heapq.heappush(self.events, (when, self.number, what))

    def run(self) -> dict[str, Any]:
        came = 0.0
        per = TURNS if self.case.conversations else 1
        for i in range(self.requests // per):
            came += self.chance.expovariate(1 / (self.pause * per))
            name = f"{i:032x}" if self.case.conversations else None
            self.at(came, partial(self.comes, name, 1))
        while self.events:
            self.now, _, what = heapq.heappop(self.events)
            what()
        return self.result()

    def comes(self, conversation: str | None, turn: int) -> None:
        work = self.chance.expovariate(1 / MEAN_S)
        prefill = 0.5 if conversation else PREFILL
        job = Job(
            came=self.now,
            stages=[work * prefill, work * (1 - prefill)],
            conversation=conversation,
            turn=turn,
            router=self.chance.choice(self.routers),
        )
        job.size = int(work / MEAN_S * BYTES) + 1
        job.order = job.router.order(self.known, conversation=conversation)
        self.sends(job)

    def sends(self, job: Job) -> None:
        known = job.order.pop(0)
        job.flight = job.stack.enter_context(job.router.flight(known, job.conversation))
        if self.fails(known):
            self.at(self.now + BREAKS_S, lambda: self.breaks(job))
            return
        node = self.nodes[known.wallet_address]
        node.advance(self.now)
        node.waiting.append(job)
        self.goes_on(node)

    def fails(self, known: KnownNode) -> bool:
        third = self.span / 3
        return self.case.failing and known is self.known[-1] and third < self.now < 2 * third

    def breaks(self, job: Job) -> None:
        assert job.flight
        job.failures += 1
        job.flight.broke()
        job.stack.close()
        self.sends(job)

    def goes_on(self, node: Node) -> None:
        while node.waiting and len(node.active) < node.slots:
            job = node.waiting.popleft()
            job.wait = self.now - job.came
            if job.conversation:
                hit = self.cached.get(job.conversation) == node.known.wallet_address
                self.cached[job.conversation] = node.known.wallet_address
                self.turns += job.turn > 1
                self.hits += hit
                if hit:
                    job.stages[0] = 0.0
            node.active.append(job)
        node.version += 1
        when, version = node.next_at(), node.version
        if when is not None:
            self.at(when, lambda: self.stage_ends(node, version))

    def stage_ends(self, node: Node, version: int) -> None:
        if version != node.version:
            return
        node.advance(self.now)
        job = min(node.active, key=lambda it: it.stages[0])
        assert job.flight
        job.stages.pop(0)
        if job.stages:
            job.flight.began()
            job.flight.passed(job.size)
        else:
            node.active.remove(job)
            job.flight.finished()
            job.stack.close()
            self.done.append(job)
            job.total = self.now - job.came
            if job.conversation and job.turn < TURNS:
                later = self.now + self.chance.expovariate(1 / PAUSE_S)
                self.at(later, lambda: self.comes(job.conversation, job.turn + 1))
        self.goes_on(node)

    def result(self) -> dict[str, Any]:
        waits = sorted(job.wait for job in self.done)
        totals = sorted(job.total for job in self.done)
        return {
            "wait": statistics.mean(waits),
            "wait_p99": waits[len(waits) * 99 // 100],
            "total": statistics.mean(totals),
            "total_p99": totals[len(totals) * 99 // 100],
            "failures": sum(job.failures for job in self.done) / len(self.done),
            "hits": self.hits / self.turns if self.turns else None,
        }


def _known(number: int) -> KnownNode:
    return KnownNode(
        wallet_address=f"remes1{number:038d}",
        endpoint_url=f"http://node-{number}",
        available_lora_list=[],
        status="active",
        current_load=0,
        last_heartbeat=datetime(2026, 1, 1, tzinfo=UTC),
    )


PEERS = ("random", "round robin", "least in flight", "ours, of two")


def run(plan: Plan, record: Record) -> None:
    """A pair is of one seed: both policies get the same requests."""
    requests = plan.pick(20_000, 500)
    record.describe(
        "simulated: no model, no node, no network",
        requests=requests,
        mean_work_s=MEAN_S,
        nodes=CASES[0].nodes,
    )
    for case in plan.pick(CASES, CASES[:2]):
        if not plan.wants(case.name):
            continue
        for load in LOADS.get(case.name, (70,)):
            for turn in range(plan.rounds):
                found = {
                    policy: Simulation(case, policy, load / 100, requests, plan.seed + turn).run()
                    for policy in in_turn(turn, tuple(POLICIES))
                }
                for peer in PEERS:
                    _note(record, f"{case.name}, {load} %", found["ours"], peer, found[peer])


def _note(
    record: Record, case: str, ours: dict[str, Any], peer: str, other: dict[str, Any]
) -> None:
    at_random = peer == "random" and case.endswith("70 %")
    targets = {"wait": Target(at_most=0.1), "wait_p99": Target(at_most=1)} if at_random else {}
    names = {"wait": "mean wait", "wait_p99": "wait, p99", "total": "whole answer, mean"}
    for key, name in names.items():
        record.pair(
            f"{case}: {name}",
            "s",
            ours=ours[key],
            peer=other[key],
            sides=("ours", peer),
            better="lower",
            target=targets.get(key),
            chart=f"{name.capitalize()} at 70 % load, of random's" if at_random else "",
        )
    for key, name, wanted in (("failures", "failures", "lower"), ("hits", "cached", "higher")):
        if other[key]:
            record.pair(
                f"{case}: {name}",
                "of a request" if key == "failures" else "of later turns",
                ours=ours[key],
                peer=other[key],
                sides=("ours", peer),
                better="lower" if wanted == "lower" else "higher",
            )


if __name__ == "__main__":
    alone("routing")
