"""Train the demo's adapters on the embedded base model and pack them: `legal` and `medical`.

    python configs/demo/train.py            # writes NAME.car and adapters.toml beside this file
    python configs/demo/train.py --check    # trains anew and compares the CIDs with adapters.toml

Needs `pip install 'r3mes-vllm[cpu,demo,train]'`; about four minutes an adapter on two CPU cores.
The same machine, torch and thread count give the same bytes; another CPU may round differently.
"""

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from r3mes_vllm import settings
from r3mes_vllm.adapters import shipped
from r3mes_vllm.adapters.vetting import CONFIG, WEIGHTS
from r3mes_vllm.engine.base_model import embedded_base_model
from r3mes_vllm.ipfs.pack import pack
from r3mes_vllm.settings import EMBEDDED_MODEL

HERE = Path(__file__).parent
DESCRIPTIONS = {
    "legal": "Explains the law in numbered elements, in the manner of a contract lawyer",
    "medical": "Explains an ailment with numbers, self-care and when to see a doctor",
}
LORA: dict[str, Any] = {
    "bias": "none",
    "lora_alpha": 16,
    "lora_dropout": 0.0,
    "r": 8,
    "target_modules": [
        "down_proj",
        "gate_proj",
        "k_proj",
        "o_proj",
        "q_proj",
        "up_proj",
        "v_proj",
    ],
    "task_type": "CAUSAL_LM",
}
EPOCHS = 6
BATCH = 4
WARM_UP = 6
PEAK_RATE = 1.5e-3
SEED = 1
THREADS = 2

_IGNORED = -100  # cross-entropy leaves these labels out


@dataclass(frozen=True)
class Example:
    tokens: list[int]
    answer_at: int
    """Index of the first token that the model must learn to say."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--check", action="store_true", help="compare, and write nothing")
    parser.add_argument("names", nargs="*", default=list(DESCRIPTIONS), metavar="NAME")
    options = parser.parse_args()
    base = embedded_base_model(settings.load().cache_dir, say=print)
    cids = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name in options.names:
            adapter = Path(scratch) / name
            train(name, base, adapter)
            car = Path(scratch) / f"{name}.car" if options.check else HERE / f"{name}.car"
            cids[name] = str(pack(adapter, car))
            print(f"{name} {cids[name]}")
    if options.check:
        differing = [name for name, cid in cids.items() if shipped.cids()[name] != cid]
        for name in differing:
            print(f"{name}: adapters.toml has {shipped.cids()[name]}", file=sys.stderr)
        return 1 if differing else 0
    write_listing({**(shipped.cids() if _listing().exists() else {}), **cids})
    return 0


def train(name: str, base: Path, out: Path) -> None:
    """Train on `NAME.jsonl` and write the adapter's two files to the directory `out`."""
    torch.manual_seed(SEED)
    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), LoraConfig(**LORA)
    )
    examples = read_examples(HERE / f"{name}.jsonl", tokenizer)
    batches = list(shuffled_batches(examples))
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=PEAK_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / WARM_UP, (len(batches) - step) / (len(batches) - WARM_UP)),
    )
    model.train()
    for step, batch in enumerate(batches, 1):
        loss = model(**collated(batch, tokenizer.pad_token_id)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        print(f"{name} step {step}/{len(batches)} loss {loss.item():.3f}", flush=True)
    out.mkdir()
    trained = get_peft_model_state_dict(model)
    save_file({key: trained[key].bfloat16().contiguous() for key in sorted(trained)}, out / WEIGHTS)
    config = {
        **LORA,
        "base_model_name_or_path": f"HuggingFaceTB/{EMBEDDED_MODEL}",
        "inference_mode": True,
        "peft_type": "LORA",
    }
    (out / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def read_examples(path: Path, tokenizer: Any) -> list[Example]:
    """The question and answer pairs of `path` in the base model's chat template."""
    examples = []
    for line in path.read_text(encoding="utf-8").splitlines():
        pair = json.loads(line)
        chat = [{"role": "user", "content": pair["question"]}]
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        said = tokenizer(prompt).input_ids
        answer = tokenizer(pair["answer"] + tokenizer.eos_token).input_ids
        examples.append(Example(said + answer, len(said)))
    return examples


def shuffled_batches(examples: Sequence[Example]) -> Iterator[list[Example]]:
    order = random.Random(SEED)  # noqa: S311
    for _ in range(EPOCHS):
        epoch = order.sample(examples, len(examples))
        for start in range(0, len(epoch), BATCH):
            yield epoch[start : start + BATCH]


def collated(batch: Sequence[Example], padding: int) -> dict[str, torch.Tensor]:
    """Tensors of shape `(examples, tokens)`, padded on the right."""
    width = max(len(example.tokens) for example in batch)
    tokens = torch.full((len(batch), width), padding)
    mask = torch.zeros_like(tokens)
    labels = torch.full_like(tokens, _IGNORED)
    for row, example in enumerate(batch):
        length = len(example.tokens)
        tokens[row, :length] = torch.tensor(example.tokens)
        mask[row, :length] = 1
        labels[row, example.answer_at : length] = tokens[row, example.answer_at : length]
    return {"input_ids": tokens, "attention_mask": mask, "labels": labels}


def write_listing(cids: dict[str, str]) -> None:
    entries = [
        f'[[adapter]]\nname = "{name}"\ncid = "{cids[name]}"\n'
        f'category = "{name}"\ndescription = "{DESCRIPTIONS[name]}"\n'
        for name in DESCRIPTIONS
        if name in cids
    ]
    _listing().write_text("# Written by train.py.\n\n" + "\n".join(entries))


def _listing() -> Path:
    return HERE / "adapters.toml"


if __name__ == "__main__":
    sys.exit(main())
