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
    await chaos(tmp_path, seconds=10, seed=seed, clients=10, nodes=8)


async def test_killed_nodes_are_not_noticed(tmp_path: Path, seed: int) -> None:
    found = await kill_nodes(tmp_path, kills=2, seed=seed)
    assert found["moved"]
