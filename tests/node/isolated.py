"""As `tests.engine.isolation`, through a node: many requests open at once, to more adapters than it
keeps. Does each get what it gets alone?

    python -m tests.node.isolated [--requests 10000] [--at-once 256] [--seed N]

Prints the same counts as JSON; the status is 1 if an answer is another's.
"""

import argparse
import asyncio
import json
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import aiohttp

from tests import tiny
from tests.engine.isolation import (
    ADAPTERS,
    KEPT,
    LONGEST,
    PROMPTS,
    SLOTS,
    Answer,
    compared,
    problems,
)
from tests.programs import free_port, program, verdict

NAMES = [tiny.NAME, *(f"a{number}" for number in range(1, ADAPTERS + 1))]
_STARTS_S = 300
_PATIENCE_S = 600.0
"""Of a request, for an adapter that is not kept while those that are have others' requests."""


@contextmanager
def node(folder: Path, chance: random.Random, at_once: int) -> Iterator[str]:
    adapters = ",".join(
        f"{name}={tiny.make_adapter(folder / name, seed=seed, rank=chance.choice([1, 4, 8, 16]))}"
        for seed, name in enumerate(NAMES[1:], 1)
    )
    url = f"http://127.0.0.1:{(port := free_port())}"
    model = tiny.make_model(folder / tiny.NAME)
    with program(
        folder,
        *("serve", "--loras", adapters, "--model", str(model), "--max-loras", str(SLOTS)),
        *("--host", "127.0.0.1", "--port", str(port), "--backend-url", "http://127.0.0.1:9"),
        *("--load-wait", str(_PATIENCE_S), "--", "--max-cpu-loras", str(KEPT)),
        *("--max-num-seqs", str(at_once), "--max-num-batched-tokens", str(2 * at_once)),
        url=url,
    ) as running:
        running.wait_for("/ready", _STARTS_S)
        yield url
        if "Traceback" in running.output():
            sys.exit(running.output()[-20_000:])


class Trial:
    def __init__(self, url: str, http: aiohttp.ClientSession, chance: random.Random) -> None:
        self._url = f"{url}/v1/completions"
        self._http = http
        self._chance = chance
        # Some begin alike, so that the prefix cache has something to give to the wrong one.
        begins = [self._tokens(length) for length in (16, 64, 300)]
        self._prompts = [
            chance.choice(begins) + self._tokens(chance.randint(1, 40)) for _ in range(PROMPTS)
        ]
        self._alone: dict[tuple[str, int], Answer] = {}

    async def run(self, requests: int, at_once: int) -> Counter[str]:
        for name in NAMES:
            for prompt in range(PROMPTS):
                self._alone[name, prompt] = await self._ask(name, prompt, LONGEST)
        for prompt in range(PROMPTS):
            whole = {tuple(self._alone[name, prompt].tokens) for name in NAMES}
            if len(whole) < len(NAMES):
                raise RuntimeError("two adapters say the same: this would find nothing")
        found = Counter(requests=0, identical=0, ties=0, wrong=0)
        left = iter(range(requests))

        async def client() -> None:
            for _ in left:
                name = self._chance.choice([tiny.NAME, *NAMES])
                prompt = self._chance.randrange(PROMPTS)
                answer = await self._ask(name, prompt, self._chance.randint(1, LONGEST))
                found["requests"] += 1
                found[compared(answer, self._alone[name, prompt])] += 1

        async with asyncio.TaskGroup() as clients:
            for _ in range(at_once):
                clients.create_task(client())
        return found

    def _tokens(self, count: int) -> list[int]:
        return [self._chance.randrange(20, 250) for _ in range(count)]

    async def _ask(self, model: str, prompt: int, length: int) -> Answer:
        body = {
            "model": model,
            "prompt": self._prompts[prompt],
            "max_tokens": length,
            "temperature": 0,
            "ignore_eos": True,
            "logprobs": 2,
            "return_tokens_as_token_ids": True,
        }
        async with self._http.post(self._url, json=body) as answer:
            told = await answer.json()
            if answer.status != 200:
                raise RuntimeError(f"{answer.status}: {told}")
        given = told["choices"][0]["logprobs"]
        leads = [
            mine - max(value for other, value in likely.items() if other != token)
            for token, mine, likely in zip(
                given["tokens"], given["token_logprobs"], given["top_logprobs"], strict=True
            )
        ]
        tokens = [int(it.removeprefix("token_id:")) for it in given["tokens"]]
        return Answer(tokens, given["token_logprobs"], leads)


async def trial(url: str, requests: int, at_once: int, chance: random.Random) -> Counter[str]:
    limits = aiohttp.ClientTimeout(total=_PATIENCE_S)
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), timeout=limits
    ) as http:
        return await Trial(url, http, chance).run(requests, at_once)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--at-once", type=int, default=256)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 30))
    options = parser.parse_args()
    print(f"seed {options.seed}", file=sys.stderr, flush=True)
    chance = random.Random(options.seed)
    with (
        tempfile.TemporaryDirectory() as folder,
        node(Path(folder), chance, options.at_once) as url,
    ):
        found = asyncio.run(trial(url, options.requests, options.at_once, chance))
    print(json.dumps(found), flush=True)
    return verdict(problems(found, options.requests))


if __name__ == "__main__":
    sys.exit(main())
