"""Serve many LoRA adapters, fetched and verified from IPFS, on one vLLM engine."""

from importlib.metadata import version

__version__ = version("r3mes-vllm")
