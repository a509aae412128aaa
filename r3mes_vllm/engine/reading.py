"""Reading an adapter in a thread of its own, at no cost to the thread that makes the tokens."""

import multiprocessing
import os
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from vllm.lora.lora_model import LoRAModel
from vllm.lora.request import LoRARequest

_CHUNK = 1 << 20
"""Bytes read at once."""

_NICE = 10


def read(runner: Any, request: LoRARequest) -> LoRAModel:
    """The adapter as vLLM's manager keeps it, in memory of its own; pinned where there is a GPU.

    Raises what vLLM raises of a bad adapter. To be called in a thread that does nothing else.
    """
    _step_back(runner.device)
    _into_page_cache(Path(request.lora_path) / "adapter_model.safetensors")
    model: LoRAModel = runner.lora_manager._load_adapter(request)
    runner.lora_manager._adapter_manager._create_merged_loras_inplace(model)
    _copy_from_file(model)
    return model


def _step_back(device: torch.device) -> None:
    """Let this thread have what the engine's leave: other cores, or else what is left of theirs."""
    if others := _other_cores():
        os.sched_setaffinity(0, others)
    else:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
    # of this thread alone; vLLM puts a warning in place of `torch.set_num_threads`
    torch._C.set_num_threads(1)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # pinning is done for the current device, each thread's own


def _other_cores() -> set[int]:
    """Where vLLM has bound this worker to the cores that it computes on: the rest of those that the
    process has which started it."""
    if multiprocessing.parent_process() is None:
        return set()
    with suppress(OSError):
        return os.sched_getaffinity(os.getppid()) - os.sched_getaffinity(0)
    return set()


def _into_page_cache(file: Path) -> None:
    """Wait for the disk here: a page fault in safetensors' own code would hold the interpreter."""
    with suppress(OSError), file.open("rb", buffering=0) as opened:  # vLLM tells it better
        chunk = bytearray(_CHUNK)
        while opened.readinto(chunk):
            pass


def _copy_from_file(model: LoRAModel) -> None:
    """Tensors that needed no cast are still parts of the mapped file: they could fault later."""
    for weights in model.loras.values():
        for side in ("lora_a", "lora_b"):
            parts = getattr(weights, side)
            if isinstance(parts, list):
                setattr(weights, side, [_own(part) for part in parts])
            else:
                setattr(weights, side, _own(parts))


def _own(tensor: torch.Tensor | None) -> torch.Tensor | None:
    if tensor is None or tensor.untyped_storage().nbytes() == tensor.nbytes:
        return tensor
    return tensor.clone()
