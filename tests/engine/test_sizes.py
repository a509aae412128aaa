"""Room for adapters, from the adapters and the memory."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from vllm.platforms import current_platform

from r3mes_vllm.adapters.model_shape import ModelShape
from r3mes_vllm.engine import launch
from r3mes_vllm.engine import sizes as sizing
from r3mes_vllm.engine.sizes import Memory, Sizes, Workers, laid_out
from r3mes_vllm.errors import ConfigError

BASE = ModelShape("base", {f"layer.{number}": (500, 524) for number in range(64)})
RANK_8 = 64 * 1024 * 8 * 2  # bytes of a slot: 1 MiB
PLENTY = Memory(ram=64 << 30, gpu=None)


@pytest.fixture(autouse=True)
def with_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizing, "computed_in", lambda dtype: dtype)


def test_room_for_the_adapters_and_one_more() -> None:
    sizes = Sizes.of([(8, 1000), (4, 1000)], BASE, PLENTY)
    assert (sizes.max_loras, sizes.max_lora_rank) == (3, 8)
    assert sizes.max_cpu_loras == 1024
    assert "3 x 6 MiB of 64.0 GiB free in main memory" in sizes.arithmetic


def test_hundreds_of_adapters_share_the_slots_that_fit() -> None:
    many = [(8, 1000)] * 500
    assert Sizes.of(many, BASE, PLENTY).max_loras == 32
    small = Sizes.of(many, BASE, Memory(ram=240 * RANK_8, gpu=None))
    assert (small.max_loras, small.max_cpu_loras) == (10, 120)


def test_a_cpu_without_bf16_lays_out_twice_as_much(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizing, "computed_in", lambda dtype: torch.float32)
    assert laid_out() == 10
    small = Sizes.of([(8, 1000)] * 500, BASE, Memory(ram=240 * RANK_8, gpu=None))
    assert small.max_loras == 5


def test_slots_are_taken_from_the_gpu_where_there_is_one() -> None:
    sizes = Sizes.of([(8, 1000)] * 500, BASE, Memory(ram=1 << 40, gpu=50 * RANK_8))
    assert sizes.max_loras == 10
    assert "in the GPU" in sizes.arithmetic


def test_each_worker_keeps_all_adapters_and_each_replica_has_the_slots() -> None:
    many, ram = [(8, 1000)] * 500, 240 * RANK_8
    parts = Sizes.of(many, BASE, Memory(ram, gpu=None), Workers(4))
    assert (parts.max_loras, parts.max_cpu_loras) == (10, 30)
    assert parts.arithmetic.endswith(
        "up to 30 adapters are kept in main memory, by each of 4 workers"
    )
    copies = Sizes.of(many, BASE, Memory(ram, gpu=None), Workers(2, 2))
    assert (copies.max_loras, copies.max_cpu_loras) == (5, 60)
    gpus = Sizes.of(many, BASE, Memory(ram, gpu=50 * RANK_8), Workers(8, 4))
    assert (gpus.max_loras, gpus.max_cpu_loras) == (10, 15)


@pytest.mark.parametrize(
    ("options", "workers"),
    [
        ("", Workers()),
        ("--tensor-parallel-size 4 -pp=2", Workers(8)),
        ("-tp 2 --data-parallel-size 3", Workers(6, 3)),
        ("--data-parallel-size 8 --data-parallel-size-local 2", Workers(2, 2)),
        ("--data-parallel-size 8 --data-parallel-rank 3", Workers()),
        ("-tp 16 --nnodes 2", Workers(8)),
        ("-tp 2 -dp 4 --nnodes 2", Workers(4, 2)),
        ("-tp 8 -dp 2 --nnodes 4", Workers(4)),
    ],
)
def test_workers_are_those_that_vllm_starts_here(options: str, workers: Workers) -> None:
    assert launch.workers(options.split()) == workers


def test_what_the_operator_chose_wins_if_it_can_be_had() -> None:
    sizes = Sizes.of([(8, 1000)], BASE, PLENTY, max_loras=7, max_rank=20)
    assert (sizes.max_loras, sizes.max_lora_rank) == (7, 32)
    with pytest.raises(ConfigError, match="--max-loras 100") as refused:
        Sizes.of([(8, 1000)], BASE, Memory(ram=240 * RANK_8, gpu=None), max_loras=100)
    assert refused.value.hint == "pass --max-loras 10 or less"
    with pytest.raises(ConfigError, match="1000"):
        Sizes.of([], BASE, PLENTY, max_rank=1000)


def test_of_a_base_model_that_is_not_known_the_adapters_tell() -> None:
    sizes = Sizes.of([(8, 1 << 20)], ModelShape("other", None), PLENTY, max_rank=16)
    assert "2 x 12 MiB" in sizes.arithmetic


def test_without_memory_there_is_one_slot() -> None:
    sizes = Sizes.of([(8, 1000)] * 3, BASE, Memory(ram=0, gpu=None))
    assert (sizes.max_loras, sizes.max_cpu_loras) == (1, 1)


def test_now_knows_this_machine() -> None:
    assert Memory.now("/nowhere").ram > 0


def test_each_worker_has_a_kv_cache_and_each_replica_the_weights(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "model.safetensors").write_bytes(bytes(1 << 20))
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    free = SimpleNamespace(available=10 << 30)
    monkeypatch.setattr("psutil.virtual_memory", lambda: free)
    monkeypatch.setattr(current_platform, "is_cpu", lambda: True)
    found = Memory.now(str(tmp_path), Workers(4, 2))
    assert found == Memory((6 << 30) - (2 << 20), None)
