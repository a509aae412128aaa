"""How much room the engine makes for adapters, from the adapters and from the memory that is free.

A slot takes memory for the largest rank in every layer, whether it is used or not, and on a GPU it
is taken from the KV cache; on a CPU also for what is laid out of its adapters. Adapters beside the
slots take main memory when they come, in each of vLLM's worker processes: of a matrix that several
workers share, each keeps the whole.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import psutil
import torch
from vllm.config.lora import MaxLoRARanks
from vllm.platforms import current_platform
from vllm.utils.import_utils import import_pynvml

from r3mes_vllm.adapters.model_shape import ModelShape
from r3mes_vllm.engine.cpu_packs import MIXED_PACKS, computed_in
from r3mes_vllm.errors import ConfigError
from r3mes_vllm.settings import parse_bytes

_RANKS: tuple[int, ...] = get_args(MaxLoRARanks)
_DEFAULT_RANK = 16
_MOST_SLOTS = 32
_MOST_KEPT = 1024
_VALUE = 2
"""Bytes of a weight on the engine, in bf16 or fp16."""
_OF_GPU = 0.2
"""Of a GPU's free memory at most, for slots: the rest is weights and KV cache."""
_OF_RAM = 0.5
"""Of what is free in main memory, for adapters; half of that for slots where there is no GPU."""


@dataclass(frozen=True)
class Workers:
    """vLLM's processes on this machine that keep adapters, and how many whole models they are."""

    count: int = 1
    replicas: int = 1


ONE = Workers()


@dataclass(frozen=True)
class Memory:
    """Free bytes: main memory, without what the model and the KV cache will take of it, and of the
    GPU with the least; None where vLLM runs on the CPU."""

    ram: int
    gpu: int | None

    @classmethod
    def now(cls, model: str, workers: Workers = ONE) -> "Memory":
        """`model` is a hub name or a directory; a hub's may not be here yet."""
        ram = psutil.virtual_memory().available
        if current_platform.is_cpu():
            kv_cache = parse_bytes(f"{os.environ.get('VLLM_CPU_KVCACHE_SPACE', '4')}G")
            weights = sum(file.stat().st_size for file in Path(model).glob("*.safetensors"))
            taken = kv_cache * workers.count + weights * workers.replicas
            return cls(max(ram - taken, 0), None)
        return cls(ram, min(_gpus_free(), default=0))


@dataclass(frozen=True)
class Sizes:
    max_loras: int
    """Slots: adapters that one step can serve."""
    max_cpu_loras: int
    """Adapters kept in main memory, those in slots included."""
    max_lora_rank: int
    arithmetic: str
    """For people."""

    @classmethod
    def of(
        cls,
        adapters: Sequence[tuple[int, int]],
        base: ModelShape,
        memory: Memory,
        workers: Workers = ONE,
        *,
        max_loras: int | None = None,
        max_rank: int | None = None,
    ) -> "Sizes":
        """For `adapters` of these ranks and bytes, and others like them; what the operator chose
        wins. Raises ConfigError for what vLLM does not serve or what can't fit."""
        rank = _served_rank(max_rank or max((rank for rank, _ in adapters), default=_DEFAULT_RANK))
        kept_each = _bytes_of(base, rank, adapters)
        each = kept_each
        if memory.gpu is None:
            each *= (1 + laid_out()) * workers.replicas
        total = memory.ram if memory.gpu is None else memory.gpu
        share = _OF_RAM / 2 if memory.gpu is None else _OF_GPU
        if max_loras and max_loras * each > total:
            raise ConfigError(
                f"--max-loras {max_loras} of rank {rank} take {_size(max_loras * each)}, "
                f"and {_size(total)} are free",
                hint=f"pass --max-loras {max(int(total * share / each), 1)} or less",
            )
        fitting = max(int(total * share / each), 1)
        slots = max_loras or min(len(adapters) + 1, _MOST_SLOTS, fitting)
        kept = max(slots, min(_MOST_KEPT, int(memory.ram * _OF_RAM / (kept_each * workers.count))))
        where = "main memory" if memory.gpu is None else "the GPU"
        keeping = f", by each of {workers.count} workers" if workers.count > 1 else ""
        return cls(
            slots,
            kept,
            rank,
            f"{slots} adapter slots of rank {rank} take {slots} x {_size(each)} of "
            f"{_size(total)} free in {where}; up to {kept} adapters are kept in main memory"
            f"{keeping}",
        )


def laid_out() -> int:
    """How often a slot's bytes, at most, are laid out for a CPU to multiply with: of its adapter
    and of one that left it, and its part of each mixed pack."""
    wide = 2 if computed_in(torch.bfloat16) is torch.float32 else 1
    return (2 + MIXED_PACKS) * wide


def _served_rank(wanted: int) -> int:
    fitting = [rank for rank in _RANKS if rank >= wanted]
    if not fitting:
        raise ConfigError(
            f"rank {wanted} is over what vLLM serves ({_RANKS[-1]})",
            hint=f"pass --max-lora-rank {_RANKS[-1]} or less",
        )
    return fitting[0]


def _bytes_of(base: ModelShape, rank: int, adapters: Sequence[tuple[int, int]]) -> int:
    """One slot: vLLM makes one in every linear layer, also where an adapter changes nothing."""
    if base.modules is not None:
        return sum(inputs + outputs for inputs, outputs in base.modules.values()) * rank * _VALUE
    known = [size * rank // of_rank for of_rank, size in adapters]
    return max(known, default=rank << 20)


def _gpus_free() -> list[int]:
    """Of those that vLLM may use, from the driver: this process must not begin work on them."""
    pynvml = import_pynvml()
    pynvml.nvmlInit()
    try:
        numbers = range(current_platform.device_count())
        physical = [current_platform.device_id_to_physical_device_id(it) for it in numbers]
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in physical]
        return [int(pynvml.nvmlDeviceGetMemoryInfo(handle).free) for handle in handles]
    finally:
        pynvml.nvmlShutdown()


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
