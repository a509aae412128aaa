"""The short form of `make power-cut`."""

import random
from pathlib import Path

from tests.resilience.power_cut import cut_power


async def test_what_was_acknowledged_is_there_and_nothing_in_part(tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")
    found = await cut_power(tmp_path, cuts=4, nodes=0, chance=random.Random(seed))
    assert found["cuts"] == 4
    assert found["acknowledged"]
