"""Tokens are counted once each, whatever form the answer comes in and however it ends."""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.lora.request import LoRARequest
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind
from vllm.v1.metrics.stats import RequestStateStats

from r3mes_vllm.engine.names import Held, held
from r3mes_vllm.engine.watching import Generation, Outcome, watch

DELTA, CUMULATIVE, FINAL = (
    RequestOutputKind.DELTA,
    RequestOutputKind.CUMULATIVE,
    RequestOutputKind.FINAL_ONLY,
)
PROMPT = {"type": "token", "prompt_token_ids": [1, 2, 3]}
LEGAL = LoRARequest("legal@baf1", 1, "/nowhere")
Step = list[tuple[int, int]]
"""Answers, each with the number of tokens that it gives."""


@dataclass
class Engine:
    """Gives what `steps` say, in the form that is asked for; then it ends, or raises, or hangs."""

    steps: list[Step]
    ends: str = "well"
    output_processor: Any = None
    closed: int = 0

    def __post_init__(self) -> None:
        self.output_processor = SimpleNamespace(request_states={}, add_request=self._add_request)

    def _add_request(self, request: Any, *rest: Any) -> None:
        answers = {index for step in self.steps for index, _ in step}
        total = sum(count for step in self.steps for _, count in step)
        detokenizer = SimpleNamespace(num_output_tokens=lambda: total)
        assert answers
        self.output_processor.request_states[request.request_id] = SimpleNamespace(
            detokenizer=detokenizer
        )

    async def generate(
        self, prompt: Any, params: SamplingParams, request_id: str, **named: Any
    ) -> AsyncGenerator[RequestOutput, None]:
        self.output_processor.add_request(SimpleNamespace(request_id=request_id), None)
        came: dict[int, int] = {}
        try:
            for number, step in enumerate(self.steps):
                last = number == len(self.steps) - 1 and self.ends == "well"
                for index, count in step:
                    came[index] = came.get(index, 0) + count
                if params.output_kind is FINAL and not last:
                    await asyncio.sleep(0)
                    continue
                yield self._output(params.output_kind, step, came, last)
            if self.ends == "raises":
                raise RuntimeError("the engine died")
            if self.ends == "hangs":
                await asyncio.sleep(60)
        finally:
            self.closed += 1

    def _output(
        self, kind: RequestOutputKind, step: Step, came: dict[int, int], last: bool
    ) -> RequestOutput:
        counts = dict(step) if kind is DELTA else came
        parts = [
            CompletionOutput(index, "", [7] * counts[index], None, None)
            for index in (came if kind is FINAL else dict(step))
        ]
        stats = RequestStateStats(
            num_generation_tokens=sum(came.values()),
            queued_ts=5.0,
            scheduled_ts=5.5,
            first_token_ts=6.0,
            last_token_ts=6.9,
            first_token_latency=0.75,
        )
        return RequestOutput("x", None, [1, 2, 3], None, parts, last, metrics=stats)


@dataclass
class Seen:
    generation: Generation
    tokens: list[int] = field(default_factory=list)
    gaps: list[float | None] = field(default_factory=list)
    ends: int = 0

    def generated(self, tokens: int) -> None:
        self.tokens.append(tokens)
        self.gaps.append(self.generation.token_s)

    def ended(self) -> None:
        self.ends += 1


def watched(engine: Engine) -> list[Seen]:
    seen: list[Seen] = []

    def observe(generation: Generation) -> Seen:
        seen.append(Seen(generation))
        return seen[-1]

    watch(engine, [observe])
    return seen


def ask(engine: Engine, kind: RequestOutputKind, name: str = "x", **more: Any) -> Any:
    return engine.generate(PROMPT, SamplingParams(output_kind=kind), name, **more)


async def drain(outputs: AsyncIterator[RequestOutput]) -> int:
    return len([it async for it in outputs])


STEPS: list[Step] = [[(0, 1)], [(0, 2)], [(0, 0)], [(0, 1)]]
SEVERAL: list[Step] = [[(0, 1)], [(1, 2)], [(0, 3)], [(1, 1)]]


