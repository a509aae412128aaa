"""What vLLM reads from the environment; to be set before anything of vLLM is imported."""

import os
import warnings


def prepare(*, local_model: bool, verbose: bool) -> None:
    """Set what vLLM needs and the operator did not set. vLLM's worker processes inherit it."""
    ours = {
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "2",  # GiB; by default vLLM takes most of the memory
        # Seconds, longer than clients keep an idle connection (httpx 5): who closes last breaks no
        # request.
        "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "75",
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
    for name, value in ours.items():
        os.environ.setdefault(name, value)
    # vLLM mounts an endpoint plugin only if it is named here.
    plugins = os.environ.get("VLLM_PLUGINS", "").split(",")
    os.environ["VLLM_PLUGINS"] = ",".join(filter(None, dict.fromkeys([*plugins, "r3mes"])))
