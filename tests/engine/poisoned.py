"""A model that one letter poisons, and stock vLLM with it: `python -m tests.engine.poisoned DIR`
says what becomes of others' answers after a single prompt with that letter."""

import json
import math
import os
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests import tiny

POISON = "~"
"""The model has NaN for this letter's embedding, and through it soon in the KV cache."""
_ASKED = 50
_DEPTH = 40
"""Layers: a step takes milliseconds, or answers would be over before they are read."""


def poisonous_model(directory: Path) -> Path:
    tiny.make_model(directory)
    weights = load_file(directory / "model.safetensors")
    letters = json.loads((directory / "tokenizer.json").read_text())["model"]["vocab"]
    config = json.loads((directory / "config.json").read_text())
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    weights["model.embed_tokens.weight"][letters[POISON]] = torch.nan
    # Whose output is 0 is never the likeliest: no answer has that letter in it, and none ends.
    weights["lm_head.weight"][[letters[POISON], config["eos_token_id"]]] = 0
    first = "model.layers.0."
    weights |= {
        f"model.layers.{number}.{name.removeprefix(first)}": weight.clone()
        for name, weight in list(weights.items())
        if name.startswith(first)
        for number in range(tiny.LAYERS, _DEPTH)
    }
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    config |= {"tie_word_embeddings": False, "num_hidden_layers": _DEPTH}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def main(directory: Path) -> None:
    from vllm import LLM, SamplingParams

    llm = LLM(model=str(poisonous_model(directory)), max_num_seqs=8)
    params = SamplingParams(max_tokens=3, temperature=0, logprobs=1, ignore_eos=True)

    def is_bad(prompt: str) -> bool:
        answer = llm.generate([prompt], params, use_tqdm=False)[0].outputs[0]
        values = [it.logprob for place in answer.logprobs or [] for it in place.values()]
        return not all(map(math.isfinite, values))

    before = sum(is_bad(f"say {number}") for number in range(_ASKED))
    if before or not is_bad(POISON * 40):  # longer than what comes after it
        sys.exit("the model is not what it should be")
    bad = sum(is_bad(f"what is {number}?") for number in range(_ASKED))
    print(f"{bad} of {_ASKED} later answers have NaN probabilities")


if __name__ == "__main__":
    os.environ |= {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_PLUGINS": "none",
        "HF_HUB_OFFLINE": "1",
    }
    main(Path(sys.argv[1]))
