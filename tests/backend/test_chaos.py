"""The short forms of `make chaos`, and what they are judged by."""

import random
import time
from collections import Counter
from pathlib import Path

import httpx
import pytest

from tests.backend import chaos, killing
from tests.backend.chaos import not_whole, words
from tests.backend.conftest import MakeDatabase
from tests.backend.killing import STREAMS, kill_nodes
from tests.backend.oracle import (
    MOST,
    MOST_NODES,
    NO_OTHER,
    NOT_IN_TIME,
    SHOWN,
    STOOD_STILL,
    Asking,
    Flight,
    Found,
    Lags,
    Told,
    cause,
)
from tests.backend.stand_ins import LEGAL_CID, OTHER_CID

ON_BOTH = True


@pytest.fixture
def seed() -> int:
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")
    return seed


async def test_what_looks_complete_is(make_database: MakeDatabase, seed: int) -> None:
    for number in range(6):  # on a busy machine few answers begin at all
        found = await chaos.chaos(
            make_database(), seconds=10, seed=seed + number, clients=20, nodes=8
        )
        assert not found.violations(), dict(found.counts)
        if not (unshown := found.unshown()):
            return
    raise AssertionError(f"{unshown}: {dict(found.counts)}")


async def test_killed_nodes_are_not_noticed(tmp_path: Path, seed: int) -> None:
    found = await kill_nodes(tmp_path, kills=2, seed=seed)
    assert killing.problems(found, 2) == []


GOOD = {what: 3 for what in SHOWN} | {"whole": 100, "routed": 120}


@pytest.mark.parametrize(
    ("counts", "said"),
    [
        ({}, ""),
        *(({what: 0}, f"no {what}") for what in GOOD),
        ({"routed": 99}, "more answers than requests"),
        ({f"broken: node_failed: {NO_OTHER}": 2}, ""),
        ({f"refused: 500 of a node: {NOT_IN_TIME}": 2}, ""),
        ({"broken: node_failed: another holder was not asked": 1}, "another holder was not asked"),
        ({"refused: 503 no_node: a node answers": 1}, "a node answers"),
        ({f"broken: plain text: {NO_OTHER}": 1}, ""),
        ({f"broken: adapter_not_ready: {NO_OTHER}": 1}, "adapter_not_ready"),
        ({f"broken: ReadError at 200, and no event says so: {NO_OTHER}": 1}, "no event says so"),
        ({f"broken: ReadError at 200, and no event says so: {STOOD_STILL}": 1}, ""),
        ({f"broken: plain text: {STOOD_STILL}": 2}, "too busy"),
    ],
)
def test_a_run_is_good_only_if_it_has_shown_something(counts: dict[str, int], said: str) -> None:
    problems = Found(Counter(GOOD | counts)).problems()
    assert bool(problems) == bool(said)
    assert said in " ".join(problems)


def test_a_run_with_a_wrong_answer_or_with_too_few_is_not_good() -> None:
    wrong = Found(Counter(GOOD), ["q1 of a was answered by b"])
    assert wrong.problems() == ["1 wrong: q1 of a was answered by b"]
    assert Found(Counter(GOOD)).problems(answers=100) == []
    assert "of 101 asked for" in Found(Counter(GOOD)).problems(answers=101)[0]


