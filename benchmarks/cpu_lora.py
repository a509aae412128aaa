"""Throughput that is kept with adapters on the CPU: ours and stock vLLM, side by side.

    python -m benchmarks.cpu_lora [--rounds 5] [--only NAME] [--json]

SmolLM2-135M in bf16; the two engines run in processes of their own with the same flags, one works
while the other waits, and they alternate. Each round measures the base model and the adapters on
each engine; ratios are of one round, then the median and the spread of the rounds.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs
from safetensors.numpy import save_file

HIDDEN, INNER, LAYERS, VALUES = 576, 1536, 30, 192
ATTENTION = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN, VALUES),
    "self_attn.v_proj": (HIDDEN, VALUES),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
}
LINEAR = ATTENTION | {
    "mlp.gate_proj": (HIDDEN, INNER),
    "mlp.up_proj": (HIDDEN, INNER),
    "mlp.down_proj": (INNER, HIDDEN),
}


@dataclass(frozen=True)
class Case:
    name: str
    engine: str
    adapters: int
    of_base: float | None
    """Target: this share of the base model's throughput."""
    of_stock: float | None
    """Target: so many times stock's throughput."""
    requests: int = 16
    prompt: int = 32
    """Tokens."""
    answer: int = 48
    """Tokens."""


ENGINES = {
    "8 slots": {"max_loras": 8, "max_cpu_loras": 32, "max_lora_rank": 8},
    "8 slots, all linear": {"max_loras": 8, "max_cpu_loras": 32, "max_lora_rank": 8},
    "32 slots": {"max_loras": 32, "max_cpu_loras": 32, "max_lora_rank": 16},
}
CASES = [
    Case("8 adapters, 8 slots", "8 slots", 8, 0.93, 2.1),
    Case("1 adapter, 8 slots", "8 slots", 1, 0.95, None),
    Case("prefill of 2,000 tokens", "8 slots", 1, 0.9, None, requests=1, prompt=2000, answer=1),
    Case("16 adapters over 8 slots", "8 slots", 16, None, 2.2),
    Case("8 adapters, all linear layers", "8 slots, all linear", 8, 0.87, None),
    Case("16 adapters, 32 slots, rank 16", "32 slots", 16, 0.85, 2.3),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", help="a part of a case's name")
    parser.add_argument("--dtype", default="bfloat16", help="or float32")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--engine", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.engine:
        _work(json.loads(options.engine))
        return
    result = measure(options.rounds, options.only or "", options.dtype)
    print(json.dumps(result, indent=1) if options.json else _told(result))


def measure(rounds: int, only: str, dtype: str) -> dict[str, Any]:
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        for engine, flags in ENGINES.items():
            cases = [case for case in CASES if case.engine == engine and only in case.name]
            if not cases:
                continue
            modules = LINEAR if "all linear" in engine else ATTENTION
            folders = [
                _adapter(Path(name) / engine / str(number), number, 8, modules)
                for number in range(16)
            ]
            told = flags | {"adapters": [str(folder) for folder in folders], "dtype": dtype}
            with _Engine("stock", told) as stock, _Engine("ours", told) as ours:
                found += [_measured(case, ours, stock, rounds) for case in cases]
    return {
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "model": f"SmolLM2-135M-Instruct, {dtype}",
        "rounds": rounds,
        "cases": found,
    }


def _measured(case: Case, ours: "_Engine", stock: "_Engine", rounds: int) -> dict[str, Any]:
    rates: list[list[float]] = [[], [], [], []]
    for turn in range(rounds + 1):
        row = [
            engine.rate(case, adapters)
            for engine in (ours, stock)
            for adapters in (0, case.adapters)
        ]
        print(case.name, *(f"{rate:.0f}" for rate in row), file=sys.stderr)
        if turn:  # the first warms up
            for into, rate in zip(rates, row, strict=True):
                into.append(rate)
    base, adapted, plain, other = rates
    return asdict(case) | {
        "ours_of_base": _ratios(adapted, base),
        "stock_of_base": _ratios(other, plain),
        "ours_of_stock": _ratios(adapted, other),
        "base_of_stock_base": _ratios(base, plain),
        "tokens_per_s": statistics.median(adapted),
    }


def _ratios(of: list[float], to: list[float]) -> list[float]:
    """Median, least, most."""
    ratios = [a / b for a, b in zip(of, to, strict=True)]
    return [round(it, 3) for it in (statistics.median(ratios), min(ratios), max(ratios))]


def _told(result: dict[str, Any]) -> str:
    lines = [f"{result['model']}, {result['machine']}, {result['rounds']} rounds, alternating"]
    lines.append("| case | of base (target) | times stock (target) | stock of base | tokens/s |")
    lines.append("|---|---|---|---|---|")
    for case in result["cases"]:
        of_base, of_stock, stock = (
            f"{median:.2f} ({low:.2f}-{high:.2f})"
            for median, low, high in (
                case["ours_of_base"],
                case["ours_of_stock"],
                case["stock_of_base"],
            )
        )
        lines.append(
            f"| {case['name']} | {of_base}{_target(case['of_base'])}"
            f" | {of_stock}{_target(case['of_stock'])} | {stock} | {case['tokens_per_s']:.0f} |"
        )
    return "\n".join(lines)


def _target(value: float | None) -> str:
    return "" if value is None else f" \u2265 {value}"


class _Engine:
    """A process with an engine; it works only when it is asked to."""

    def __init__(self, kind: str, flags: dict[str, Any]) -> None:
        environment = os.environ | {
            "VLLM_PLUGINS": "r3mes" if kind == "ours" else "none",
            "VLLM_LOGGING_LEVEL": "ERROR",
            "VLLM_CPU_KVCACHE_SPACE": "2",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.cpu_lora", "--engine", json.dumps(flags)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def __enter__(self) -> "_Engine":
        self._read()
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()

    def rate(self, case: Case, adapters: int) -> float:
        """Tokens a second, of the prompt if the answer is one token."""
        assert self._process.stdin
        job = {
            "adapters": adapters,
            "requests": case.requests,
            "prompt": case.prompt,
            "answer": case.answer,
        }
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        return case.requests * (case.answer if case.answer > 1 else case.prompt) / self._read()

    def _read(self) -> float:
        assert self._process.stdout
        for line in self._process.stdout:
            if line.startswith("seconds "):
                return float(line.split()[1])
        raise RuntimeError(f"the engine ended with {self._process.wait()}")


def _work(flags: dict[str, Any]) -> None:
    """An engine that takes a job a line from standard input, and answers with its seconds."""
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    from r3mes_vllm.engine.base_model import embedded_base_model

    folders = flags.pop("adapters")
    engine = LLM(
        str(embedded_base_model(Path(platformdirs.user_cache_dir("r3mes-vllm")))),
        enable_lora=True,
        max_model_len=2304,
        max_num_batched_tokens=2304,
        max_num_seqs=16,
        enable_prefix_caching=False,
        seed=0,
        **flags,
    )
    requests = [LoRARequest(f"a{i}", i + 1, folder) for i, folder in enumerate(folders)]
    print("seconds 0", flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        rng = np.random.default_rng(0)
        prompts = [
            {"prompt_token_ids": rng.integers(1000, 40000, job["prompt"]).tolist()}
            for _ in range(job["requests"])
        ]
        count = job["adapters"]
        adapters = [requests[i % count] if count else None for i in range(job["requests"])]
        params = SamplingParams(
            temperature=0, max_tokens=job["answer"], ignore_eos=True, detokenize=False
        )
        began = time.perf_counter()
        engine.generate(prompts, params, lora_request=adapters, use_tqdm=False)
        print(f"seconds {time.perf_counter() - began}", flush=True)


def _adapter(folder: Path, seed: int, rank: int, modules: dict[str, tuple[int, int]]) -> Path:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    tensors = {}
    for layer in range(LAYERS):
        for module, (inputs, outputs) in modules.items():
            name = f"base_model.model.model.layers.{layer}.{module}"
            for part, shape in (("A", (rank, inputs)), ("B", (outputs, rank))):
                values = rng.standard_normal(shape, dtype=np.float32) * 0.02
                tensors[f"{name}.lora_{part}.weight"] = values
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": sorted(module.rpartition(".")[2] for module in modules),
        "base_model_name_or_path": "HuggingFaceTB/SmolLM2-135M-Instruct",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


if __name__ == "__main__":
    main()
