"""Where the thread that reads an adapter runs; what it reads is staging's tests' concern."""

import multiprocessing
import os
import threading
from multiprocessing.connection import Connection

import pytest
import torch

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
