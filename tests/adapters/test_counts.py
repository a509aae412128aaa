"""What the supply counts: bytes by source, seconds by phase, refusals by rule."""

from pathlib import Path

import pytest

from r3mes_vllm.adapters.store import Store
from r3mes_vllm.adapters.supply import Supply
from r3mes_vllm.adapters.vetting import CONFIG, RULE_NAMES, WEIGHTS
from r3mes_vllm.errors import AdapterRefused, BlockMismatch
from tests import tiny
from tests.peers import gateway

NOWHERE = "http://127.0.0.1:9"


def supplied(folder: Path, *gateways: str) -> tuple[Supply, list[str]]:
    supply = Supply(Store(folder), ipfs_api=NOWHERE, gateways=gateways)
    phases: list[str] = []

    def timed(phase: str, seconds: float) -> None:
        assert 0 <= seconds < 60
        phases.append(phase)

    supply.timed = timed
    return supply, phases


async def test_bytes_are_counted_where_they_came_from(tmp_path: Path) -> None:
    adapter = tiny.make_adapter(tmp_path / "mine", seed=3)
    least = (adapter / WEIGHTS).stat().st_size
    published = gateway.packed(adapter)
    async with gateway.listening(gateway.Gateway(published)) as source:
        supply, phases = supplied(tmp_path / "cache", source.name)
        await supply.obtain(published.root)
    assert phases == ["fetch", "vet"]
    assert supply.fetched_bytes()["gateway", "127.0.0.1"] >= least
    assert supply.fetched_bytes()["daemon", "127.0.0.1"] == 0
    assert supply.fetched_bytes()["car", ""] == 0


async def test_wrong_bytes_are_not_counted(tmp_path: Path) -> None:
    published = gateway.packed(tiny.make_adapter(tmp_path / "mine", seed=3))
    async with gateway.listening(gateway.Gateway(published, lie=gateway.flip)) as source:
        supply, _ = supplied(tmp_path / "cache", source.name)
        with pytest.raises(BlockMismatch):
            await supply.obtain(published.root)
    sound = sum(len(data) for _, data in published.blocks[:-1])
    assert 0 < supply.fetched_bytes()["gateway", "127.0.0.1"] <= sound


async def test_files_of_the_operators_are_cars(tmp_path: Path) -> None:
    adapter = tiny.make_adapter(tmp_path / "mine", seed=3)
    supply, phases = supplied(tmp_path / "cache")
    await supply.import_path(adapter)
    assert phases == ["fetch", "vet"]
    assert supply.fetched_bytes()["car", ""] >= (adapter / WEIGHTS).stat().st_size


async def test_refusals_are_counted_by_rule(tmp_path: Path) -> None:
    adapter = tiny.make_adapter(tmp_path / "mine", seed=3)
    (adapter / CONFIG).write_text("{}")
    supply, _ = supplied(tmp_path / "cache")
    with pytest.raises(AdapterRefused):
        await supply.import_path(adapter)
    assert supply.refusals == {"kind_is_lora": 1}
    assert supply.refusals.keys() <= RULE_NAMES
