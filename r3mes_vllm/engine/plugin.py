"""vLLM's `general_plugins` entry point: loaded in every process of vLLM, several times perhaps."""

import ctypes
import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
import zmq
from vllm.config import LoRAConfig, ParallelConfig, SchedulerConfig
from vllm.distributed.device_communicators import shm_broadcast
from vllm.platforms import current_platform

from r3mes_vllm import discretion, report
from r3mes_vllm.engine import gpu_lora, grammars, row_counts

CPU_WRAPPER = "r3mes_vllm.engine.cpu_lora.CpuPunicaWrapper"
WORKER_EXTENSION = "r3mes_vllm.engine.staging.StagingExtension"

_WATCH, _WATCH_S = "r3mes-parent", 1.0
_TRIM, _TRIM_S = "r3mes-trim", 60.0

_stock_read = shm_broadcast.SpinCondition.record_read
_stock_scheduler = SchedulerConfig.get_scheduler_cls
_stock_parallel = ParallelConfig.__post_init__
_stock_verify = LoRAConfig.verify_with_model_config


def register() -> None:
    discretion.keep()
    logging.getLogger("vllm.v1.structured_output").addFilter(_is_no_mistake)
    if current_platform.is_cpu():
        type(current_platform).get_punica_wrapper = classmethod(lambda cls: CPU_WRAPPER)
        row_counts.bound()
        torch.cpu._init_amx()  # Linux kills who uses these tiles unasked, as vLLM's attention does
        shm_broadcast.sched_yield = _leave_the_core
    elif current_platform.is_cuda_alike():
        from r3mes_vllm.engine import sampling  # the sampler's kernels need Triton

        sampling.bound()
        if current_platform.is_cuda():
            gpu_lora.bound()
    shm_broadcast.SpinCondition.record_read = _read
    grammars.bound()
    SchedulerConfig.get_scheduler_cls = _fair_scheduler
    ParallelConfig.__post_init__ = _with_staging
    LoRAConfig.verify_with_model_config = _never_specialized
    if multiprocessing.parent_process():
        # Ctrl-C reaches the whole group: vLLM's workers would end under their requests.
        with suppress(PermissionError):
            os.setpgid(0, 0)
        _end_with_parent()
        if current_platform.is_cpu():
            _give_back_what_is_free()
    os.environ.setdefault("VLLM_COMPUTE_NANS_IN_LOGITS", "1")  # of every token, for the canary


def _leave_the_core() -> None:
    """Between two looks for a message, in place of `sched_yield`.

    vLLM looks for a second after each message. Who only yields while alone on a core is, on Linux
    6.18, put off for many seconds once another engine computes there: longer than the canary waits.
    """
    time.sleep(1e-6)


def _read(self: shm_broadcast.SpinCondition) -> None:
    """A message was read: look at its notice too.

    Until its reader looks, libzmq keeps 64 bytes for each notice; a reader that is never idle for a
    second does not, and its process grows by 4 MiB an hour at 18 steps a second.
    """
    _stock_read(self)
    self.local_notify_socket.getsockopt(zmq.EVENTS)


def _end_with_parent() -> None:
    """One that was killed says nothing, and vLLM's engine would wait for it for ever, with all its
    memory."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_WATCH_S)
        os.kill(os.getpid(), signal.SIGKILL)

    _run_beside(_WATCH, watch)


def _give_back_what_is_free() -> None:
    """Batches and adapters of all sizes come and go in the engine's heap. The free room between
    them, which glibc keeps, is a hundred MB from the start on, and grows for hours."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "malloc_trim"):
        return

    def trim() -> None:
        while True:
            time.sleep(_TRIM_S)
            libc.malloc_trim(0)

    _run_beside(_TRIM, trim)


def _run_beside(name: str, work: Callable[[], None]) -> None:
    """On a thread of that name, unless it is there: a plugin may be loaded several times."""
    if all(it.name != name for it in threading.enumerate()):
        threading.Thread(target=work, name=name, daemon=True).start()


def _is_no_mistake(record: logging.LogRecord) -> bool:
    """A grammar that can't be compiled is told to the client that sent it."""
    return not str(record.msg).startswith("Failed to compile grammar")


def _fair_scheduler(self: SchedulerConfig) -> type[Any]:
    """In place of vLLM's own; one that the operator names stays as it is."""
    stock: type[Any] = _stock_scheduler(self)
    if self.scheduler_cls is not None:
        return stock
    from r3mes_vllm.engine.scheduler import FairAsyncScheduler, FairScheduler

    return FairAsyncScheduler if self.async_scheduling else FairScheduler


def _never_specialized(self: LoRAConfig, *arguments: Any) -> None:
    """One graph for any number of adapters.

    With `specialize_active_lora` vLLM captures graphs for 1, 2, 4, 8... adapters and chooses one by
    the adapters of a batch; its kernels count the base model as one more. Eight adapters beside it
    get the graph of eight, and the last one's requests are answered by the base model.
    """
    if self.specialize_active_lora:
        self.specialize_active_lora = False
        report.warn(  # which vLLM's log, at the node's level, would not show
            "--specialize-active-lora is left out: beside requests to the base model it answers "
            "those of an adapter without it"
        )
    _stock_verify(self, *arguments)


def _with_staging(self: ParallelConfig) -> None:
    """Workers stage adapters, unless the operator names another extension for them."""
    self.worker_extension_cls = self.worker_extension_cls or WORKER_EXTENSION
    _stock_parallel(self)
