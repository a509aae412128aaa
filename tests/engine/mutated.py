"""Thousands of adapters that were damaged or forged at random: is each told, and told in time?

    python -m tests.engine.mutated --count 10000 [--seed N] [--seconds 3000]

What vetting refuses must be refused in two seconds and in no other way than AdapterRefused. What
it accepts is given to the engine, which must take it, give finite numbers, and answer as PEFT does
with the same files where PEFT takes them. Ends with 1 where one of these does not hold, or where
less than a twentieth was refused or accepted.
"""

import argparse
import json
import math
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from r3mes_vllm.adapters.files import CONFIG, WEIGHTS
from r3mes_vllm.adapters.model_shape import ModelShape
from r3mes_vllm.adapters.vetting import vet
from r3mes_vllm.errors import AdapterRefused
from tests import tiny
from tests.engine.agreeing import (
    BAD,
    HANGS,
    MAX_RANK,
    Config,
    Engine,
    Reference,
    distance,
    good,
)

VERDICT_S = 2.0
SAME = 1e-3
"""Of log-probabilities in float32."""
JUNK: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 8, 2**31, 2**63, 10**400, 0.5, -0.0, 1e-300, 1e308),
    *("", "LORA", "q_proj", ".*", "(a|aa)+$", "../../x", "\0", "ü" * 1000, "all-linear"),
    *([], ["q_proj"], [0], [[0]], {}, {"q_proj": 8}, {"q_proj": "x"}, {".*": 4}, [None], {"": 1}),
)
FIELDS = (
    *("peft_type", "r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern", "bias"),
    *("use_rslora", "use_dora", "fan_in_fan_out", "modules_to_save", "layers_to_transform"),
    *("layers_pattern", "exclude_modules", "init_lora_weights", "layer_replication", "lora_bias"),
    *("task_type", "base_model_name_or_path", "megatron_config", "auto_mapping", "revision"),
    *("trainable_token_indices", "target_parameters", "lora_dropout", "corda_config", "qalora"),
)

Files = dict[str, bytes]
Mutation = Callable[[random.Random, Files], None]


def _config(chance: random.Random, files: Files) -> None:
    config = json.loads(files[CONFIG])
    for _ in range(chance.choice([1, 1, 1, 3])):
        name = chance.choice([*config, *FIELDS])
        if chance.random() < 0.2:
            config.pop(name, None)
        else:
            config[name] = chance.choice(JUNK)
    files[CONFIG] = json.dumps(config).encode()


def _bytes_of(name: str, *, head: bool = False) -> Mutation:
    def change(chance: random.Random, files: Files) -> None:
        data = bytearray(files[name])
        end = min(len(data), 8 + int.from_bytes(data[:8], "little")) if head else len(data)
        for _ in range(chance.choice([1, 1, 4, 32])):
            data[chance.randrange(end)] = chance.choice([0, 0x7F, 0xFF, chance.randrange(256)])
        files[name] = bytes(data)

    return change


def _cut(chance: random.Random, files: Files) -> None:
    name = chance.choice([CONFIG, WEIGHTS])
    files[name] = files[name][: chance.randrange(len(files[name]))]


def _grown(chance: random.Random, files: Files) -> None:
    name = chance.choice([CONFIG, WEIGHTS])
    at, more = chance.randrange(len(files[name]) + 1), chance.randbytes(chance.choice([1, 8, 4096]))
    files[name] = files[name][:at] + more + files[name][at:]


def _header(chance: random.Random, files: Files) -> None:
    """One entry of the weights' table becomes another one, of the right form."""
    data = files[WEIGHTS]
    end = 8 + int.from_bytes(data[:8], "little")
    table = json.loads(data[8:end])
    name, other = (chance.choice([it for it in table if it != "__metadata__"]) for _ in range(2))
    match chance.randrange(5):
        case 0:
            table[name]["dtype"] = chance.choice(
                ["F16", "BF16", "F32", "F64", "I8", "F8_E4M3", "X"]
            )
        case 1:
            table[name]["shape"] = table[name]["shape"][::-1]
        case 2:
            table[name]["data_offsets"] = table[other]["data_offsets"]
        case 3:
            table[name]["shape"] = [chance.choice([0, 1, -1, 2**40, 2**64]), 8]
        case 4:
            table[chance.choice([other + "x", other.replace("_A", "_B"), "\0"])] = table.pop(name)
    text = json.dumps(table).encode()
    files[WEIGHTS] = len(text).to_bytes(8, "little") + text + data[end:]


