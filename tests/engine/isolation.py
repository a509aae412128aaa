"""Random requests to many adapters at once: does each get what it gets alone?

    python -m tests.engine.isolation [--requests 5000] [--seed N] [--stock]

On the small test model with fewer slots than adapters, chunked prefills and the prefix cache on.
Prints its seed, and as JSON how many answers were identical, how many parted where two tokens were
as likely (`ties`: bf16 sums in another order), how many were another model's (`wrong`), and how
many were computed while those of other adapters were. Exit status 1 if one was wrong, or more than
a tenth were ties; if too few were beside others; and if it has not ended in time.
"""

import argparse
import faulthandler
import json
import os
import random
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.programs import verdict

ADAPTERS, SLOTS, KEPT, AT_ONCE = 20, 4, 8, 16
PROMPTS = 8
LONGEST = 12
"""Tokens of an answer."""
LIMIT_S, EACH_S = 600, 2.0
"""Seconds for the start, and for each request, after which it ends."""
TIE = 0.25
"""In log-probability: how far apart rounding in bf16 may move two tokens of this model."""


@dataclass(frozen=True)
class Answer:
    tokens: list[int]
    logprobs: list[float]
    """Of those tokens."""
    leads: list[float]
    """Of each over the next likely one."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 30))
    parser.add_argument("--stock", action="store_true", help="vLLM without this package")
    options = parser.parse_args()
    print(f"seed {options.seed}", file=sys.stderr, flush=True)
    found = tried(options.requests, options.seed, stock=options.stock)
    print(json.dumps(found | {"seed": options.seed}), flush=True)
    return verdict(problems(found, options.requests))


def tried(requests: int, seed: int, *, stock: bool) -> dict[str, int]:
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_PLUGINS": "none" if stock else "r3mes",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    faulthandler.dump_traceback_later(LIMIT_S + EACH_S * requests, exit=True)
    try:
        with tempfile.TemporaryDirectory() as folder:
            return Trial(Path(folder), seed).run(requests)
    finally:
        faulthandler.cancel_dump_traceback_later()


def problems(found: Mapping[str, int], requests: int) -> list[str]:
    """Why the run has failed, or shown nothing; "beside others" if it was counted."""
    said = []
    if found["wrong"]:
        said.append(f"{found['wrong']} answers were another model's")
    if not 0 < requests == found["requests"]:
        said.append(f"{found['requests']} answers, of {requests} asked for")
    if found["identical"] + found["ties"] + found["wrong"] != found["requests"]:
        said.append("not each answer was compared")
    if found["ties"] > 0.1 * found["requests"]:
        said.append(f"{found['ties']} answers parted, too many for ties")
    beside = found.get("beside others", found["requests"])
    if beside < 0.9 * found["requests"]:
        said.append(f"only {beside} were computed beside those of other adapters")
    return said


class Trial:
    def __init__(self, folder: Path, seed: int) -> None:
        from vllm import EngineArgs, LLMEngine
        from vllm.lora.request import LoRARequest

        from tests import tiny

        self._chance = random.Random(seed)
        model = tiny.make_model(folder / tiny.NAME)
        self._adapters: list[Any] = [None]
        for number in range(1, ADAPTERS + 1):
            rank = self._chance.choice([1, 4, 8, 16])
            path = tiny.make_adapter(folder / str(number), seed=number, rank=rank)
            self._adapters.append(LoRARequest(f"a{number}", number, str(path)))
        self._engine = LLMEngine.from_engine_args(
            EngineArgs(
                str(model),
                enable_lora=True,
                max_loras=SLOTS,
                max_cpu_loras=KEPT,
                max_lora_rank=16,
                max_num_seqs=AT_ONCE,
                max_num_batched_tokens=256,
                enable_prefix_caching=True,
                seed=0,
            )
        )
        # Some begin alike, so that the prefix cache has something to give to the wrong one.
        begins = [self._tokens(length) for length in (16, 64, 300)]
        self._prompts = [
            self._chance.choice(begins) + self._tokens(self._chance.randint(1, 40))
            if self._chance.random() < 0.7
            else self._tokens(self._chance.randint(1, 200))
            for _ in range(PROMPTS)
        ]
        self._alone: dict[tuple[int, int], Answer] = {}

    def run(self, requests: int) -> dict[str, int]:
        for adapter in range(len(self._adapters)):
            for prompt in range(len(self._prompts)):
                self._ask("alone", adapter, prompt, LONGEST)
                while self._engine.has_unfinished_requests():
                    for output in self._engine.step():
                        if output.finished:
                            self._alone[adapter, prompt] = answer_of(output)
        found = {"requests": 0, "identical": 0, "ties": 0, "wrong": 0, "beside others": 0}
        asked: dict[str, tuple[int, int]] = {}
        left = requests
        while left or self._engine.has_unfinished_requests():
            while left and len(asked) < 2 * AT_ONCE and self._chance.random() < 0.7:
                left -= 1
                adapter = self._chance.choice([0, *range(len(self._adapters))])
                prompt = self._chance.randrange(len(self._prompts))
                asked[str(left)] = adapter, prompt
                self._ask(str(left), adapter, prompt, self._chance.randint(1, LONGEST))
            for output in self._engine.step():
                if output.finished:
                    found["beside others"] += len({it for it, _ in asked.values()}) > 1
                    alone = self._alone[asked.pop(output.request_id)]
                    found["requests"] += 1
                    found[compared(answer_of(output), alone)] += 1
        return found

    def _tokens(self, count: int) -> list[int]:
        return [self._chance.randrange(20, 250) for _ in range(count)]

    def _ask(self, request_id: str, adapter: int, prompt: int, length: int) -> None:
        from vllm import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=length, ignore_eos=True, logprobs=2)
        tokens: Any = {"prompt_token_ids": self._prompts[prompt]}
        self._engine.add_request(request_id, tokens, params, lora_request=self._adapters[adapter])


def answer_of(output: Any) -> Answer:
    [completion] = output.outputs
    logprobs, leads = [], []
    for token, position in zip(completion.token_ids, completion.logprobs, strict=True):
        mine = position[token].logprob
        logprobs.append(mine)
        leads.append(mine - max(it.logprob for key, it in position.items() if key != token))
    return Answer(list(completion.token_ids), logprobs, leads)


def compared(found: Answer, alone: Answer) -> str:
    for at, token in enumerate(found.tokens):
        if token != alone.tokens[at]:
            return "ties" if alone.leads[at] < TIE and found.leads[at] < TIE else "wrong"
        if abs(found.logprobs[at] - alone.logprobs[at]) > TIE:
            return "wrong"
    return "identical"


if __name__ == "__main__":
    sys.exit(main())
