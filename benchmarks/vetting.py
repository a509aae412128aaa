"""Vetting an adapter, against what sha256 alone does, on one core.

    r3mes-vllm bench vetting [--rounds 5]

The file is in the page cache; each round hashes it and vets it, for each type of number.
"""

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from benchmarks.harness import Plan, Record, alone, in_turn
from r3mes_vllm.adapters.vetting import CONFIG, WEIGHTS, vet

_RANK, _INPUTS = 64, 4096


def run(plan: Plan, record: Record) -> None:
    size = plan.pick(1 << 30, 1 << 24)
    record.describe("none: no model", bytes=size, cores_used=1)
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            _measured(plan, record, dtype, size)
    finally:
        os.sched_setaffinity(0, before)


def _measured(plan: Plan, record: Record, dtype: torch.dtype, size: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        weights = _adapter(folder, dtype, size)
        calls: dict[str, Callable[[], object]] = {
            "sha256": partial(_hash, weights),
            "vetting": partial(vet, folder),
        }
        for turn in range(plan.rounds + 1):
            took = {kind: _seconds(calls[kind]) for kind in in_turn(turn, tuple(calls))}
            if turn:  # the first warms the page cache
                record.pair(
                    str(dtype).removeprefix("torch."),
                    "GB/s",
                    ours=weights.stat().st_size / took["vetting"] / 1e9,
                    peer=weights.stat().st_size / took["sha256"] / 1e9,
                    sides=("vetting", "sha256"),
                    chart="Vetting, of what sha256 does",
                )


def _adapter(folder: Path, dtype: torch.dtype, size: int) -> Path:
    count = max(1, size // (2 * _RANK * _INPUTS * dtype.itemsize))
    random = torch.from_numpy(np.random.default_rng(0).normal(0, 0.02, (_RANK, _INPUTS)))
    tensors = {}
    for number in range(count):
        prefix = f"base_model.model.model.layers.{number}.self_attn.q_proj.lora_"
        tensors[f"{prefix}A.weight"] = random.to(dtype).clone()
        tensors[f"{prefix}B.weight"] = random.T.to(dtype).contiguous()
    save_file(tensors, folder / WEIGHTS)
    config = {"peft_type": "LORA", "r": _RANK, "lora_alpha": 64, "target_modules": ["q_proj"]}
    (folder / CONFIG).write_text(json.dumps(config))
    return folder / WEIGHTS


def _hash(path: Path) -> None:
    with path.open("rb") as file:
        while data := file.read(1 << 18):
            hashlib.sha256(data).digest()


def _seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


if __name__ == "__main__":
    alone("vetting")