@pytest.mark.parametrize("kind", [DELTA, CUMULATIVE])
@pytest.mark.parametrize(("steps", "tokens"), [(STEPS, [1, 2, 1]), (SEVERAL, [1, 2, 3, 1])])
async def test_each_token_of_a_stream_is_told_as_it_comes(
    kind: RequestOutputKind, steps: list[Step], tokens: list[int]
) -> None:
    engine = Engine(steps)
    seen = watched(engine)
    given = await drain(ask(engine, kind))
    assert given == len(steps)
    assert seen[0].tokens == tokens
    it = seen[0].generation
    assert (it.tokens, it.prompt_tokens, it.outcome) == (sum(tokens), 3, Outcome.COMPLETE)
    assert it.queue_s == 0.5
    assert it.first_s is not None
    assert 0 <= it.first_s < 0.5  # measured, where the answer comes bit by bit
    assert (seen[0].ends, engine.closed) == (1, 1)


async def test_the_time_between_tokens_is_that_of_one_answer_and_one_token() -> None:
    engine = Engine(SEVERAL)
    seen = watched(engine)
    async for _ in ask(engine, DELTA):
        await asyncio.sleep(0.02)
    first, second, third, fourth = seen[0].gaps
    assert first is second is None  # the first of each answer
    assert third is not None
    assert fourth is not None
    assert 0.036 / 3 <= third < 0.036  # three tokens, two steps after the first
    assert fourth >= 0.036


@pytest.mark.parametrize("steps", [STEPS, SEVERAL])
async def test_a_whole_answer_is_told_at_its_end(steps: list[Step]) -> None:
    engine = Engine(steps)
    seen = watched(engine)
    await drain(ask(engine, FINAL))
    total = sum(count for step in steps for _, count in step)
    assert seen[0].tokens == [total]
    assert seen[0].generation.tokens == total
    it = seen[0].generation
    assert (it.first_s, it.outcome) == (0.75, Outcome.COMPLETE)
    assert seen[0].gaps == [pytest.approx(0.9 / (total - 1))]


@pytest.mark.parametrize("kind", [DELTA, CUMULATIVE, FINAL])
@pytest.mark.parametrize("steps", [STEPS, SEVERAL])
async def test_what_was_generated_for_a_client_that_left_counts(
    kind: RequestOutputKind, steps: list[Step]
) -> None:
    engine = Engine(steps, ends="hangs")
    seen = watched(engine)
    task = asyncio.create_task(drain(ask(engine, kind)))
    await asyncio.sleep(0.05)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert sum(seen[0].tokens) == sum(count for step in steps for _, count in step)
    assert seen[0].generation.outcome is Outcome.LEFT
    assert (seen[0].ends, engine.closed) == (1, 1)


async def test_a_stream_that_is_closed_early_counts_too() -> None:
    engine = Engine(STEPS)
    seen = watched(engine)
    outputs = ask(engine, DELTA)
    await anext(outputs)
    await outputs.aclose()
    assert seen[0].tokens == [1, 3]
    assert seen[0].generation.outcome is Outcome.LEFT


async def test_a_failure_is_one_and_goes_on_to_who_asked() -> None:
    engine = Engine(STEPS, ends="raises")
    seen = watched(engine)
    with pytest.raises(RuntimeError, match="died"):
        await drain(ask(engine, DELTA))
    assert seen[0].generation.outcome is Outcome.FAILED
    assert seen[0].ends == 1


async def test_what_was_never_begun_is_not_told() -> None:
    engine = Engine(STEPS)
    seen = watched(engine)
    await ask(engine, DELTA).aclose()
    assert not seen


async def test_names_are_those_that_were_asked_for() -> None:
    engine = Engine(STEPS)
    seen = watched(engine)
    await drain(ask(engine, DELTA))
    await drain(ask(engine, DELTA, lora_request=LEGAL))
    held.set(Held("law@baf1", LEGAL))
    await drain(ask(engine, DELTA, lora_request=LEGAL))
    held.set(None)
    told = [(it.generation.adapter, it.generation.cid) for it in seen]
    assert told == [(None, None), ("legal", "baf1"), ("law", "baf1")]


async def test_watching_costs_microseconds_a_token() -> None:
    """Less than 20 µs for a step of one token, on any machine: a token takes a thousand."""
    steps: list[Step] = [[(0, 1)]] * 5000

    async def seconds(prepare: Callable[[Engine], object]) -> float:
        engine = Engine(steps)
        prepare(engine)
        best = float("inf")
        for _ in range(3):
            began = time.perf_counter()
            await drain(ask(engine, DELTA))
            best = min(best, time.perf_counter() - began)
        return best

    plain = await seconds(lambda engine: None)
    assert (await seconds(watched) - plain) / len(steps) < 20e-6
