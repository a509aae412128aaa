"""Vetting an adapter, against what sha256 alone does, on one core.

    python -m benchmarks.vetting [--size 1G] [--rounds 5] [--json]

The file is in the page cache; each round hashes it and vets it, for each type of number.
"""

import argparse
import hashlib
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from r3mes_vllm.adapters.vetting import CONFIG, WEIGHTS, vet
from r3mes_vllm.settings import parse_bytes

_RANK, _INPUTS = 64, 4096


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=parse_bytes, default=1 << 30)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    os.sched_setaffinity(0, {0})
    found = {
        str(dtype).removeprefix("torch."): measure(dtype, options.size, options.rounds)
        for dtype in (torch.float32, torch.float16, torch.bfloat16)
    }
    if options.json:
        print(json.dumps(found, indent=1))
        return
    for name, it in found.items():
        print(
            f"{name}: {it['bytes_per_s'] / 1e9:.2f} GB/s, {it['ratio']:.2f} "
            f"({it['lowest']:.2f} to {it['highest']:.2f}) of sha256"
        )


def measure(dtype: torch.dtype, size: int, rounds: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        weights = _adapter(folder, dtype, size)
        ratios, speeds = [], []
        for turn in range(rounds + 1):
            alone = _seconds(lambda: _hash(weights))
            vetting = _seconds(lambda: vet(folder))
            if turn:
                ratios.append(alone / vetting)
                speeds.append(weights.stat().st_size / vetting)
    return {
        "bytes_per_s": statistics.median(speeds),
        "ratio": statistics.median(ratios),
        "lowest": min(ratios),
        "highest": max(ratios),
    }


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
    main()
