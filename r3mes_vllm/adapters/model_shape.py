"""Which linear modules a base model has, read from its Hugging Face `config.json`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_LLAMA_LIKE = {"llama", "mistral", "qwen2", "qwen3", "smollm3", "granite"}
_PACKED = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv_proj"),
    **dict.fromkeys(("gate_proj", "up_proj"), "gate_up_proj"),
}
"""In which module of vLLM's each is, which takes adapters for all of its parts, or for none; of
the architectures above."""


@dataclass(frozen=True)
class ModelShape:
    """`modules` maps `model.layers.0.self_attn.q_proj` to its (inputs, outputs).

    `modules` is None for an architecture whose modules are not known here: an adapter's names
    and shapes are then checked by the engine alone.
    """

    name: str
    modules: Mapping[str, tuple[int, int]] | None
    targets: frozenset[str] | None = None
    """vLLM's `--lora-target-modules`: those that take adapters; None for all."""

    def takes(self, module: str) -> bool:
        """Whether vLLM applies an adapter's weights of `module`; the others it leaves out."""
        if self.targets is None:
            return True
        path, _, last = module.rpartition(".")
        if self.modules is None:
            return not self.targets.isdisjoint({last, module})
        parent = _PACKED.get(last, last)
        names = {parent, f"{path}.{parent}", *(it for it in _PACKED if _PACKED[it] == parent)}
        return not self.targets.isdisjoint(names)

    @classmethod
    def from_config(cls, name: str, config: Mapping[str, Any]) -> "ModelShape":
        """`config` as published with the model; `name` is only used in messages."""
        if config.get("model_type") not in _LLAMA_LIKE:
            return cls(name, None)
        hidden, inner = config["hidden_size"], config["intermediate_size"]
        heads = config["num_attention_heads"]
        head = config.get("head_dim") or hidden // heads
        queries = heads * head
        values = (config.get("num_key_value_heads") or heads) * head
        layer = {
            "self_attn.q_proj": (hidden, queries),
            "self_attn.k_proj": (hidden, values),
            "self_attn.v_proj": (hidden, values),
            "self_attn.o_proj": (queries, hidden),
            "mlp.gate_proj": (hidden, inner),
            "mlp.up_proj": (hidden, inner),
            "mlp.down_proj": (inner, hidden),
        }
        return cls(
            name,
            {
                f"model.layers.{index}.{module}": shape
                for index in range(config["num_hidden_layers"])
                for module, shape in layer.items()
            },
        )
