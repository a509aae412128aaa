"""A Llama-shaped model and its adapters in llama.cpp's own format, with the same weights."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import torch
from safetensors.torch import load_file

_ARCHITECTURE = "llama"
_OF_LAYER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_OTHERS = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
_ADAPTED = "base_model.model."


def write_model(folder: Path, file: Path, dtype: torch.dtype) -> None:
    """The model in `folder` without its vocabulary: it is given tokens."""
    config = json.loads((folder / "config.json").read_text())
    heads = _heads(config)
    writer = gguf.GGUFWriter(file, _ARCHITECTURE)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(_rope_theta(config))
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    for name, tensor in load_file(folder / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if name == "lm_head.weight" and config.get("tie_word_embeddings"):
            continue
        _add(writer, f"{_named(module)}.weight", _ordered(tensor, module, heads), dtype)
    _close(writer)


def write_adapter(folder: Path, model: Path, file: Path, dtype: torch.dtype) -> None:
    """The adapter in `folder`, of the model in `model`."""
    heads = _heads(json.loads((model / "config.json").read_text()))
    config = json.loads((folder / "adapter_config.json").read_text())
    writer = gguf.GGUFWriter(file, _ARCHITECTURE)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(config["lora_alpha"]))
    for name, tensor in load_file(folder / "adapter_model.safetensors").items():
        module, _, part = name.removeprefix(_ADAPTED).rpartition(".lora_")
        part = part[0].lower()
        tensor = _ordered(tensor, module, heads) if part == "b" else tensor
        _add(writer, f"{_named(module)}.weight.lora_{part}", tensor, dtype)
    _close(writer)


def _heads(config: Mapping[str, Any]) -> dict[str, int]:
    return {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}


def _rope_theta(config: Mapping[str, Any]) -> float:
    return float((config.get("rope_parameters") or config).get("rope_theta", 10000.0))


def _named(module: str) -> str:
    if module in _OTHERS:
        return _OTHERS[module]
    layer, _, rest = module.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{_OF_LAYER[rest]}"


def _ordered(tensor: torch.Tensor, module: str, heads: Mapping[str, int]) -> torch.Tensor:
    """llama.cpp turns neighbouring values of a head, Transformers those half a head apart."""
    count = heads.get(module.rpartition(".")[2])
    if count is None:
        return tensor
    halves = tensor.reshape(count, 2, -1, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape)


def _add(writer: Any, name: str, tensor: torch.Tensor, dtype: torch.dtype) -> None:
    if tensor.dim() == 1 or dtype == torch.float32:
        writer.add_tensor(name, tensor.float().numpy())
        return
    bits = tensor.to(torch.bfloat16).contiguous().view(torch.uint8).numpy()
    writer.add_tensor(name, bits, raw_dtype=gguf.GGMLQuantizationType.BF16)


def _close(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
