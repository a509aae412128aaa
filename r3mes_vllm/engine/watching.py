"""What the engine is asked to generate and what it gives, told to observers as it comes.

vLLM's own metrics know a request by the set of all adapters that run. Here each generation has its
adapter's name, whatever came of it: a stream, a whole answer, several answers, a client that left.
"""

import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

from vllm.lora.request import LoRARequest
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.output_processor import OutputProcessor

from r3mes_vllm.engine.names import held


class Outcome(StrEnum):
    COMPLETE = "complete"
    LEFT = "left"
    """Nobody wants the rest of it."""
    FAILED = "failed"


@dataclass(eq=False, slots=True)
class Generation:
    """One request to the engine; a client's request may be several."""

    adapter: str | None
    """The name that was asked for, without `@cid`; None for the base model."""
    cid: str | None
    prompt_tokens: int
    streamed: bool
    began: float = field(default_factory=time.perf_counter)
    tokens: int = 0
    """So far, of all its answers."""
    queue_s: float | None = None
    """None until it is known, and where vLLM keeps no statistics."""
    first_s: float | None = None
    """Until the first token."""
    token_s: float | None = None
    """For each token that came last, since the one before it in the same answer; for all of an
    answer that came as a whole."""
    outcome: Outcome = Outcome.LEFT


class Watch(Protocol):
    """What an observer keeps of one generation."""

    def generated(self, tokens: int) -> None:
        """So many came just now; the generation has them counted already."""

    def ended(self) -> None:
        """Its `outcome` is known. Called once, whatever happened."""


Observer = Callable[[Generation], Watch]
"""Called when a generation begins, in the context of the request that asked for it."""


def watch(engine: AsyncLLM, observers: Sequence[Observer]) -> None:
    """Have `observers` told of all that is generated from now on. The sequence may grow."""
    stock = engine.generate
    _see_states(engine.output_processor)

    def generate(
        prompt: Any, sampling_params: SamplingParams, request_id: str, **named: Any
    ) -> AsyncGenerator[RequestOutput, None]:
        outputs = stock(prompt, sampling_params, request_id, **named)
        asked = named.get("lora_request")
        it = held.get()
        generation = Generation(
            adapter=it.asked.partition("@")[0] if it and asked else _name(asked),
            cid=asked.lora_name.partition("@")[2] or None if asked else None,
            prompt_tokens=_length(prompt),
            streamed=sampling_params.output_kind is not RequestOutputKind.FINAL_ONLY,
        )
        counter = _Counter(generation, sampling_params.output_kind)
        return _watched(outputs, counter, observers)

    engine.generate = generate


async def _watched(
    outputs: AsyncGenerator[RequestOutput, None], counter: "_Counter", observers: Sequence[Observer]
) -> AsyncGenerator[RequestOutput, None]:
    generation = counter.generation
    watches = [begins(generation) for begins in observers]
    try:
        with counter.beginning():
            output = await anext(outputs, None)
        while output is not None:
            if new := counter.take(output):
                for it in watches:
                    it.generated(new)
            if output.finished:
                generation.outcome = Outcome.COMPLETE
            yield output
            output = await anext(outputs, None)
    except Exception:
        generation.outcome = Outcome.FAILED
        raise
    finally:
        try:
            if generation.outcome is not Outcome.COMPLETE and (rest := counter.rest()):
                for it in watches:
                    it.generated(rest)
            await outputs.aclose()
        finally:
            for it in watches:
                it.ended()


class _Counter:
    """Counts tokens into `generation`."""

    def __init__(self, generation: Generation, kind: RequestOutputKind) -> None:
        self.generation = generation
        self.states: list[Any] = []
        """vLLM's, of each answer."""
        self._adds_up = kind is RequestOutputKind.DELTA
        self._came: dict[int, int] = {}
        """Tokens of each answer."""
        self._last: dict[int, float] = {}
        """When its last one came."""

    @contextmanager
    def beginning(self) -> Iterator[None]:
        """In it, vLLM begins the request."""
        token = _beginning.set(self)
        try:
            yield
        finally:
            _beginning.reset(token)

    def take(self, output: RequestOutput) -> int:
        """How many tokens are new."""
        now = time.perf_counter()
        it = self.generation
        it.token_s = None
        new = 0
        for answer in output.outputs:
            new += self._take(answer, now)
        if new:
            if it.first_s is None:
                self._first(output, now)
            if not it.streamed:
                it.token_s = _mean_gap(output.metrics)
            it.tokens += new
        return new

    def _take(self, answer: CompletionOutput, now: float) -> int:
        index, count = answer.index, len(answer.token_ids)
        before = self._came.get(index, 0)
        self._came[index] = before + count if self._adds_up else count
        new = self._came[index] - before
        if new:
            if before:
                self.generation.token_s = (now - self._last[index]) / new
            self._last[index] = now
        return new

    def _first(self, output: RequestOutput, now: float) -> None:
        it, told = self.generation, output.metrics
        it.prompt_tokens = len(output.prompt_token_ids or ()) or it.prompt_tokens
        if told is not None and told.scheduled_ts:
            it.queue_s = max(0.0, told.scheduled_ts - told.queued_ts)
        it.first_s = now - it.began
        if not it.streamed:
            it.first_s = told.first_token_latency if told is not None else None

    def rest(self) -> int:
        """Tokens that were generated and nobody was given: of an answer to be given as a whole,
        when its client left."""
        made = sum(it.detokenizer.num_output_tokens() for it in self.states if it.detokenizer)
        new: int = max(0, made - sum(self._came.values()))
        self.generation.token_s = None
        self.generation.tokens += new
        return new


_beginning: ContextVar[_Counter | None] = ContextVar("r3mes_beginning", default=None)
"""Whose request vLLM is just beginning."""


def _see_states(processor: OutputProcessor) -> None:
    """vLLM forgets a request that is aborted before it says so."""
    stock = processor.add_request

    def add_request(request: EngineCoreRequest, *rest: Any, **named: Any) -> None:
        stock(request, *rest, **named)
        counter = _beginning.get()
        if counter is not None:
            counter.states.append(processor.request_states[request.request_id])

    processor.add_request = add_request


def _name(asked: LoRARequest | None) -> str | None:
    return asked.lora_name.partition("@")[0] if asked else None


def _length(prompt: Any) -> int:
    """In tokens, as vLLM's handlers give it to the engine; else 0 until the first output."""
    return len(prompt.get("prompt_token_ids") or ()) if isinstance(prompt, dict) else 0


def _mean_gap(told: Any) -> float | None:
    """Seconds between two tokens of an answer that came as a whole."""
    if told is None or told.num_generation_tokens < 2:
        return None
    gap: float = (told.last_token_ts - told.first_token_ts) / (told.num_generation_tokens - 1)
    return gap
