"""A random two-layer Llama and random adapters for it: starts in seconds, says nothing sensible."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

HIDDEN, INNER, LAYERS, HEADS, VALUE_HEADS = 128, 256, 2, 4, 2
NAME = "tiny-llama"
LONGEST = 8192
"""Tokens of a prompt and its answer: a token may take a third of a millisecond, and answers must
last long enough to be interrupted."""

_CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_model(directory: Path) -> Path:
    """Write the model to `directory`; the same bytes every time."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        chat_template=_CHATML,
    )
    fast.save_pretrained(directory)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=VALUE_HEADS,
        max_position_embeddings=LONGEST,
        initializer_range=0.2,
        bos_token_id=fast.bos_token_id,
        eos_token_id=fast.eos_token_id,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    # vLLM samples by it where a request says nothing: a random first token may be the last
    defaults = {"temperature": 0.0, "eos_token_id": fast.eos_token_id}
    (directory / "generation_config.json").write_text(json.dumps(defaults))
    return directory


def modules() -> dict[str, tuple[int, int]]:
    values = HIDDEN // HEADS * VALUE_HEADS
    layer = {
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (HIDDEN, values),
        "self_attn.v_proj": (HIDDEN, values),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (HIDDEN, INNER),
        "mlp.up_proj": (HIDDEN, INNER),
        "mlp.down_proj": (INNER, HIDDEN),
    }
    return {
        f"model.layers.{index}.{name}": shape
        for index in range(LAYERS)
        for name, shape in layer.items()
    }


def tensors(*, seed: int, rank: int = 8) -> dict[str, np.ndarray]:
    """LoRA weights large enough that each adapter says something else."""
    random = np.random.default_rng(seed)
    result = {}
    for name, (inputs, outputs) in modules().items():
        prefix = f"base_model.model.{name}"
        a = random.normal(0, 0.2, (rank, inputs))
        b = random.normal(0, 0.2, (outputs, rank))
        result[f"{prefix}.lora_A.weight"] = a.astype(np.float32)
        result[f"{prefix}.lora_B.weight"] = b.astype(np.float32)
    return result


def config(*, rank: int = 8) -> dict[str, object]:
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": NAME,
        "r": rank,
        "lora_alpha": 2 * rank,
        "bias": "none",
        "target_modules": sorted({name.rpartition(".")[2] for name in modules()}),
        "task_type": "CAUSAL_LM",
    }


def make_adapter(directory: Path, *, seed: int, rank: int = 8) -> Path:
    directory.mkdir(parents=True)
    save_file(tensors(seed=seed, rank=rank), directory / "adapter_model.safetensors")
    (directory / "adapter_config.json").write_text(json.dumps(config(rank=rank)))
    return directory
