"""Which node is chosen: the balancer alone, on a clock that stands still until it is moved."""

import asyncio
import random
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from benchmarks.routing import CASES, Simulation
from r3mes_vllm.backend.balancer import Balancer
from r3mes_vllm.backend.conversations import conversation
from r3mes_vllm.backend.known import KnownNode
from r3mes_vllm.wire import UNPROVEN
from tests.backend.stand_ins import LEGAL_CID, OTHER_CID, wallet

BEAT = datetime(2026, 1, 1, tzinfo=UTC)
OLD_S = 60.0
"""By then no node is new."""


class Monotonic:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Monotonic:
    return Monotonic()


@pytest.fixture
def balancer(clock: Monotonic) -> Balancer:
    return Balancer(random.Random(1), clock)


def node(number: int, **changed: Any) -> KnownNode:
    told: dict[str, Any] = {
        "wallet_address": wallet(number),
        "endpoint_url": f"http://node-{number}",
        "available_lora_list": ["legal"],
        "status": "active",
        "current_load": 0,
        "last_heartbeat": BEAT,
    }
    return KnownNode(**told | changed)


def nodes(count: int, balancer: Balancer, clock: Monotonic) -> list[KnownNode]:
    """Known for a while."""
    found = [node(i) for i in range(count)]
    balancer.order(found)
    clock.now += OLD_S
    return found


def firsts(balancer: Balancer, among: Sequence[KnownNode], times: int = 1000) -> Counter[int]:
    """How often each of `among` is chosen."""
    chosen = Counter(balancer.order(among)[0].wallet_address for _ in range(times))
    return Counter({i: chosen[it.wallet_address] for i, it in enumerate(among)})


def answer(
    balancer: Balancer,
    asked: KnownNode,
    clock: Monotonic,
    *,
    seconds: float = 1.0,
    size: int = 1000,
    kind: str = "",
    held_s: float = 0.0,
) -> None:
    with balancer.flight(asked) as flight:
        flight.began(kind)
        flight.passed(size, held_s)
        clock.now += seconds
        flight.finished()


def fail(balancer: Balancer, asked: KnownNode, times: int = 3) -> None:
    for _ in range(times):
        with balancer.flight(asked) as flight:
            flight.broke()


# Load and speed


def test_nodes_that_are_alike_get_alike(balancer: Balancer, clock: Monotonic) -> None:
    shares = firsts(balancer, nodes(20, balancer, clock), 4000)
    assert all(140 < share < 260 for share in shares.values())


def test_none_of_many_is_left_out(balancer: Balancer, clock: Monotonic) -> None:
    among = nodes(100, balancer, clock)
    fail(balancer, among[0])
    found = balancer.order(among)
    assert found[-1] == among[0]
    assert {it.wallet_address for it in found} == {it.wallet_address for it in among}


def test_a_node_at_work_is_avoided_until_it_is_done(balancer: Balancer, clock: Monotonic) -> None:
    among = nodes(4, balancer, clock)
    with balancer.flight(among[0]), balancer.flight(among[1]), balancer.flight(among[1]):
        shares = firsts(balancer, among)
        assert shares[0] == shares[1] == 0
        order = [it.wallet_address for it in balancer.order(among)]
        assert order[2:] == [wallet(0), wallet(1)]
    assert all(share > 150 for share in firsts(balancer, among).values())


def test_what_a_node_says_of_its_load_does_not_count(balancer: Balancer, clock: Monotonic) -> None:
    among = nodes(2, balancer, clock)
    liars = [among[0], among[1].model_copy(update={"current_load": 1.0})]
    assert all(share > 350 for share in firsts(balancer, liars).values())


def in_flight_at(balancer: Balancer, among: Sequence[KnownNode], count: int) -> list[int]:
    """Where `count` requests that don't end are."""
    with ExitStack() as stack:
        for _ in range(count):
            stack.enter_context(balancer.flight(balancer.order(among)[0]))
        return [balancer.state(it).in_flight for it in among]