def _twins(chance: random.Random, files: Files) -> None:
    """A key twice: which one counts?"""
    text = files[CONFIG].decode()
    name = chance.choice(FIELDS[:6])
    more = f'{{"{name}": {json.dumps(chance.choice(JUNK))}, '
    files[CONFIG] = (more + text[1:]).encode()


def _others(chance: random.Random, files: Files) -> None:
    name = chance.choice(
        [
            "adapter_model.bin",
            "adapter_model.pt",
            "tokenizer_config.json",
            "x.py",
            "new_embeddings.safetensors",
        ]
    )
    files[name] = chance.choice(
        [b"", b"\x80\x04", b"{}", b'{"auto_map": {"AutoTokenizer": "x.Y"}}']
    )
    if chance.random() < 0.3:
        del files[chance.choice([CONFIG, WEIGHTS])]


MUTATIONS: dict[str, Mutation] = {
    "config": _config,
    "bytes of the config": _bytes_of(CONFIG),
    "bytes of the header": _bytes_of(WEIGHTS, head=True),
    "bytes of the weights": _bytes_of(WEIGHTS),
    "cut off": _cut,
    "grown": _grown,
    "header": _header,
    "a key twice": _twins,
    "other files": _others,
}
_KINDS = [it for it in BAD if not it.startswith(HANGS)]


def mutated(chance: random.Random) -> tuple[str, Files]:
    """What was done to a good adapter, and its files."""
    config, tensors = good(chance)
    if chance.random() < 0.2:
        kind = chance.choice(_KINDS)
        BAD[kind](config, tensors)
    else:
        kind = chance.choice([*MUTATIONS])
    files = {CONFIG: _text(config), WEIGHTS: save(tensors)}
    if kind in MUTATIONS:
        MUTATIONS[kind](chance, files)
    return kind, files


def _text(config: Config) -> bytes:
    return json.dumps(config).encode()


def judged(
    directory: Path, number: int, engine: Engine, reference: Reference, base: ModelShape
) -> tuple[str, float]:
    """`refused`, `accepted`, or what is wrong; and the seconds until the verdict."""
    began = time.monotonic()
    try:
        vet(directory, base=base, max_rank=MAX_RANK)
    except AdapterRefused:
        return "refused", time.monotonic() - began
    except Exception as error:  # noqa: BLE001 - that is what is looked for
        return f"vetting broke: {error!r}", time.monotonic() - began
    took = time.monotonic() - began
    try:
        found = engine.logprobs(directory, number)
    except Exception as error:  # noqa: BLE001
        return f"the engine refused it: {error!r}"[:300], took
    if not all(math.isfinite(it.logprob) for it in found.values()):
        return "the engine gave no finite numbers", took
    expected = reference.logprobs(directory)
    gap = distance(found, expected)
    if gap is not None and gap > SAME:
        return f"the engine answers otherwise than PEFT, by {gap:g}", took
    return "accepted" if gap is not None else "accepted, and PEFT refuses it", took


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    parser.add_argument("--seconds", type=float, default=3000)
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    counted: Counter[str] = Counter()
    slowest, ends = 0.0, time.monotonic() + options.seconds
    with tempfile.TemporaryDirectory() as name:
        model = tiny.make_model(Path(name) / "model")
        engine, reference = Engine(model), Reference(model)
        base = ModelShape(tiny.NAME, tiny.modules())
        for number in range(1, options.count + 1):
            if time.monotonic() > ends:
                print(f"out of time after {number - 1}")
                break
            kind, files = mutated(random.Random(f"{options.seed} {number}"))
            directory = Path(name) / str(number)
            directory.mkdir()
            for file, data in files.items():
                (directory / file).write_bytes(data)
            verdict, took = judged(directory, number, engine, reference, base)
            slowest = max(slowest, took)
            if took > VERDICT_S:
                verdict = f"the verdict took {took:.1f} s"
            word = verdict if verdict in _ALLOWED else "wrong"
            counted[word] += 1
            if word == "wrong":
                print(f"{number}, {kind}: {verdict}", flush=True)
                shutil.copytree(
                    directory, Path(tempfile.gettempdir()) / f"mutated-{number}", dirs_exist_ok=True
                )
            shutil.rmtree(directory)
            if number % 1000 == 0:
                print(f"{number} of {options.count}: {dict(counted)}", flush=True)
    done = sum(counted.values())
    print(f"{done} adapters: {dict(counted)}, slowest verdict {slowest:.2f} s")
    return int(is_bad(counted, options.count))


_ALLOWED = ("refused", "accepted", "accepted, and PEFT refuses it")


def is_bad(counted: Counter[str], asked: int) -> bool:
    done = sum(counted.values())
    few = min(counted["refused"], counted["accepted"]) < asked / 20
    return counted["wrong"] > 0 or done < asked or few


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
