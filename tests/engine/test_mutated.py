"""Adapters damaged and forged at random; `make mutations` gives the accepted ones to the engine."""

import random
from collections import Counter
from pathlib import Path

import pytest

from r3mes_vllm.adapters.model_shape import ModelShape
from tests import tiny
from tests.engine.mutated import MUTATIONS, is_bad, judged, mutated


class Takes:
    """An engine that takes all, and a reference that takes nothing."""

    def __init__(self, found: dict[int, object] | None) -> None:
        self._found = found

    def logprobs(self, *_: object) -> dict[int, object] | None:
        return self._found


def test_each_gets_a_verdict_whatever_was_done_to_it(tmp_path: Path) -> None:
    base = ModelShape(tiny.NAME, tiny.modules())
    verdicts, slowest, kinds = Counter[str](), 0.0, set()
    for number in range(300):
        kind, files = mutated(random.Random(number))
        folder = tmp_path / str(number)
        folder.mkdir()
        for name, data in files.items():
            (folder / name).write_bytes(data)
        verdict, took = judged(folder, number, Takes({}), Takes(None), base)  # type: ignore[arg-type]
        verdicts[verdict] += 1
        kinds.add(kind)
        slowest = max(slowest, took)
    assert set(verdicts) == {"refused", "accepted, and PEFT refuses it"}, verdicts
    assert min(verdicts.values()) > 30
    assert kinds > set(MUTATIONS)
    assert slowest < 2


@pytest.mark.parametrize(
    ("counted", "bad"),
    [
        ({"refused": 60, "accepted": 40}, False),
        ({"refused": 60, "accepted": 39, "wrong": 1}, True),
        ({"refused": 60, "accepted": 30}, True),
        ({"refused": 96, "accepted": 4}, True),
        ({"refused": 4, "accepted": 96}, True),
        ({}, True),
    ],
)
def test_what_ends_badly(counted: dict[str, int], bad: bool) -> None:
    assert is_bad(Counter(counted), 100) is bad