def test_a_fast_node_gets_more(balancer: Balancer, clock: Monotonic) -> None:
    among = nodes(2, balancer, clock)
    for _ in range(20):
        answer(balancer, among[0], clock, seconds=1)
        answer(balancer, among[1], clock, seconds=4)
    assert balancer.state(among[0]).speed > 3 * balancer.state(among[1]).speed
    fast, slow = in_flight_at(balancer, among, 30)
    assert 1.5 <= fast / slow <= 4
    assert in_flight_at(balancer, among, 1) == [1, 0]


def test_long_answers_do_not_make_a_node_slow(balancer: Balancer, clock: Monotonic) -> None:
    among = nodes(2, balancer, clock)
    for _ in range(20):
        answer(balancer, among[0], clock, seconds=1, size=100)
        answer(balancer, among[1], clock, seconds=10, size=1000)
    assert balancer.state(among[0]).speed == pytest.approx(balancer.state(among[1]).speed, rel=0.1)


def test_answers_are_compared_with_their_kind(balancer: Balancer, clock: Monotonic) -> None:
    among = nodes(2, balancer, clock)
    for _ in range(20):
        answer(balancer, among[0], clock, seconds=0.01, size=5000, kind="embeddings")
        answer(balancer, among[1], clock, seconds=10, size=500, kind="chat")
    assert balancer.state(among[0]).speed == pytest.approx(balancer.state(among[1]).speed, rel=0.1)


def test_a_client_that_reads_slowly_does_not_make_a_node_slow(
    balancer: Balancer, clock: Monotonic
) -> None:
    among = nodes(2, balancer, clock)
    for _ in range(20):
        answer(balancer, among[0], clock, seconds=1)
        answer(balancer, among[1], clock, seconds=10, held_s=9)
    assert balancer.state(among[0]).speed == pytest.approx(balancer.state(among[1]).speed, rel=0.1)


def test_a_queue_that_this_router_made_does_not_make_a_node_slow(
    balancer: Balancer, clock: Monotonic
) -> None:
    among = nodes(2, balancer, clock)
    for _ in range(20):
        answer(balancer, among[1], clock, seconds=1)
    for _ in range(20):
        stacks = [ExitStack() for _ in range(8)]
        flights = [stack.enter_context(balancer.flight(among[0])) for stack in stacks]
        for stack, flight in zip(stacks, flights, strict=True):
            with stack:
                clock.now += 1
                flight.began()
                flight.passed(1000)
                flight.finished()
    assert balancer.state(among[0]).speed == pytest.approx(balancer.state(among[1]).speed, rel=0.2)


def test_a_node_that_answers_many_at_once_gets_many(balancer: Balancer, clock: Monotonic) -> None:
    among = nodes(2, balancer, clock)
    with ExitStack() as stack:
        for _ in range(8):
            stack.enter_context(balancer.flight(among[0])).began()
    wide, narrow = in_flight_at(balancer, among, 18)
    assert wide >= 6 * narrow
    clock.now += 6000
    wide, narrow = in_flight_at(balancer, among, 18)
    assert wide <= 2 * narrow


def test_a_slow_node_is_asked_again_after_a_time(balancer: Balancer, clock: Monotonic) -> None:
    among = nodes(2, balancer, clock)
    for _ in range(20):
        answer(balancer, among[0], clock, seconds=1)
        answer(balancer, among[1], clock, seconds=4)
    assert firsts(balancer, among)[1] == 0
    clock.now += 1200
    assert firsts(balancer, among)[1] > 350


def test_no_node_is_taken_for_ever_so_fast(balancer: Balancer, clock: Monotonic) -> None:
    among = nodes(2, balancer, clock)
    for _ in range(2000):
        answer(balancer, among[0], clock, seconds=0.0001)
        answer(balancer, among[1], clock, seconds=0.1)
    speeds = [balancer.state(it).speed for it in among]
    assert speeds[0] == 8
    _, usual = in_flight_at(balancer, among, 90)
    assert usual > 10


def test_a_full_node_is_asked_after_the_others_for_as_long_as_it_says(
    balancer: Balancer, clock: Monotonic
) -> None:
    among = nodes(2, balancer, clock)
    for _ in range(5):
        with balancer.flight(among[0]) as flight:
            flight.refused(3)
    assert firsts(balancer, among)[0] == 0
    assert "full" in (balancer.state(among[0]).reason or "")
    assert firsts(balancer, among[:1])[0] == 1000
    clock.now += 3.1
    assert firsts(balancer, among)[0] > 350
    with balancer.flight(among[0]) as flight:
        flight.refused(1e9)
    clock.now += 11
    assert firsts(balancer, among)[0] > 350