@pytest.mark.parametrize("shown", [True, False])
def test_its_status_says_so(
    shown: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def found(*_: object, **__: object) -> Found:
        return Found(Counter(GOOD if shown else {}))

    monkeypatch.setattr(chaos, "chaos", found)
    monkeypatch.setattr("sys.argv", ["chaos", "--seed", "7"])
    assert chaos.main() == (0 if shown else 1)
    said = capsys.readouterr()
    assert "seed 7" in said.err
    assert f"{120 if shown else 0} routed, 0 wrong" in said.out


def flights(*fates: str) -> list[Flight]:
    return [Flight(number, fate) for number, fate in enumerate(fates)]


@pytest.mark.parametrize(
    ("fates", "holders", "found"),
    [
        (["dies", "is silent"], [0, 1], NO_OTHER),
        (["dies"], [0, 1], "another holder was not asked"),
        ([], [0], "another holder was not asked"),
        (["dies", "answers"], [0, 1], "a node answers"),
        (["has said all"], [0], "a node has said all"),
        (["refuses"] * MOST_NODES, range(MOST_NODES + 1), MOST),
    ],
)
def test_why_there_is_no_answer(fates: list[str], holders: list[int], found: str) -> None:
    asking = Asking(LEGAL_CID, flights=flights(*fates))
    assert cause(asking, holders, silence_s=1, patience_s=5) == found


def test_an_answer_may_come_too_late() -> None:
    long_ago = time.monotonic() - 6
    asking = Asking(LEGAL_CID, long_ago, [Flight(0, "dies", long_ago)])
    assert cause(asking, [0, 1], silence_s=1, patience_s=5) == NOT_IN_TIME
    asking.flights[0].moved_at = time.monotonic()
    assert cause(asking, [0, 1], silence_s=1, patience_s=5) == "another holder was not asked"
    assert cause(asking, [0, 1], silence_s=1, patience_s=5, lag_s=0.6) == STOOD_STILL


def test_a_node_that_says_nothing_for_long_is_silent_and_stays_so() -> None:
    flight = Flight(0, moved_at=time.monotonic() - 2)
    assert flight.fate_now(3) == "answers"
    flight.says_all(1)
    assert flight.fate == "is silent"


def test_only_lags_since_then_count() -> None:
    lags = Lags([(10.0, 3.0), (20.0, 0.5)])
    assert [lags.longest(since) for since in (5, 15, 25)] == [3.0, 0.5, 0.0]


def test_what_a_node_told_is_known_when_it_is_taken() -> None:
    told, before = Told(), time.monotonic()
    first = told.tells(LEGAL_CID)
    assert not told.holds(LEGAL_CID, before)
    told.taken(first)
    since = time.monotonic()
    assert told.possible(since) == {LEGAL_CID}
    assert told.holds(LEGAL_CID, since)
    assert not told.holds(LEGAL_CID, before)
    second = told.tells(OTHER_CID)
    assert told.possible(since) == {LEGAL_CID, OTHER_CID}
    assert not told.holds(LEGAL_CID, since)
    told.taken(second)
    assert told.possible(since) == {LEGAL_CID, OTHER_CID}  # chosen before it was told
    assert told.possible(time.monotonic()) == {OTHER_CID}
    late = Told(lag_s=60)
    late.taken(late.tells(LEGAL_CID))
    late.taken(late.tells(OTHER_CID))
    assert late.possible(time.monotonic()) == {LEGAL_CID, OTHER_CID}


def events(*said: str, end: str = "data: [DONE]\n\n") -> bytes:
    delta = 'data: {{"choices": [{{"delta": {{"content": "{}"}}}}]}}\n\n'
    return ("".join(map(delta.format, said)) + end).encode()


def test_what_is_not_whole_is_found() -> None:
    said, headers = words(LEGAL_CID, "q1"), httpx.Headers({"x-r3mes-cid": LEGAL_CID})

    def wrong(body: bytes, cid: str = LEGAL_CID, *, of_events: bool = True) -> str:
        return not_whole("q1", cid, headers, body, events=of_events)

    assert not wrong(events(*said))
    assert not wrong("".join(said).encode(), of_events=False)
    assert "answered by" in wrong(events(*said), OTHER_CID)
    assert "without its end" in wrong(events(*said, end=""))
    assert "answered with" in wrong(events(*said, "more"))
    assert "answered with" in wrong(events(*said[1:]))
    assert "answered with" in wrong("".join(said[:-1]).encode(), of_events=False)


KILLED = {
    "answers": 2 * 3 * STREAMS,
    **{"killed before a token": 12, "killed in mid-stream": 12, "moved": 12},
    **{"alone: killed in mid-stream": 24, "alone: errors": 23, "alone: whole": 1},
}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({}, ""),
        ({"answers": 47}, "47 answers, of 48"),
        ({"moved": 0}, "moved: 0 answers in 3 kills"),
        ({"killed before a token": 2}, "killed before a token: 2"),
        ({"killed in mid-stream": 0}, "killed in mid-stream: 0"),
        ({"alone: killed in mid-stream": 0, "alone: errors": 0, "alone: whole": 0}, "alone: err"),
        ({"alone: errors": 22}, "not all that a lone node had"),
        ({"alone: errors": 12, "alone: whole": 12}, "too many"),
    ],
)
def test_kills_are_good_only_if_they_have_shown_something(
    changed: dict[str, int], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = Counter(KILLED | changed)
    problems = killing.problems(found, 3)
    assert bool(problems) == bool(said)
    assert said in " ".join(problems)

    async def kill(*_: object, **__: object) -> Counter[str]:
        return found

    monkeypatch.setattr(killing, "kill_nodes", kill)
    monkeypatch.setattr("sys.argv", ["killing", "--kills", "3"])
    assert killing.main() == int(bool(said))
