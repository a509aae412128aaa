"""Whether an adapter's weights are those of the model's own layers.

Vetting knows this of a few families of models, from their published configuration; the layers that
are there know it of all. vLLM looks at the end of a module's name and at no size: a smaller matrix
goes into a corner of its slot, names of no layer are left out without a word, and one that is too
large ends the engine, in the step that places it.
"""

from typing import Any

import torch
from vllm.lora.layers import LogitsProcessorWithLoRA, VocabParallelEmbeddingWithLoRA
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.lora_model import LoRAModel
from vllm.model_executor.layers.linear import QKVParallelLinear
from vllm.model_executor.models.utils import PPMissingLayer

Maps = tuple[int, tuple[int, ...]]
"""Inputs of a layer, and outputs of each of its parts, of all ranks together."""


def check(manager: Any, model: LoRAModel) -> None:
    """Raise ValueError for what `manager`, vLLM's, would put wrongly or not at all.

    `model` has the weights of layers that vLLM joins, q, k and v, joined. Those of experts are not
    looked at.
    """
    known = set()
    for name, module in manager.modules.items():
        if weights := manager._get_lora_layer_weights(model, name):
            known.add(id(weights))
            if maps := _maps(module):
                _compare(name, manager.packed_modules.get(name, []), module, weights, maps)
    unknown = [
        name
        for name, weights in model.loras.items()
        if id(weights) not in known and ".experts" not in name
    ]
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
        if of_a is not None and (found := (of_a.shape[-1], of_b.shape[0])) != (inputs, rows):
            raise ValueError(
                f"{part} maps {found[0]} to {found[1]} values; the model's maps {inputs} to {rows}"
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
