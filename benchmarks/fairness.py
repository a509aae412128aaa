"""What a cold adapter's request waits beside a hot one's traffic, and what that costs in all.

    python -m benchmarks.fairness [--pairs 5] [--every 5] [--seconds 30] [--json]

SmolLM2-135M in bf16 with one slot: a hot adapter always has twice as many requests as there are
seats, a cold one is asked one question every few seconds. Two processes with the same kernel and
the same flags, one with our schedule and one with vLLM's, work in turn; ratios are of a pair.
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
from pathlib import Path
from typing import Any

import platformdirs

from benchmarks.cpu_lora import ATTENTION, _adapter

SEATS, PROMPT, ANSWER, COLD_ANSWER = 16, 32, 64, 24
"""Requests at once; tokens."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--every", type=float, default=5, help="seconds between cold requests")
    parser.add_argument("--seconds", type=float, default=30, help="of each measurement")
    parser.add_argument("--dtype", default="bfloat16", help="or float32")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--engine", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.engine:
        _work(*options.engine)
        return
    result = measure(options.pairs, options.every, options.seconds, options.dtype)
    print(json.dumps(result, indent=1) if options.json else _told(result))


def measure(pairs: int, every: float, seconds: float, dtype: str) -> dict[str, Any]:
    found: dict[str, list[dict[str, Any]]] = {"stock": [], "ours": []}
    with tempfile.TemporaryDirectory() as name:
        folders = [str(_adapter(Path(name) / it, i, 8, ATTENTION)) for i, it in enumerate("hc")]
        told = [dtype, *folders]
        with _Engine("0", told) as stock, _Engine("1.8", told) as ours:
            for pair in range(pairs):
                order = [("stock", stock), ("ours", ours)]
                for kind, engine in order if pair % 2 else order[::-1]:
                    found[kind].append(engine.run(every, seconds))
                    print(kind, found[kind][-1], file=sys.stderr)
    ratios = [
        ours["tokens_per_s"] / stock["tokens_per_s"]
        for ours, stock in zip(found["ours"], found["stock"], strict=True)
    ]
    return {
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "dtype": dtype,
        "every": every,
        "seconds": seconds,
        "ratio": [round(it, 3) for it in (statistics.median(ratios), min(ratios), max(ratios))],
        **found,
    }


def _told(result: dict[str, Any]) -> str:
    lines = [
        f"SmolLM2-135M-Instruct, {result['dtype']}, {result['machine']}, "
        f"{len(result['ours'])} pairs of {result['seconds']:g} s, "
        f"a cold request every {result['every']:g} s",
        "| schedule | cold waits, median | longest | never began | tokens/s, median |",
        "|---|---|---|---|---|",
    ]
    for kind in ("stock", "ours"):
        waits = [wait for run in result[kind] for wait in run["waits"]]
        never = sum(run["never"] for run in result[kind])
        rate = statistics.median(run["tokens_per_s"] for run in result[kind])
        median = f"{statistics.median(waits):.2f} s | {max(waits):.2f} s" if waits else "- | -"
        lines.append(f"| {kind} | {median} | {never} of {never + len(waits)} | {rate:.0f} |")
    median, least, most = result["ratio"]
    lines.append(f"throughput, of stock's: {median:.2f} ({least:.2f}-{most:.2f}) \u2265 0.9")
    return "\n".join(lines)


class _Engine:
    """A process with an engine; it works only when it is asked to."""

    def __init__(self, cycle: str, told: list[str]) -> None:
        environment = os.environ | {
            "R3MES_ADAPTER_CYCLE": cycle,
            "VLLM_PLUGINS": "r3mes",
            "VLLM_LOGGING_LEVEL": "ERROR",
            "VLLM_CPU_KVCACHE_SPACE": "2",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.fairness", "--engine", *told],
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

    def run(self, every: float, seconds: float) -> dict[str, Any]:
        assert self._process.stdin
        self._process.stdin.write(json.dumps({"every": every, "seconds": seconds}) + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout
        for line in self._process.stdout:
            if line.startswith('{"waits"'):
                found: dict[str, Any] = json.loads(line)
                return found
        raise RuntimeError(f"the engine ended with {self._process.wait()}")


def _work(dtype: str, *folders: str) -> None:
    """An engine that takes a measurement a line from standard input and prints what it found."""
    from vllm import EngineArgs, LLMEngine, SamplingParams
    from vllm.lora.request import LoRARequest

    from r3mes_vllm.engine.base_model import embedded_base_model

    model = embedded_base_model(Path(platformdirs.user_cache_dir("r3mes-vllm")))
    engine = LLMEngine.from_engine_args(
        EngineArgs(
            str(model),
            dtype=dtype,
            enable_lora=True,
            max_loras=1,
            max_cpu_loras=2,
            max_lora_rank=8,
            max_model_len=1024,
            max_num_seqs=SEATS,
            seed=0,
        )
    )
    hot, cold = (LoRARequest(f"a{i}", i, folder) for i, folder in enumerate(folders, 1))
    asked = 0

    def ask(name: str, adapter: LoRARequest, answer: int) -> None:
        nonlocal asked
        asked += 1
        prompt: Any = {"prompt_token_ids": [1000 + (asked * 37 + i) % 30000 for i in range(PROMPT)]}
        params = SamplingParams(temperature=0, max_tokens=answer, ignore_eos=True, detokenize=False)
        engine.add_request(name, prompt, params, lora_request=adapter)

    def measured(every: float, seconds: float) -> dict[str, Any]:
        began, count, number = time.monotonic(), 0, 0
        seen: dict[str, int] = {}
        asked_at: dict[str, float] = {}
        waits: dict[str, float] = {}
        while (now := time.monotonic()) < began + seconds:
            while sum(name.startswith("hot") for name in seen) < 2 * SEATS:
                number += 1
                seen[name := f"hot-{number}"] = 0
                ask(name, hot, ANSWER + 7 * (number % 9))  # not all to end at once
            if now - began > every * (len(asked_at) + 0.5):
                asked_at[name := f"cold-{len(asked_at)}"] = now
                seen[name] = 0
                ask(name, cold, COLD_ANSWER)
            for output in engine.step():
                name, length = output.request_id, len(output.outputs[0].token_ids)
                count += length - seen[name]
                seen[name] = length
                if name in asked_at and length:
                    waits.setdefault(name, time.monotonic() - asked_at[name])
                if output.finished:
                    del seen[name]
        took = time.monotonic() - began
        engine.abort_request(list(seen))
        while engine.has_unfinished_requests():
            engine.step()
        never = len(asked_at) - len(waits)
        return {"waits": list(waits.values()), "never": never, "tokens_per_s": count / took}

    measured(1, 5)
    print('{"waits": []}', flush=True)
    for line in sys.stdin:
        print(json.dumps(measured(**json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
