"""Reading an adapter's file, and where the thread runs that does."""

import gc
import multiprocessing
import os
import threading
import tracemalloc
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from r3mes_vllm.engine import reading


def _worker(cores: set[int], answer: Connection) -> None:
    """As vLLM's: bound to some cores, in a process of its own."""
    os.sched_setaffinity(0, cores)

    def read() -> None:
        reading._step_back(torch.device("cpu"))
        nice = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
        answer.send((os.sched_getaffinity(0), nice))

    thread = threading.Thread(target=read)
    thread.start()
    thread.join()
    answer.send(os.sched_getaffinity(0))


def read_in_a_worker(cores: set[int]) -> tuple[set[int], int]:
    spawning = multiprocessing.get_context("spawn")
    mine, its = spawning.Pipe()
    process = spawning.Process(target=_worker, args=(cores, its))
    process.start()
    where, nice = mine.recv()
    assert mine.recv() == cores, "the thread that computes stays where it is"
    process.join()
    return where, nice


def test_it_leaves_the_cores_that_compute_to_them() -> None:
    cores = os.sched_getaffinity(0)
    if len(cores) == 1:
        pytest.skip("one core")
    bound = {min(cores)}
    assert read_in_a_worker(bound) == (cores - bound, os.nice(0))


def test_where_there_are_no_others_it_steps_back() -> None:
    cores = os.sched_getaffinity(0)
    assert read_in_a_worker(cores) == (cores, reading._NICE)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    tensors = {f"bf16.{number}": torch.randn(64, 8).bfloat16() for number in range(200)}
    tensors |= {
        "fp32": torch.randn(3, 5),
        "fp16": torch.randn(700_000).half(),  # more than is read at once
        "none": torch.empty(0, 4),
        "one": torch.tensor(1.5),
    }
    save_file(tensors, path := tmp_path / "adapter_model.safetensors")
    return path


def read(kind: Any, file: Path) -> dict[str, torch.Tensor]:
    with kind(str(file), framework="pt") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118


def test_it_reads_what_safetensors_reads(file: Path) -> None:
    ours, theirs = read(reading.Weights, file), read(safe_open, file)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert (ours[name].dtype, ours[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(ours[name], tensor)


def lost(kind: Any, file: Path) -> float:
    """Bytes that reading a tensor once more leaves behind."""
    times = 10
    tensors = len(read(kind, file))
    gc.collect()
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    for _ in range(times):
        read(kind, file)
    gc.collect()
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return (after - before) / times / tensors


def test_reading_leaves_nothing_behind(file: Path) -> None:
    assert lost(reading.Weights, file) < 5
    assert lost(safe_open, file) > 20, "safetensors is mended: reading.Weights may go"


def test_a_file_that_became_shorter_is_an_error(file: Path) -> None:
    with reading.Weights(str(file), framework="pt") as opened:
        os.truncate(file, 1000)
        with pytest.raises(OSError, match="ends early"):
            opened.get_tensor("fp16")
