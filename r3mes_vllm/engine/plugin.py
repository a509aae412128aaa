"""vLLM's `general_plugins` entry point: loaded in every process of vLLM, several times perhaps."""

from vllm.platforms import current_platform

CPU_WRAPPER = "r3mes_vllm.engine.cpu_lora.CpuPunicaWrapper"


def register() -> None:
    if current_platform.is_cpu():
        type(current_platform).get_punica_wrapper = classmethod(lambda cls: CPU_WRAPPER)
