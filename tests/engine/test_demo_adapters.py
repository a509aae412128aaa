"""The adapters that come with the package are what `adapters.toml` says and what train.py makes."""

import json
from pathlib import Path

import pytest
from safetensors import safe_open

from r3mes_vllm.adapters import shipped
from r3mes_vllm.adapters.vetting import CONFIG, WEIGHTS, vet
from r3mes_vllm.ipfs.car import root_of
from r3mes_vllm.ipfs.cid import CID
from r3mes_vllm.ipfs.fetch import fetch
from r3mes_vllm.ipfs.pack import pack
from r3mes_vllm.ipfs.sources import CarSource
from r3mes_vllm.settings import EMBEDDED_MODEL

TARGETS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
LAYERS = 30

ADAPTERS = pytest.mark.parametrize("adapter", shipped.adapters(), ids=lambda it: it.name)


async def unpack(adapter: shipped.Shipped, tmp_path: Path) -> Path:
    cid = CID.parse(adapter.cid)
    return await fetch(cid, tmp_path / "fetch", sources=[CarSource(adapter.car)])


def test_the_demo_has_both() -> None:
    assert [it.name for it in shipped.adapters()] == ["legal", "medical"]
    assert all(it.category and it.description for it in shipped.adapters())


@ADAPTERS
async def test_the_car_holds_the_listed_cid(adapter: shipped.Shipped, tmp_path: Path) -> None:
    files = await unpack(adapter, tmp_path)
    assert sorted(path.name for path in files.iterdir()) == [CONFIG, WEIGHTS]
    assert str(root_of(adapter.car)) == adapter.cid
    assert str(pack(files, again := tmp_path / "again.car")) == adapter.cid
    assert again.read_bytes() == adapter.car.read_bytes()


@ADAPTERS
async def test_the_weights_are_small_and_pass_every_rule(
    adapter: shipped.Shipped, tmp_path: Path
) -> None:
    files = await unpack(adapter, tmp_path)
    facts = vet(files)
    assert (facts.rank, facts.alpha, facts.modules) == (8, 16, LAYERS * len(TARGETS))
    assert facts.base_model == f"HuggingFaceTB/{EMBEDDED_MODEL}"
    assert facts.size < 5_000_000
    with safe_open(files / WEIGHTS, "pt") as weights:
        tensors = {name: weights.get_tensor(name) for name in weights.keys()}  # noqa: SIM118
    assert {str(tensor.dtype) for tensor in tensors.values()} == {"torch.bfloat16"}
    assert all(tensor.isfinite().all() and tensor.any() for tensor in tensors.values())
    assert {name.split(".")[-3] for name in tensors} == TARGETS


@ADAPTERS
async def test_the_configuration_tells_nothing_of_where_it_was_trained(
    adapter: shipped.Shipped, tmp_path: Path
) -> None:
    text = (await unpack(adapter, tmp_path) / CONFIG).read_text()
    config = json.loads(text)
    assert list(config) == sorted(config)
    assert set(config["target_modules"]) == TARGETS
    for part in (str(Path.home()), "/work", "/tmp", "/home"):
        assert part not in text
