"""The short form of `make power-cut`, and what it is judged by."""

import random
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.resilience import power_cut
from tests.resilience.power_cut import Machine, cut_power, problems


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
async def test_what_was_acknowledged_is_there_and_nothing_in_part(
    tmp_path: Path, kind: str
) -> None:
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")
    with tempfile.TemporaryDirectory(prefix="r3mes-pg-") as name:
        served = Path(name) if kind == "postgresql" else None
        chance = random.Random(seed)
        found = await cut_power(tmp_path, cuts=4, nodes=0, chance=chance, served=served)
    assert problems(found, cuts=4, nodes=0) == []


GOOD = {
    **{"cuts": 9, "nodes": 1, "fetches under way": 4},
    **{"acknowledged adapters": 90, "acknowledged nodes": 90},
}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({}, ""),
        ({"cuts": 8}, "cuts: 8"),
        ({"nodes": 0}, "nodes: 0"),
        ({"acknowledged adapters": 8}, "acknowledged adapters: 8"),
        ({"acknowledged nodes": 0}, "acknowledged nodes: 0"),
        ({"fetches under way": 2}, "fetches under way: 2"),
    ],
)
def test_cuts_are_good_only_if_they_have_shown_something(
    changed: dict[str, int], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = Counter(GOOD | changed)
    assert said in " ".join(problems(found, cuts=9, nodes=1))

    async def cut(*_: object, **__: object) -> Counter[str]:
        return found

    monkeypatch.setattr(power_cut, "cut_power", cut)
    monkeypatch.setattr("sys.argv", ["power_cut", "--cuts", "9", "--nodes", "1"])
    assert power_cut.main() == int(bool(said))


class Kept:
    """A database that has what it is said to have."""

    def __init__(self, **tables: list[tuple[str, str]]) -> None:
        self._tables = tables

    def start(self) -> None:
        pass

    def pairs(self, query: str) -> list[tuple[str, str]]:
        return next(it for name, it in self._tables.items() if f"FROM {name}" in query)


VERSIONS = [("a", "1"), ("a", "2"), ("b", "1")]
LORAS = [("a", "2"), ("b", "1")]
NODES = [("w", '["a"]')]


@pytest.mark.parametrize(
    ("changed", "is_whole"),
    [
        ({}, True),
        ({"loras": [("a", "3"), ("b", "1")], "lora_versions": [*VERSIONS, ("a", "3")]}, True),
        ({"lora_versions": VERSIONS[1:]}, False),  # an early one that another followed
        ({"loras": [("a", "1"), ("b", "1")]}, False),
        ({"loras": [("a", "2")]}, False),
        ({"nodes": []}, False),
        ({"nodes": [("w", '["b"]')]}, False),
    ],
)
def test_what_was_acknowledged_and_is_not_there_is_found(
    tmp_path: Path, changed: dict[str, list[tuple[str, str]]], is_whole: bool
) -> None:
    tables = {"lora_versions": VERSIONS, "loras": LORAS, "nodes": NODES}
    database: Any = Kept(**tables | changed)
    machine = Machine(tmp_path, random.Random(1), database)
    machine.acknowledged = set(VERSIONS)
    machine.last = {"a": "2", "b": "1", "w": '["a"]'}
    machine.asked = machine.last | {"a": "3"}  # it may have been kept when the power went
    if is_whole:
        machine.check()
        return
    with pytest.raises(AssertionError):
        machine.check()
