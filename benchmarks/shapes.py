"""Base models and adapters that are made on the spot: nothing is downloaded.

`smol` is SmolLM2-135M-Instruct, out of a Python package. The weights of the large Llama shapes are
random and made by vLLM itself (`load_format="dummy"`): as fast as any, and they say nothing.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from benchmarks.harness import Plan
from benchmarks.side_by_side import base_model, on_gpu

KV_GIB = 12
"""Of an engine on a GPU: room for 96,000 tokens of 8B. Said outright, so that engines that share it
need not measure what is free while others start."""
OF_GPU = 0.4
"""What must be free of a GPU's memory when an engine starts."""
LONGEST = 8192
"""Tokens of a prompt and its answer."""


@dataclass(frozen=True)
class Shape:
    name: str
    hidden: int
    inner: int
    layers: int
    heads: int
    value_heads: int
    head: int
    vocabulary: int
    dummy: bool = False
    """Without a file of weights."""
    tied: bool = True

    @property
    def attention(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of each."""
        queries, values = self.heads * self.head, self.value_heads * self.head
        return {
            "self_attn.q_proj": (self.hidden, queries),
            "self_attn.k_proj": (self.hidden, values),
            "self_attn.v_proj": (self.hidden, values),
            "self_attn.o_proj": (queries, self.hidden),
        }

    @property
    def linear(self) -> dict[str, tuple[int, int]]:
        return self.attention | {
            "mlp.gate_proj": (self.hidden, self.inner),
            "mlp.up_proj": (self.hidden, self.inner),
            "mlp.down_proj": (self.inner, self.hidden),
        }


SHAPES = {
    it.name: it
    for it in (
        Shape("tiny", 128, 256, 2, 4, 2, 32, 258),
        Shape("smol", 576, 1536, 30, 9, 3, 64, 49152),
        Shape("llama-1b", 2048, 8192, 16, 32, 8, 64, 128256, dummy=True),
        Shape("llama-8b", 4096, 14336, 32, 32, 8, 128, 128256, dummy=True, tied=False),
    )
}
SMALL = Shape("llama-small", 256, 512, 2, 4, 2, 64, 1024, dummy=True)
"""What stands for the large ones where a run is quick."""


def shape_of(model: str, quick: bool) -> Shape:
    if not quick:
        return SHAPES[model]
    return SMALL if SHAPES[model].dummy else SHAPES["tiny"]


def made(shape: Shape, folder: Path) -> Path:
    """The model's directory."""
    from tests import tiny

    if shape.name == "smol":
        return Path(base_model())
    path = folder / shape.name
    if path.is_dir():
        return path
    tiny.make_model(path)
    if shape.dummy:
        (path / "model.safetensors").unlink()
        (path / "config.json").write_text(json.dumps(_config(shape)))
    return path


def _config(shape: Shape) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.inner,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.value_heads,
        "head_dim": shape.head,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "max_position_embeddings": LONGEST,
        "tie_word_embeddings": shape.tied,
        "torch_dtype": "bfloat16",
        "bos_token_id": 0,
        "eos_token_id": 1,
    }


def adapter(
    folder: Path,
    shape: Shape,
    *,
    seed: int,
    rank: int = 8,
    modules: Mapping[str, tuple[int, int]] | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Path:
    """A random adapter, of q, k, v and o where nothing else is said; another for each seed.

    All values are of one block of random ones, turned by a random offset: making them takes no
    longer than writing them.
    """
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    modules = shape.attention if modules is None else modules
    largest = max(max(pair) for pair in modules.values()) * rank
    block = torch.from_numpy(rng.standard_normal(2 * largest + 1, dtype=np.float32) * 0.02)
    block = block.to(dtype)
    tensors = {}
    for layer in range(shape.layers):
        for module, (inputs, outputs) in modules.items():
            prefix = f"base_model.model.model.layers.{layer}.{module}.lora_"
            for part, size in (("A", (rank, inputs)), ("B", (outputs, rank))):
                at = int(rng.integers(0, largest))
                tensors[f"{prefix}{part}.weight"] = (
                    block[at : at + size[0] * size[1]].reshape(size).clone()
                )
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "bias": "none",
        "task_type": "CAUSAL_LM",
        "target_modules": sorted(module.rpartition(".")[2] for module in modules),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def told(plan: Plan, folder: Path) -> dict[str, Any]:
    """What the workers of a run are told of the base model; they give it to `engine_flags`."""
    shape = shape_of(plan.model, plan.quick)
    return {"model": str(made(shape, folder)), "dtype": plan.dtype, "dummy": shape.dummy}


def served_rank(rank: int) -> int:
    """The least value of vLLM's `max_lora_rank` that admits it."""
    return next(it for it in (8, 16, 32, 64, 128, 256, 320, 512) if it >= rank)


def engine_flags(told: Mapping[str, Any]) -> dict[str, Any]:
    """Of vLLM's engine, the same for all peers of a run."""
    flags = {"model": told["model"], "dtype": told["dtype"], "seed": 0}
    if told["dummy"]:
        flags["load_format"] = "dummy"
    if on_gpu():
        flags["kv_cache_memory_bytes"] = KV_GIB << 30
        flags["gpu_memory_utilization"] = OF_GPU
    return flags