# New nodes


def test_a_new_node_gets_its_share_little_by_little(balancer: Balancer, clock: Monotonic) -> None:
    among = [*nodes(3, balancer, clock), node(3)]
    for age, least, most in ((0, 10, 45), (15, 80, 170), (29, 180, 300), (31, 190, 310)):
        begun = clock.now
        clock.now += age
        assert least < firsts(balancer, among)[3] < most
        clock.now = begun
    assert "new" in (balancer.state(among[3]).reason or "")
    assert balancer.state(among[0]).reason is None


def test_nodes_that_are_all_new_get_alike(balancer: Balancer) -> None:
    among = [node(i) for i in range(3)]
    with balancer.flight(among[0]):
        shares = firsts(balancer, among)
    assert shares[0] == 0
    assert all(share > 350 for share in (shares[1], shares[2]))


def test_a_newer_node_gets_less_than_a_new_one(balancer: Balancer, clock: Monotonic) -> None:
    among = [node(i) for i in range(2)]
    balancer.order(among)
    clock.now += 15
    among.append(node(2))
    assert 130 < firsts(balancer, among, 3000)[2] < 270  # a fifth of a third


def test_a_node_that_comes_back_is_new(balancer: Balancer, clock: Monotonic) -> None:
    among = nodes(3, balancer, clock)
    balancer.dial_failed(among[2])
    assert among[2] not in balancer.routable(among)
    clock.now += 60
    among[2] = node(2, last_heartbeat=BEAT + timedelta(seconds=60))
    assert among[2] in balancer.routable(among)
    assert 10 < firsts(balancer, among)[2] < 80


# Failures


def test_a_node_that_fails_again_and_again_is_asked_last(
    balancer: Balancer, clock: Monotonic
) -> None:
    among = nodes(3, balancer, clock)
    fail(balancer, among[0], 2)
    assert firsts(balancer, among)[0] > 200
    fail(balancer, among[0], 1)
    assert firsts(balancer, among)[0] == 0
    assert balancer.order(among)[-1] == among[0]
    state = balancer.state(among[0])
    assert state.ejected_s == pytest.approx(30)
    assert "failed" in (state.reason or "")
    clock.now += 31 + 30
    assert firsts(balancer, among)[0] > 200
    assert balancer.state(among[0]).ejected_s is None


def test_each_ejection_is_twice_as_long_up_to_a_limit(balancer: Balancer, clock: Monotonic) -> None:
    (failing,) = nodes(1, balancer, clock)
    fail(balancer, failing)
    lasted = []
    for _ in range(8):
        lasted.append(balancer.state(failing).ejected_s or 0)
        clock.now += lasted[-1] + 1
        fail(balancer, failing, 1)
    assert lasted == pytest.approx([30, 60, 120, 240, 480, 900, 900, 900])


def test_an_answer_ends_the_doubling_after_a_while(balancer: Balancer, clock: Monotonic) -> None:
    (failing,) = nodes(1, balancer, clock)
    for _ in range(3):
        fail(balancer, failing)
        clock.now += 200
    fail(balancer, failing)
    assert balancer.state(failing).ejected_s == pytest.approx(240)
    clock.now += 240
    for _ in range(40):
        answer(balancer, failing, clock)
    fail(balancer, failing)
    assert balancer.state(failing).ejected_s == pytest.approx(480)  # too soon
    clock.now += 480 + 301
    for _ in range(40):
        answer(balancer, failing, clock)
    fail(balancer, failing)
    assert balancer.state(failing).ejected_s == pytest.approx(30)


def test_one_outage_counts_once(balancer: Balancer, clock: Monotonic) -> None:
    (failing,) = nodes(1, balancer, clock)
    with ExitStack() as stack:
        flights = [stack.enter_context(balancer.flight(failing)) for _ in range(100)]
        for flight in flights[:50]:
            flight.broke()
        assert balancer.state(failing).ejected_s == pytest.approx(30)
        clock.now += 31
        for flight in flights[50:]:
            flight.broke()
        assert balancer.state(failing).ejected_s is None


