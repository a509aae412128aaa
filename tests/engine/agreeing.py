"""Ask vetting, vLLM and PEFT about hundreds of generated adapters; print what each said, as JSON.

    python -m tests.engine.agreeing MODEL FOLDER [COUNT]

One line an adapter: its kind, the rule that refused it or null, whether the engine took it, and
how far the engine's log-probabilities are from those of PEFT, which defines what an adapter means
(null when PEFT refuses it, `inf` when a number is not finite). Poisonous ones come last, and those
that would hang the engine are never loaded.
"""

import json
import math
import os
import random
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from r3mes_vllm.adapters.model_shape import ModelShape
from r3mes_vllm.adapters.vetting import CONFIG, WEIGHTS, vet
from r3mes_vllm.errors import AdapterRefused
from tests import tiny

MAX_RANK = 64
RANKS = (1, 2, 4, 8, 16, 32, 64)
PROMPT = list(range(20, 40))
POISON, HANGS = "poison", "hangs"

Config = dict[str, Any]
Tensors = dict[str, torch.Tensor]


def good(chance: random.Random) -> tuple[Config, Tensors]:
    """Any adapter that PEFT could have written for the model."""
    rank, dtype = (
        chance.choice(RANKS),
        chance.choice([torch.float32, torch.float16, torch.bfloat16]),
    )
    names = sorted({name.rpartition(".")[2] for name in tiny.modules()})
    targets = chance.sample(names, chance.randint(1, len(names)))
    config: Config = {
        **tiny.config(rank=rank),
        "target_modules": targets,
        "lora_alpha": chance.choice([1, rank, 2 * rank, 0.5, 16]),
        "use_rslora": chance.random() < 0.3,
        "lora_dropout": 0.05,
        "inference_mode": True,
    }
    ranks = {}
    if chance.random() < 0.3:
        ranks = {chance.choice(targets): chance.choice(RANKS)}
        config["rank_pattern"] = {_spelt(name, chance): here for name, here in ranks.items()}
    if chance.random() < 0.3:
        name = f"layers.1.{_parent(targets[0])}.{targets[0]}"
        config["alpha_pattern"] = {_spelt(name, chance): 4}
    if chance.random() < 0.2:
        config["layers_to_transform"] = [0]
    tensors: Tensors = {}
    torch.manual_seed(chance.randrange(1 << 30))
    for module, (inputs, outputs) in tiny.modules().items():
        last = module.rpartition(".")[2]
        if last not in targets or ("layers_to_transform" in config and ".0." not in module):
            continue
        here = ranks.get(last, rank)
        tensors[weight_name(module, "A")] = (torch.randn(here, inputs) * 0.1).to(dtype)
        tensors[weight_name(module, "B")] = (torch.randn(outputs, here) * 0.1).to(dtype)
    return config, tensors


def _spelt(name: str, chance: random.Random) -> str:
    """As it is, or with a `.`, which stands for any character."""
    return chance.choice([name, name.replace("_", ".")])


def _parent(target: str) -> str:
    return "mlp" if target in ("gate_proj", "up_proj", "down_proj") else "self_attn"


def weight_name(module: str, side: str) -> str:
    return f"base_model.model.{module}.lora_{side}.weight"


Change = Callable[[Config, Tensors], None]


def _set(**fields: Any) -> Change:
    return lambda config, tensors: config.update(fields)


def _any(tensors: Tensors, side: str = "A") -> str:
    return next(name for name in sorted(tensors) if f"lora_{side}" in name)


def _value(value: float) -> Change:
    def change(config: Config, tensors: Tensors) -> None:
        tensors[_any(tensors)] = tensors[_any(tensors)].float()
        tensors[_any(tensors)][0, 0] = value

    return change


def _replace(make: Callable[[torch.Tensor], torch.Tensor], side: str = "A") -> Change:
    def change(config: Config, tensors: Tensors) -> None:
        tensors[_any(tensors, side)] = make(tensors[_any(tensors, side)]).contiguous()

    return change


def _rename(old: str, new: str) -> Change:
    def change(config: Config, tensors: Tensors) -> None:
        name = _any(tensors)
        tensors[new if not old else name.replace(old, new)] = tensors.pop(name)

    return change


def _move_pair(config: Config, tensors: Tensors) -> None:
    module = _any(tensors).removeprefix("base_model.model.").partition(".lora_")[0]
    far = f"model.layers.999.{module.partition('.')[2].partition('.')[2].partition('.')[2]}"
    for side in "AB":
        tensors[weight_name(far, side)] = tensors.pop(weight_name(module, side))


def _drop_partner(config: Config, tensors: Tensors) -> None:
    del tensors[_any(tensors, "B")]


def _wrong_rank(config: Config, tensors: Tensors) -> None:
    config["r"] = config["r"] * 2 if config["r"] < MAX_RANK else 32
    config.pop("rank_pattern", None)


def _untargeted(config: Config, tensors: Tensors) -> None:
    left_out = _last(_any(tensors))
    rest = [name for name in config["target_modules"] if name != left_out]
    config["target_modules"] = rest or ["absent"]


def _excluded(config: Config, tensors: Tensors) -> None:
    config["exclude_modules"] = [_last(_any(tensors))]


def _other_layers(config: Config, tensors: Tensors) -> None:
    config["layers_to_transform"] = [1]


def _last(tensor: str) -> str:
    return tensor.partition(".lora_")[0].rpartition(".")[2]


