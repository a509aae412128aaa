"""Streams of `/v1/completions`, with the moment of every token: the same client for all servers."""

import asyncio
import json
import math
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import aiohttp
import numpy as np


@dataclass
class Answer:
    asked_at: float
    times: list[float] = field(default_factory=list)
    """Of its pieces; a piece is a token, or several that came in one step."""
    tokens: int = 0
    """As the server counts them."""
    error: str = ""

    @property
    def first_s(self) -> float:
        return self.times[0] - self.asked_at

    @property
    def gaps(self) -> list[float]:
        return [after - before for before, after in pairwise(self.times)]


@dataclass(frozen=True)
class Asked:
    model: str
    prompt: int
    """Tokens, random ones of `seed`."""
    answer: int
    """Tokens."""
    seed: int = 0


_IDLE_S = 2.0
"""Of a connection. vLLM's server closes it after five: a request that comes then gets no answer."""


def session() -> aiohttp.ClientSession:
    """With as many connections as it takes."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    limits = aiohttp.ClientTimeout(total=None, sock_read=600)
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=_IDLE_S)
    return aiohttp.ClientSession(connector=connector, timeout=limits)


async def ask(http: aiohttp.ClientSession, url: str, asked: Asked) -> Answer:
    """Never raises for what the server answers; fewer tokens than asked for are an error."""
    rng = np.random.default_rng(asked.seed)
    body = {
        "model": asked.model,
        "prompt": rng.integers(3, 250, asked.prompt).tolist(),
        "max_tokens": asked.answer,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    answer = Answer(time.perf_counter())
    try:
        async with http.post(f"{url}/v1/completions", json=body) as response:
            if response.status != 200:
                answer.error = f"{response.status}: {(await response.text())[:300]}"
                return answer
            reason = ""
            async for line in response.content:
                if line.startswith(b"data: {"):
                    piece = json.loads(line[6:])
                    if "error" in piece:
                        answer.error = line.decode(errors="replace")[:300]
                    for choice in piece.get("choices", ()):
                        answer.times.append(time.perf_counter())
                        reason = choice["finish_reason"] or reason
                    if usage := piece.get("usage"):
                        answer.tokens = usage["completion_tokens"]
            if not answer.error and (reason, answer.tokens) != ("length", asked.answer):
                answer.error = f"it ended by {reason or 'nothing'} after {answer.tokens} tokens"
    except (aiohttp.ClientError, ValueError) as error:
        answer.error = f"{type(error).__name__}: {error}"
    return answer


async def at_once(http: aiohttp.ClientSession, url: str, asked: Sequence[Asked]) -> list[Answer]:
    return list(await asyncio.gather(*(ask(http, url, it) for it in asked)))


async def streams(
    http: aiohttp.ClientSession, url: str, count: int, of: Callable[[int], Asked], for_s: float
) -> dict[str, float]:
    """`count` clients, each asking again as soon as it has its answer, until `for_s` are over.

    Milliseconds until the first token and between tokens, and tokens a second. Raises RuntimeError
    if a request fails.
    """
    answers: list[Answer] = []
    began, number = time.perf_counter(), 0

    async def client() -> None:
        nonlocal number
        while time.perf_counter() < began + for_s:
            number += 1
            answers.append(await ask(http, url, of(number)))

    await asyncio.gather(*(client() for _ in range(count)))
    took = time.perf_counter() - began
    return latencies(answers) | {"tokens_per_s": sum(it.tokens for it in answers) / took}


def latencies(answers: Sequence[Answer]) -> dict[str, float]:
    for it in answers:
        if it.error:
            raise RuntimeError(f"a request failed: {it.error}")
    firsts = [it.first_s * 1000 for it in answers]
    gaps = [gap * 1000 for it in answers for gap in it.gaps] or [0.0]
    return {
        "first_p50": at(firsts, 0.5),
        "first_p99": at(firsts, 0.99),
        "gap_p50": at(gaps, 0.5),
        "gap_p99": at(gaps, 0.99),
    }


def at(values: Sequence[float], part: float) -> float:
    """The quantile: the least of the values that at least `part` of them do not exceed."""
    return sorted(values)[math.ceil(len(values) * part) - 1]