def test_one_request_fails_once(balancer: Balancer, clock: Monotonic) -> None:
    (failing,) = nodes(1, balancer, clock)
    with balancer.flight(failing) as flight:
        for _ in range(5):
            flight.broke()
    assert balancer.state(failing).ejected_s is None


@pytest.mark.parametrize(("every", "ejected"), [(10, False), (2, True)])
def test_a_rare_failure_is_forgiven(
    balancer: Balancer, clock: Monotonic, every: int, ejected: bool
) -> None:
    (failing,) = nodes(1, balancer, clock)
    for i in range(100):
        if i % every:
            answer(balancer, failing, clock, seconds=0.1)
        else:
            fail(balancer, failing, 1)
    assert (balancer.state(failing).ejected_s is not None) == ejected


@pytest.mark.parametrize(("count", "left"), [(1, 1), (2, 1), (5, 3), (8, 4)])
def test_at_most_half_are_ejected(
    balancer: Balancer, clock: Monotonic, count: int, left: int
) -> None:
    among = nodes(count, balancer, clock)
    for failing in among:
        fail(balancer, failing)
        clock.now += 0.1
    shares = firsts(balancer, among)
    assert sum(share > 0 for share in shares.values()) == left
    # Those that failed longest ago are taken again.
    assert all(shares[i] for i in range(left))
    assert len(balancer.order(among)) == count


@pytest.mark.parametrize("error", [None, asyncio.CancelledError, ZeroDivisionError])
def test_what_is_not_the_nodes_fault_counts_for_nothing(
    balancer: Balancer, clock: Monotonic, error: type[BaseException] | None
) -> None:
    among = nodes(2, balancer, clock)
    answer(balancer, among[0], clock)
    before = balancer.state(among[0])

    def leave() -> None:
        with balancer.flight(among[0]) as flight:
            flight.began()
            flight.passed(1)
            if error:
                raise error

    for _ in range(100):
        with ExitStack() as stack:
            if error:
                stack.enter_context(pytest.raises(error))
            leave()
    assert balancer.state(among[0]) == before
    assert firsts(balancer, among)[0] > 350


def test_a_failed_dial_is_a_failure_too(balancer: Balancer, clock: Monotonic) -> None:
    beats = [BEAT + timedelta(seconds=30 * i) for i in range(4)]
    for beat in beats[:3]:
        failing = node(1, last_heartbeat=beat)
        assert balancer.routable([failing])
        balancer.dial_failed(failing)
        assert not balancer.routable([failing])
        assert "reached" in (balancer.state(failing).reason or "")
    back = node(1, last_heartbeat=beats[3])
    assert balancer.routable([back])
    assert balancer.state(back).ejected_s == pytest.approx(30)


# Holders and conversations


def test_only_holders_of_the_version_are_asked_and_silent_ones_last(
    balancer: Balancer, clock: Monotonic
) -> None:
    silent, stale = node(1), node(2, adapters={"legal": OTHER_CID})
    exact = [node(i, adapters={"legal": LEGAL_CID}) for i in (3, 4)]
    unproven = node(5, adapters={"legal": LEGAL_CID}, signature=UNPROVEN)
    among = [silent, stale, *exact, unproven]
    with balancer.flight(exact[0]):
        assert balancer.holders(among, "legal", LEGAL_CID) == [exact[1], exact[0], silent]
        assert balancer.holders(among, "legal", LEGAL_CID, exact=True) == exact[::-1]
    assert len(balancer.holders(among, "legal", None)) == 4
    assert balancer.holders(among, "medical", None) == []
    assert "proved" in (balancer.state(unproven).reason or "")


def home_of(balancer: Balancer, among: list[KnownNode], conversation: str) -> KnownNode:
    """The node that begins to answer it."""
    home = balancer.order(among, conversation=conversation)[0]
    with balancer.flight(home, conversation) as flight:
        flight.began()
    return home


def test_a_conversation_stays_at_its_node(balancer: Balancer, clock: Monotonic) -> None:
    among = nodes(20, balancer, clock)
    homes = {}
    for i in range(50):
        homes[f"{i}"] = home_of(balancer, among, f"{i}")
    assert len({home.wallet_address for home in homes.values()}) > 10
    for name, home in homes.items():
        for _ in range(10):
            assert balancer.order(among, conversation=name)[0] == home