BAD: dict[str, Change] = {
    "ia3": _set(peft_type="IA3"),
    "dora": _set(use_dora=True),
    "bias": _set(bias="all"),
    "modules_to_save": _set(modules_to_save=["lm_head"]),
    "layer_replication": _set(layer_replication=[[0, 2], [0, 2]]),
    "pissa": _set(init_lora_weights="pissa"),
    "token_indices": _set(trainable_token_indices=[1, 2]),
    "auto_mapping": _set(auto_mapping={"base_model_class": "X", "parent_library": "os"}),
    "rank 0": _set(r=0),
    "rank beyond the node's": _set(r=512),
    "alpha 0": _set(lora_alpha=0),
    "alpha huge": _set(lora_alpha=1e30),
    "targets regex": _set(target_modules=".*proj"),
    "wrong rank": _wrong_rank,
    "untargeted": _untargeted,
    "excluded": _excluded,
    "other layers": _other_layers,
    "alpha tiny": _set(lora_alpha=1e-300),
    "many keys": _set(alpha_pattern={f"a{number}": 1 for number in range(500)}),
    "no partner": _drop_partner,
    "layer 999": _move_pair,
    "odd name": _rename(".lora_A.", ".lora_C."),
    "embedding": _rename("", "base_model.model.model.embed_tokens.lora_embedding_A"),
    "wrong inputs": _replace(lambda it: it[:, :-8]),
    "wrong outputs": _replace(lambda it: it[:-8], "B"),
    "three dimensions": _replace(lambda it: it[None]),
    "integers": _replace(lambda it: torch.ones(it.shape, dtype=torch.int8)),
    "huge value": _value(3e38),
    f"{POISON} nan": _value(math.nan),
    f"{POISON} infinity": _value(math.inf),
    f"{HANGS} rank pattern": _set(rank_pattern={"(?:a|aa)+$x": 8}),
}


def generated(count: int) -> Iterator[tuple[str, Config, Tensors]]:
    chance = random.Random(0)
    for _ in range(count * 2 // 3):
        yield "good", *good(chance)
    kinds = sorted(BAD, key=lambda kind: kind.startswith(POISON))
    for kind in kinds:
        for _ in range(max(1, count // 3 // len(kinds))):
            config, tensors = good(chance)
            BAD[kind](config, tensors)
            yield kind, config, tensors


class Engine:
    """vLLM in this process, with the same model."""

    def __init__(self, model: Path) -> None:
        os.environ.update(
            VLLM_ENABLE_V1_MULTIPROCESSING="0",
            VLLM_CPU_KVCACHE_SPACE="1",
            VLLM_PLUGINS="r3mes",
            VLLM_LOGGING_LEVEL="ERROR",
        )
        from vllm import LLM, SamplingParams
        from vllm.platforms import current_platform

        self._llm = LLM(
            str(model),
            # its kernels for adapters on a GPU know no float32
            dtype="float32" if current_platform.is_cpu() else "bfloat16",
            enable_lora=True,
            max_loras=1,
            max_lora_rank=MAX_RANK,
            enforce_eager=True,
            max_model_len=64,
            enable_prefix_caching=False,
        )
        self._sampling = SamplingParams(max_tokens=1, temperature=0, logprobs=20)

    def logprobs(self, adapter: Path, number: int) -> Mapping[int, Any]:
        """Raises whatever the engine refuses it with."""
        from vllm.lora.request import LoRARequest

        request = LoRARequest(f"a{number}", number, str(adapter))
        self._llm.llm_engine.add_lora(request)
        answer = self._llm.generate(
            {"prompt_token_ids": PROMPT}, self._sampling, lora_request=request, use_tqdm=False
        )
        self._llm.llm_engine.remove_lora(number)
        found: Mapping[int, Any] = (answer[0].outputs[0].logprobs or [{}])[0]
        return found


def main(model: Path, folder: Path, count: int) -> None:
    engine, reference = Engine(model), Reference(model)
    base = ModelShape(tiny.NAME, tiny.modules())
    for number, (kind, config, tensors) in enumerate(generated(count), 1):
        directory = folder / str(number)
        directory.mkdir()
        (directory / CONFIG).write_text(json.dumps(config))
        save_file(tensors, directory / WEIGHTS)
        told: dict[str, Any] = {"kind": kind, "rule": None, "taken": None, "distance": None}
        try:
            vet(directory, base=base, max_rank=MAX_RANK)
        except AdapterRefused as error:
            told["rule"] = error.rule
        if not kind.startswith(HANGS):
            expected = reference.logprobs(directory)
            try:
                told["distance"] = distance(engine.logprobs(directory, number), expected)
                told["taken"] = True
            except Exception as error:  # noqa: BLE001 - any refusal of the engine's
                told["taken"], told["error"] = False, str(error)[:200]
        print(json.dumps(told), flush=True)
        shutil.rmtree(directory)


def distance(found: Mapping[int, Any], expected: torch.Tensor | None) -> float | None:
    if expected is None:
        return None
    gaps = [abs(it.logprob - float(expected[token])) for token, it in found.items()]
    return max(gaps) if all(map(math.isfinite, gaps)) else math.inf


class Reference:
    """PEFT on the same model, in float32."""

    def __init__(self, model: Path) -> None:
        self._model = model
        self._base = self._load()

    def _load(self) -> Any:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self._model, dtype=torch.float32)

    def logprobs(self, adapter: Path) -> torch.Tensor | None:
        from peft import PeftModel

        try:
            tuned: Any = PeftModel.from_pretrained(self._base, str(adapter))
            with torch.no_grad():
                logits: torch.Tensor = tuned(torch.tensor([PROMPT])).logits[0, -1]
        except Exception:  # noqa: BLE001 - whatever PEFT makes of it, it is no adapter
            self._base = self._load()
            return None
        self._base = tuned.unload()
        return logits.log_softmax(-1)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int([*sys.argv, "300"][3]))
