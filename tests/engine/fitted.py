"""Which adapters fit models of several families; prints what was said of each, as JSON.

    python -m tests.engine.fitted FOLDER

Adapters have the layers of transformers' model of the same configuration, which is what PEFT sees;
the layers are vLLM's, with random weights. Experts, which transformers has in one tensor, have the
names that vLLM takes: each its own, or all joined.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from vllm.config import set_current_vllm_config
from vllm.distributed import (
    destroy_model_parallel,
    ensure_model_parallel_initialized,
    init_distributed_environment,
)
from vllm.engine.arg_utils import EngineArgs
from vllm.lora.lora_model import LoRAModel
from vllm.lora.model_manager import create_lora_manager
from vllm.lora.peft_helper import PEFTHelper
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.utils.network_utils import get_open_port

from r3mes_vllm.engine import fitting
from tests.engine.agreeing import weight_name

RANK = 4
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 256,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
FAMILIES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "starcoder2": "Starcoder2ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "gpt_oss": "GptOssForCausalLM",
}
EXPERTS = 4
EXPERT_SIZES = {
    "qwen3_moe": {"num_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "gpt_oss": {"num_local_experts": EXPERTS, "num_experts_per_tok": 2},
}
MISFITS = ("wider", "narrower", "taller", "shorter", "elsewhere")

Weights = dict[str, torch.Tensor]


def weights_of(config: PreTrainedConfig) -> Weights:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    found = {}
    for name, layer in model.named_modules():
        if name != "lm_head" and isinstance(layer, torch.nn.Linear):
            found[weight_name(name, "A")] = torch.zeros(RANK, layer.in_features)
            found[weight_name(name, "B")] = torch.zeros(layer.out_features, RANK)
    return found


def weights_of_experts(family: str, config: PreTrainedConfig) -> Weights:
    found = {}
    for layer in (f"model.layers.{it}.mlp.experts" for it in range(config.num_hidden_layers)):
        hidden = config.hidden_size
        if family == "gpt_oss":
            inner, rank = config.intermediate_size, RANK * EXPERTS
            maps = {f"{layer}.base_layer": (hidden, 2 * inner), layer: (inner, hidden)}
        else:
            inner, rank = config.moe_intermediate_size, RANK
            up, down = (hidden, inner), (inner, hidden)
            projections = {"gate_proj": up, "up_proj": up, "down_proj": down}
            each = [f"{layer}.{it}" for it in range(EXPERTS)]
            maps = {f"{it}.{name}": projections[name] for it in each for name in projections}
        for name, (inputs, outputs) in maps.items():
            found[weight_name(name, "A")] = torch.zeros(rank, inputs)
            found[weight_name(name, "B")] = torch.zeros(outputs, rank)
    return found


def misfit(weights: Weights, how: str) -> Weights:
    """One matrix of the last layer's: where vLLM joins q, k and v, the last of these; of experts,
    which vLLM joins if it has all, that of each."""
    layers = {name.partition(".lora_")[0]: None for name in weights}
    experts = [it for it in layers if ".experts" in it and ".layers.1." in it]
    chosen = [it for it in experts if how == "elsewhere" or it.endswith((".experts", "down_proj"))]
    if not chosen:
        chosen = [it for it in layers if "attn" in it and "o_proj" not in it][-1:]
    changed = dict(weights)
    for a, b in ([f"{layer}.lora_{side}.weight" for side in "AB"] for layer in chosen):
        if how == "wider":
            changed[a] = torch.cat([weights[a]] * 2, 1)
        elif how == "narrower":
            changed[a] = weights[a][:, ::2].contiguous()
        elif how == "taller":
            changed[b] = torch.cat([weights[b]] * 2)
        elif how == "shorter":
            changed[b] = weights[b][::2].contiguous()
        else:
            for name in (a, b):
                changed[name.replace(".layers.1.", ".layers.7.")] = changed.pop(name)
    return changed


def manager_of(folder: Path, config: PreTrainedConfig) -> tuple[Any, Any]:
    config.save_pretrained(folder)
    arguments = EngineArgs(
        str(folder),
        enable_lora=True,
        max_lora_rank=8,
        dtype="float32",
        load_format="dummy",
        skip_tokenizer_init=True,
        max_model_len=128,
    )
    vllm_config = arguments.create_engine_config()
    with set_current_vllm_config(vllm_config):
        if not torch.distributed.is_initialized():
            init_distributed_environment(1, 0, f"tcp://127.0.0.1:{get_open_port()}", backend="gloo")
        destroy_model_parallel()
        ensure_model_parallel_initialized(1, 1)  # with a group of experts only where there are any
        model = initialize_model(vllm_config)
        for layer in model.modules():
            if isinstance(layer, RoutedExperts):  # without a kernel they take no adapters
                layer.quant_method.process_weights_after_loading(layer)
        return create_lora_manager(
            model, 4, 128, SIZES["vocab_size"], vllm_config.lora_config, vllm_config, "cpu"
        ), model


def said(manager: Any, model: Any, weights: Weights) -> str | None:
    helper = PEFTHelper(r=RANK, lora_alpha=8, target_modules=["all"])
    mapper = model.hf_to_vllm_mapper.get_rename_mapper()  # as vLLM does
    adapter = LoRAModel.from_lora_tensors(
        1, weights, helper, device="cpu", dtype=torch.float32, weights_mapper=mapper
    )
    try:
        manager._create_merged_loras_inplace(adapter)
        fitting.check(manager, adapter)
    except ValueError as error:
        return str(error)
    return None


def main() -> None:
    torch.set_default_dtype(torch.float32)
    found = {}
    for family, architecture in FAMILIES.items():
        experts = EXPERT_SIZES.get(family, {})
        config = AutoConfig.for_model(family, architectures=[architecture], **SIZES, **experts)
        good = weights_of(config)  # before vLLM puts layers of its own into transformers' model
        if experts:
            good |= weights_of_experts(family, config)
        manager, model = manager_of(Path(sys.argv[1]) / family, config)
        found[family] = {"good": said(manager, model, good)} | {
            how: said(manager, model, misfit(good, how)) for how in MISFITS
        }
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
