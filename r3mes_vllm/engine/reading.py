"""Reading an adapter in a thread of its own, at no cost to the thread that makes the tokens."""

import multiprocessing
import os
import threading
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from vllm.exceptions import LoRAAdapterNotFoundError
from vllm.lora import lora_model
from vllm.lora.lora_model import LoRAModel
from vllm.lora.request import LoRARequest

from r3mes_vllm.adapters.files import CONFIG, WEIGHTS, read_header
from r3mes_vllm.engine import fitting
from r3mes_vllm.errors import AdapterNotReady

_CHUNK = 1 << 20
"""Bytes read at once."""

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

_NICE = 10


def read(runner: Any, request: LoRARequest) -> LoRAModel:
    """The adapter as vLLM's manager keeps it, in memory of its own; pinned where there is a GPU.

    Raises what vLLM raises of a bad adapter, ValueError where it is not of this model's layers, and
    AdapterNotReady where its files are not: it was vetted, so they are elsewhere. To be called in a
    thread that does nothing else.
    """
    _step_back(runner.device)
    folder = Path(request.lora_path)
    try:
        for name in (CONFIG, WEIGHTS):
            (folder / name).stat()  # vLLM would ask the hub, or say that it has no tensors
        model: LoRAModel = runner.lora_manager._load_adapter(request)
    except (FileNotFoundError, LoRAAdapterNotFoundError) as error:
        raise AdapterNotReady(
            f"a worker finds no whole adapter in {folder}; --cache-dir must be on storage that the "
            "machines of all workers share"
        ) from error
    manager = runner.lora_manager._adapter_manager
    manager._create_merged_loras_inplace(model)
    fitting.check(manager, model)
    return model


class Weights:
    """What vLLM uses of `safetensors.safe_open`.

    That one loses two integers with every tensor (0.8.0), which is megabytes an hour where adapters
    come and go, and it maps the file: a page that has to come from the disk holds the interpreter,
    and with it the thread that makes the tokens.
    """

    def __init__(self, path: str, framework: str) -> None:
        self._path = Path(path)
        self._tensors, _ = read_header(self._path)

    def __enter__(self) -> "Weights":
        self._file = self._path.open("rb", buffering=0)
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def keys(self) -> Iterable[str]:
        return self._tensors.keys()

    def get_tensor(self, name: str) -> torch.Tensor:
        it = self._tensors[name]
        tensor = torch.empty(it.shape, dtype=_DTYPES[it.dtype])
        into = memoryview(tensor.view(-1).view(torch.uint8).numpy().data)
        self._file.seek(it.start)
        while into:
            count = self._file.readinto(into[:_CHUNK])
            if not count:
                raise OSError(f"{self._path} ends early")
            into = into[count:]
        return tensor


lora_model.safetensors = SimpleNamespace(safe_open=Weights)


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
