"""Whether a program gets a core, asked of Linux: two that want the same one."""

import multiprocessing
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import pytest

from r3mes_vllm.engine.cores import Cores

FOR_S = 2.0


def compute(core: int, policy: int) -> None:
    os.sched_setaffinity(0, {core})
    os.sched_setscheduler(0, policy, os.sched_param(0))
    while True:
        pass


def sleep() -> None:
    time.sleep(600)


def start(works: tuple[tuple[int, int], ...]) -> None:
    context = multiprocessing.get_context("fork")
    for work in works:
        context.Process(target=compute, args=work).start()
    sleep()


@contextmanager
def parent(*works: tuple[int, int]) -> Iterator[int | None]:
    """Of processes that compute, by core and policy."""
    program = multiprocessing.get_context("fork").Process(target=start, args=(works,))
    program.start()
    try:
        yield program.pid
    finally:
        for it in psutil.Process(program.pid).children():
            it.kill()
        program.kill()
        program.join()


def waited(*works: tuple[int, int]) -> float:
    """As a share of the time."""
    with parent(*works) as pid:
        cores = Cores(pid)
        time.sleep(0.5)
        assert cores.waited() == 0.0
        began = time.monotonic()
        seconds = 0.0
        while time.monotonic() < began + FOR_S:
            time.sleep(0.2)
            seconds += cores.waited()
        return seconds / (time.monotonic() - began)


@pytest.fixture
def core() -> int:
    return max(os.sched_getaffinity(0))


def test_beside_another_on_its_core_it_waits_and_alone_less(core: int) -> None:
    starved = waited((core, os.SCHED_OTHER), (core, os.SCHED_IDLE))
    assert starved > 0.9
    assert waited((core, os.SCHED_OTHER)) < starved


def test_who_has_started_nothing_waits_for_nothing() -> None:
    with parent() as pid:
        cores = Cores(pid)
        assert cores.waited() == cores.waited() == 0.0


def test_of_a_process_that_is_gone_nothing_is_said() -> None:
    with parent() as pid:
        cores = Cores(pid)
    assert cores.waited() == cores.waited() == 0.0
