"""vLLM's `general_plugins` entry point: loaded in every process of vLLM, several times perhaps."""

import os
from typing import Any

from vllm.config import ParallelConfig, SchedulerConfig
from vllm.platforms import current_platform

CPU_WRAPPER = "r3mes_vllm.engine.cpu_lora.CpuPunicaWrapper"
WORKER_EXTENSION = "r3mes_vllm.engine.staging.StagingExtension"

_stock_scheduler = SchedulerConfig.get_scheduler_cls
_stock_parallel = ParallelConfig.__post_init__


def register() -> None:
    if current_platform.is_cpu():
        type(current_platform).get_punica_wrapper = classmethod(lambda cls: CPU_WRAPPER)
    SchedulerConfig.get_scheduler_cls = _fair_scheduler
    ParallelConfig.__post_init__ = _with_staging
    os.environ.setdefault("VLLM_COMPUTE_NANS_IN_LOGITS", "1")  # of every token, for the canary


def _fair_scheduler(self: SchedulerConfig) -> type[Any]:
    """In place of vLLM's own; one that the operator names stays as it is."""
    stock: type[Any] = _stock_scheduler(self)
    if self.scheduler_cls is not None:
        return stock
    from r3mes_vllm.engine.scheduler import FairAsyncScheduler, FairScheduler

    return FairAsyncScheduler if self.async_scheduling else FairScheduler


def _with_staging(self: ParallelConfig) -> None:
    """Workers stage adapters, unless the operator names another extension for them."""
    self.worker_extension_cls = self.worker_extension_cls or WORKER_EXTENSION
    _stock_parallel(self)
