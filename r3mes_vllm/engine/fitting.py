"""Whether an adapter's weights are those of the model's own layers.

Vetting knows this of a few families of models, from their published configuration; the layers that
are there know it of all. vLLM looks at the end of a module's name and at no size: a smaller matrix
goes into a corner of its slot, names of no layer are left out without a word, and one that is too
large ends the engine, in the step that places it: of experts with the first request that wants the
adapter, if no slot was free to try it before.
"""

from typing import Any

import torch
from vllm.lora.layers import (
    FusedMoE3DWithLoRA,
    FusedMoEWithLoRA,
    LogitsProcessorWithLoRA,
    VocabParallelEmbeddingWithLoRA,
)
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.lora_model import LoRAModel
from vllm.model_executor.layers.linear import QKVParallelLinear
from vllm.model_executor.models.utils import PPMissingLayer

Maps = tuple[int, tuple[int, ...]]
"""Inputs of a layer, and outputs of each of its parts, of all ranks together."""


def check(manager: Any, model: LoRAModel) -> None:
    """Raise ValueError for what `manager`, vLLM's, would put wrongly or not at all.

    `model` has the weights of layers that vLLM joins, q, k and v or all experts, joined. A layer
    of a kind that isn't known here takes none.
    """
    known = set()
    for name, module in manager.modules.items():
        if weights := manager._get_lora_layer_weights(model, name):
            known.add(id(weights))
            parts = manager.packed_modules.get(name, [])
            if isinstance(module, FusedMoEWithLoRA):
                if isinstance(module, FusedMoE3DWithLoRA):
                    parts = [f"{name}.base_layer", name]
                    known.add(id(model.loras.get(parts[0])))  # vLLM leaves it there, and joins it
                _compare_experts(name, parts, module, weights)
            elif maps := _maps(module):
                _compare(name, parts, module, weights, maps)
            else:
                raise ValueError(f"{name} can't be compared with the model's")
    unknown = [name for name, weights in model.loras.items() if id(weights) not in known]
    if unknown and (strange := set(unknown) - _elsewhere(manager.model, unknown)):
        raise ValueError(f"the model has no layer {min(strange)[:200]!r} that takes adapters")


def _compare(name: str, parts: list[str], module: Any, weights: Any, maps: Maps) -> None:
    inputs, outputs = maps
    a, b = weights.lora_a, weights.lora_b
    if torch.is_tensor(b):  # of all parts together
        a, b, outputs = [a], [b], (sum(outputs),)
    elif len(b) != len(outputs):
        a, b = module.expand_packed_lora(a, b)  # some are of several parts
    names = parts if len(parts) == len(b) else [name] * len(b)
    for part, of_a, of_b, rows in zip(names, a, b, outputs, strict=True):
        if of_a is not None:
            _same(part, (of_a.shape[-1], of_b.shape[0]), (inputs, rows))


def _compare_experts(name: str, parts: list[str], module: Any, weights: Any) -> None:
    """A is `(experts, rank, inputs)` here and B is `(experts, outputs, rank)`, of this rank's
    experts and of their whole matrices: vLLM cuts its part out when it places them."""
    config = module.moe_config  # its other sizes are rounded up for some kernels
    up = config.hidden_dim_unpadded, config.intermediate_size
    down = up[::-1]
    w13 = list(zip(module.w13_lora_a_stacked, module.w13_lora_b_stacked, strict=True))
    (w2,) = zip(module.w2_lora_a_stacked, module.w2_lora_b_stacked, strict=True)
    if isinstance(module, FusedMoE3DWithLoRA):
        layers = [((up[0], 2 * up[1]), w13[0]), (down, w2)]
    else:
        layers = [(up, w13[0]), (down, w2), (up, w13[-1])]
    if not len(weights.lora_a) == len(weights.lora_b) == len(layers):
        raise ValueError(f"{name} has weights of experts that can't be compared with the model's")
    names = parts[: len(layers)] if len(parts) >= len(layers) else [name] * len(layers)
    for part, a, b, (maps, slots) in zip(
        names, weights.lora_a, weights.lora_b, layers, strict=True
    ):
        for it, slot in zip((a, b), slots, strict=True):
            # what all experts share has room for one, and vLLM takes the first
            if it.ndim != 3 or slot.shape[1] not in (1, len(it)):
                raise ValueError(f"{part} is {tuple(it.shape)}, for {slot.shape[1]} experts")
        _same(part, (a.shape[2], b.shape[1]), maps)
        rank, most = max(a.shape[1], b.shape[2]), slots[1].shape[3]
        if rank > most:
            raise ValueError(f"{part} has rank {rank}; a slot takes {most}")


def _same(part: str, found: tuple[int, int], maps: tuple[int, int]) -> None:
    if found != maps:
        raise ValueError(
            f"{part} maps {found[0]} to {found[1]} values; the model's maps {maps[0]} to {maps[1]}"
        )


def _maps(module: Any) -> Maps | None:
    layer = module.base_layer
    if isinstance(module, LogitsProcessorWithLoRA):
        return module.hidden_size, (layer.vocab_size,)
    if isinstance(module, VocabParallelEmbeddingWithLoRA):
        return layer.org_vocab_size, (layer.embedding_dim,)
    if isinstance(layer, QKVParallelLinear):  # its own sizes count a head for each rank that has it
        q, kv = (it * layer.head_size for it in (layer.total_num_heads, layer.total_num_kv_heads))
        return layer.input_size, (q, kv, kv)
    if isinstance(module, BaseLinearLayerWithLoRA):
        return layer.input_size, tuple(getattr(layer, "output_sizes", (layer.output_size,)))
    return None


def _elsewhere(model: torch.nn.Module, names: list[str]) -> set[str]:
    """Those of layers that other ranks of a pipeline have."""
    missing = tuple(
        f"{name}." for name, it in model.named_modules() if isinstance(it, PPMissingLayer)
    )
    return {it for it in names if it.startswith(missing)}
