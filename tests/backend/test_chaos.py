"""The short forms of `make chaos`."""

import random
from pathlib import Path

import pytest

from tests.backend.chaos import chaos
from tests.backend.killing import kill_nodes


@pytest.fixture
def seed() -> int:
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")
    return seed


async def test_what_looks_complete_is(tmp_path: Path, seed: int) -> None:
    for number in range(6):  # on a busy machine few answers begin at all
        folder = tmp_path / str(number)
        folder.mkdir()
        found = await chaos(folder, seconds=10, seed=seed + number, clients=10, nodes=8)
        if found["moved"]:
            return
    raise AssertionError(f"nothing moved: {dict(found)}")


async def test_killed_nodes_are_not_noticed(tmp_path: Path, seed: int) -> None:
    found = await kill_nodes(tmp_path, kills=2, seed=seed)
    assert found["moved"]
