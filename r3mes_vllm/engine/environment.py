"""What vLLM reads from the environment; to be set before anything of vLLM is imported."""

import os
import shutil
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path


def prepare(*, local_model: bool, verbose: bool) -> None:
    """Set what vLLM needs and the operator did not set. vLLM's worker processes inherit it."""
    ours = {
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "2",  # GiB; by default vLLM takes most of the memory
        # Seconds, longer than clients keep an idle connection (httpx 5): who closes last breaks no
        # request.
        "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "75",
        # Compiled products, of up to half a MB each: oneDNN's for the numbers of rows in
        # `row_counts`, and those that torch keeps beside it. By default it is 1,024 of both.
        "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "640",
        "LRU_CACHE_CAPACITY": "128",
    }
    if not verbose:
        # vLLM and torch warn of a dozen things at each start that an operator can't change.
        ours |= {
            "VLLM_LOGGING_LEVEL": "ERROR",
            "TORCH_CPP_LOG_LEVEL": "ERROR",
            "TORCH_LOGS": "-torch._library.triton",
            "PYTHONWARNINGS": "ignore",
        }
        warnings.simplefilter("ignore")
    if local_model:
        ours["HF_HUB_OFFLINE"] = "1"
    os.environ |= of_kernels(os.environ)
    for name, value in ours.items():
        os.environ.setdefault(name, value)
    # vLLM mounts an endpoint plugin only if it is named here.
    plugins = os.environ.get("VLLM_PLUGINS", "").split(",")
    os.environ["VLLM_PLUGINS"] = ",".join(filter(None, dict.fromkeys([*plugins, "r3mes"])))


def of_kernels(given: Mapping[str, str]) -> dict[str, str]:
    """`given`, in which FlashInfer finds what compiles its kernels, or is left out.

    `ninja`, which it calls by its name, comes with the packages: an environment that is not
    activated lacks it. vLLM takes FlashInfer's sampler on every CUDA device, and that is compiled
    when it is first used: without nvcc no engine would start. vLLM's own is Triton's to compile.
    """
    path = given.get("PATH", os.defpath).split(os.pathsep)
    folder = str(Path(sys.executable).parent)
    found = {**given, "PATH": os.pathsep.join([*([] if folder in path else [folder]), *path])}
    if not _has_nvcc(given):
        found.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
    return found


def _has_nvcc(given: Mapping[str, str]) -> bool:
    """Where FlashInfer looks for it, as `vllm.utils.flashinfer` has it."""
    home = given.get("CUDA_HOME") or given.get("CUDA_PATH")
    if not home and shutil.which("nvcc", path=given.get("PATH")):
        return True
    return shutil.which(Path(home or "/usr/local/cuda", "bin", "nvcc")) is not None
