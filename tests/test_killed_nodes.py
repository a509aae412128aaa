"""The short form of `python -m tests.killed_nodes`: the clients of killed nodes don't notice."""

import dataclasses
from collections import Counter
from pathlib import Path

import psutil
import pytest

from tests import killed_nodes
from tests.killed_nodes import (
    BEGUN,
    TOKENS,
    Pair,
    Stream,
    asked,
    assert_whole,
    busy,
    certain,
    judged_alone,
    kill,
)


async def test_nobody_notices_a_killed_node_while_there_is_another(tmp_path: Path) -> None:
    async with Pair(tmp_path) as pair:
        expected = await certain(pair.backend)

        async with asked(pair.backend) as streams:
            processes = kill(pair.nodes.pop(await busy(streams)))
        _, alive = psutil.wait_procs(processes, timeout=15)
        assert not alive
        assert sum(it.moved for it in streams) >= 4
        assert_whole(streams, expected)

        async with asked(pair.backend) as streams:
            kill(pair.nodes.pop(await busy(streams)))
        assert judged_alone(streams, expected)["alone: errors"] >= BEGUN


GOOD = {"answers": 96, "moved": 20, "compared": 90, "alone: answers": 72, "alone: errors": 30}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({}, ""),
        ({"answers": 95}, "answers: 95, of 96"),
        ({"moved": 1}, "1 answers moved in 2 kills"),
        ({"compared": 48}, "only 48 answers"),
        ({"alone: answers": 0}, "alone: answers: 0"),
        ({"alone: errors": 2}, "2 answers of a lone node"),
    ],
)
def test_a_run_is_good_only_if_it_has_shown_something(
    changed: dict[str, int], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = Counter(GOOD | changed)
    problems = killed_nodes.problems(found, kills=2, alone=3)
    assert bool(problems) == bool(said)
    assert said in " ".join(problems)

    async def kill_nodes(*_: object, **__: object) -> Counter[str]:
        return found

    monkeypatch.setattr(killed_nodes, "kill_nodes", kill_nodes)
    monkeypatch.setattr("sys.argv", ["killed_nodes", "--kills", "2"])
    assert killed_nodes.main() == int(bool(said))


def stream(**changed: object) -> Stream:
    broke = Stream("q", said="a part", first="w", said_why="node_failed")
    return dataclasses.replace(broke, **changed)  # type: ignore[arg-type]


WHOLE = {"ended": True, "said": "all of it", "tokens": TOKENS, "said_why": ""}


def test_what_a_lone_node_leaves_is_an_error_or_whole() -> None:
    found = judged_alone([stream(), stream(**WHOLE), stream(said="", said_why="")], {})
    assert found == {"alone: answers": 3, "alone: errors": 1}
    for bad in (
        *({"ended": True}, {"said_why": ""}, {"tokens": TOKENS}, {"moved": True}),
        WHOLE | {"said": "something else"},
        WHOLE | {"tokens": TOKENS - 1},
    ):
        with pytest.raises(AssertionError):
            judged_alone([stream(**bad)], {"q": "all of it"})