def test_a_conversation_leaves_a_node_that_is_clearly_busier(
    balancer: Balancer, clock: Monotonic
) -> None:
    among = nodes(4, balancer, clock)
    home = home_of(balancer, among, "a")
    with ExitStack() as stack:
        for other in among:
            if other != home:
                stack.enter_context(balancer.flight(other))
        stack.enter_context(balancer.flight(home))
        stack.enter_context(balancer.flight(home))
        assert balancer.order(among, conversation="a")[0] == home  # 2 beside 1
        stack.enter_context(balancer.flight(home))
        other = home_of(balancer, among, "a")
        assert other != home
    assert balancer.order(among, conversation="a")[0] == other


def test_a_conversation_leaves_a_node_in_trouble(balancer: Balancer, clock: Monotonic) -> None:
    among = nodes(8, balancer, clock)
    home = home_of(balancer, among, "a")
    fail(balancer, home, 1)
    other = next(it for it in balancer.order(among, conversation="a") if it != home)
    with balancer.flight(other, "a") as flight:
        flight.began()
    assert {balancer.order(among, conversation="a")[0].wallet_address for _ in range(50)} == {
        other.wallet_address
    }


def test_a_node_that_did_not_begin_to_answer_is_no_conversations_own(
    balancer: Balancer, clock: Monotonic
) -> None:
    among = nodes(8, balancer, clock)

    def asked() -> set[str]:
        found = set()
        for _ in range(200):
            first = balancer.order(among, conversation="a")[0]
            with balancer.flight(first, "a"):
                found.add(first.wallet_address)
        return found

    assert len(asked()) == 8
    home = home_of(balancer, among, "a")
    assert asked() == {home.wallet_address}


def test_a_conversation_is_known_by_what_comes_up_to_the_first_question() -> None:
    first = {"role": "user", "content": "What is a contract?"}
    more = [first, {"role": "assistant", "content": "It is"}, {"role": "user", "content": "And?"}]
    system = {"role": "system", "content": "Be brief."}
    parts = {"role": "user", "content": [{"type": "text", "text": "What is a contract?"}, {}]}
    told = conversation("legal", {"messages": [first]})
    assert told
    for same in (
        {"messages": more},
        {"messages": [parts]},
        {"input": more},
        {"message": "What is a contract?"},
        {"message": "And?", "messages": more[:2]},
    ):
        assert conversation("legal", same) == told
    for other in ({"messages": [system, first]}, {"prompt": "What is a law?"}):
        assert conversation("legal", other) not in (told, None)
    assert conversation("medical", {"messages": [first]}) != told
    odds: list[dict[str, Any]] = [
        {},
        {"messages": 3},
        {"messages": [3]},
        {"messages": [{"role": []}]},
        {"input": []},
    ]
    for odd in odds:
        assert conversation("legal", odd) is None
    assert conversation("legal", {"prompt": "\ud800"})
    long = "word " * 1000
    assert conversation("legal", {"prompt": long + "a"}) == conversation("legal", {"prompt": long})


# Bounds


def test_what_is_kept_of_strangers_is_bounded(balancer: Balancer, clock: Monotonic) -> None:
    kept = node(0)
    with balancer.flight(kept) as flight:
        for i in range(1, 10_001):
            home_of(balancer, [node(i)], f"{i}")
        assert balancer.state(kept).in_flight == 1
        assert len(balancer._loads) <= 4097
        assert len(balancer._conversations) <= 8192
        flight.finished()
    for i in range(200):
        answer(balancer, kept, clock, kind=f"text/{i}")
    assert len(balancer._kinds) <= 64


@pytest.mark.parametrize("case", CASES[:2], ids=lambda case: case.name)
def test_waits_are_a_tenth_of_those_of_chance(case: Any) -> None:
    blind = Simulation(case, "random", 0.7, 5000, seed=1).run()
    ours = Simulation(case, "ours", 0.7, 5000, seed=1).run()
    assert ours["wait"] <= 0.1 * blind["wait"]
    assert ours["wait_p99"] < blind["wait_p99"]
