"""Answers that another node can go on with, and going on with another node's (see `carry`).

The rest of an answer is asked of the engine with the tokens so far as a part of the prompt, which
costs one prefill. Where the engine would then answer otherwise, because a penalty, a form or a seed
counts from the answer's first token, the whole is generated again and has to come out the same.
"""

import asyncio
import copy
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, cast

from vllm.exceptions import VLLMValidationError
from vllm.logprobs import Logprob
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.detokenizer import IncrementalDetokenizer

from r3mes_vllm.carry import HEADER, Past, Step
from r3mes_vllm.errors import EngineError

_LONGEST_TOKEN = 16
"""Characters, in the mean of an answer."""


class Texts:
    """Answers so far, of nodes that did not say their tokens."""

    def __init__(self, engine: AsyncLLM) -> None:
        self._longest = engine.model_config.max_model_len * _LONGEST_TOKEN
        self._tokenizer = copy.deepcopy(engine.get_tokenizer())
        self._lock = asyncio.Lock()

    async def in_tokens(self, past: Past) -> Past:
        """Encoded aside, for a long one takes seconds. Raises ValueError if it is too long."""
        if past.steps is not None:
            return past
        if len(past.text) > self._longest:
            raise ValueError("it is longer than the context")
        async with self._lock:  # two threads may not use one tokenizer
            tokens = await asyncio.to_thread(
                self._tokenizer.encode, past.text, add_special_tokens=False
            )
        return Past([Step(tokens)])


class Carried:
    """Of one client's request: what its answer is to go on with, and what the engine gave."""

    def __init__(self, past: Past | None) -> None:
        self.past = past
        self._fresh: list[Step] | None = []
        self._begun = False

    def take(self) -> list[Step] | None:
        """The steps since the last time; None if one answer of one generation can't be told."""
        if self._fresh is None:
            return None
        taken, self._fresh = self._fresh, []
        return taken

    def begin(self, params: SamplingParams) -> None:
        if self._begun or params.n != 1 or params.output_kind is not RequestOutputKind.DELTA:
            self._fresh = None
        self._begun = True

    def note(self, output: RequestOutput) -> None:
        if self._fresh is not None:
            [part] = output.outputs
            if not part.token_ids and not part.finish_reason:
                self._fresh = None
                return
            step = Step(list(part.token_ids), part.finish_reason, part.stop_reason)
            self._fresh.append(step)


carried: ContextVar[Carried | None] = ContextVar("r3mes_carried", default=None)


def carry(engine: AsyncLLM) -> None:
    """Heed `carried` from now on."""
    stock = engine.generate

    def generate(
        prompt: Any, sampling_params: SamplingParams, request_id: str, **named: Any
    ) -> AsyncGenerator[RequestOutput, None]:
        it = carried.get()
        if it is None:
            plain: AsyncGenerator[RequestOutput, None]
            plain = stock(prompt, sampling_params, request_id, **named)
            return plain
        it.begin(sampling_params)
        if it.past is None:
            outputs = stock(prompt, sampling_params, request_id, **named)
        else:
            answer = _Answer(engine, it.past, prompt, sampling_params, request_id)
            outputs = answer.go_on(stock, named)
        return _noted(it, outputs)

    engine.generate = generate


async def _noted(
    it: Carried, outputs: AsyncGenerator[RequestOutput, None]
) -> AsyncGenerator[RequestOutput, None]:
    async with aclosing(outputs):
        async for output in outputs:
            it.note(output)
            yield output


@dataclass
class _Asked:
    """As much of an EngineCoreRequest as a detokenizer reads."""

    request_id: str
    prompt_token_ids: list[int]
    sampling_params: SamplingParams
    prompt_embeds: None = None


class _Answer:
    """One that began elsewhere. Its text is made here and not by vLLM's output processor, which
    would take the tokens so far for the prompt's: half a letter or half a stop string may be among
    their last."""

    def __init__(
        self, engine: AsyncLLM, past: Past, prompt: Any, params: SamplingParams, request_id: str
    ) -> None:
        self._prompt = prompt
        self._tokens: list[int] = _prompt_tokens(prompt, params)
        self._params = params
        self._id = request_id
        tokenizer = engine.get_tokenizer()
        self._past: Sequence[Step] = past.steps or []
        self._so_far = [token for step in self._past for token in step.tokens]
        if any(token >= engine.model_config.get_vocab_size() for token in self._so_far):
            raise VLLMValidationError("a token is not in the vocabulary", parameter=HEADER)
        if len(self._tokens) + len(self._so_far) > engine.model_config.max_model_len:
            raise VLLMValidationError("it is longer than the context", parameter=HEADER)
        asked = cast(EngineCoreRequest, _Asked(request_id, self._tokens, params))
        self._text = IncrementalDetokenizer.from_new_request(tokenizer, asked)

    async def go_on(self, stock: Any, named: dict[str, Any]) -> AsyncGenerator[RequestOutput, None]:
        """The outputs so far, then new ones."""
        if self._past and self._past[-1].finish:
            for output in self._again(named):
                yield output
            return
        repeats = _must_repeat(self._prompt, self._params)
        prompt, params = self._prompt, self._params.clone()
        params.stop, params.prompt_logprobs = [], None
        left = len(self._so_far) if repeats else 0
        if not repeats:
            for output in self._again(named):
                yield output
            count = len(self._so_far)
            prompt = {"type": "token", "prompt_token_ids": [*self._tokens, *self._so_far]}
            prompt |= {k: v for k, v in self._prompt.items() if k in ("cache_salt", "arrival_time")}
            params.max_tokens = params.max_tokens and max(1, params.max_tokens - count)
            params.min_tokens = max(0, params.min_tokens - count)
        async with aclosing(stock(prompt, params, self._id, **named)) as outputs:
            async for output in outputs:
                if left:
                    left = self._check(output.outputs[0], left)
                    if left:
                        continue
                    for earlier in self._again(named):
                        yield earlier
                if output.outputs[0].token_ids or output.finished:
                    yield self._told(output)
                if output.finished:
                    return

    def _again(self, named: dict[str, Any]) -> list[RequestOutput]:
        """Each step that there was."""
        return [self._said(step, named.get("lora_request")) for step in self._past]

    def _said(self, step: Step, lora_request: Any) -> RequestOutput:
        logprobs: list[dict[int, Logprob]] | None = None
        if self._params.logprobs is not None:  # their reader has had the real ones
            logprobs = [{token: Logprob(0.0, 1, "")} for token in step.tokens]
        part = CompletionOutput(0, "", list(step.tokens), 0.0, logprobs, lora_request=lora_request)
        part.finish_reason, part.stop_reason = step.finish, step.stop
        finished = step.finish is not None
        output = RequestOutput(
            self._id, self._prompt.get("prompt"), self._tokens, None, [part], finished
        )
        stopped = finished and step.finish == "stop" and not isinstance(step.stop, str)
        self._text.update(list(step.tokens), stopped)
        part.text = self._text.get_next_output_text(finished, delta=True)
        return output

    def _check(self, part: CompletionOutput, left: int) -> int:
        """How many of the tokens so far are still to come after those of `part`, which keeps what
        it has beyond them. Raises EngineError if they are others."""
        done = len(self._so_far) - left
        came = list(part.token_ids[:left])
        early = part.finish_reason is not None and len(part.token_ids) <= left
        if came != self._so_far[done : done + len(came)] or early:
            raise EngineError("another answer came than the one that began elsewhere")
        part.token_ids = part.token_ids[len(came) :]
        if part.logprobs is not None:
            part.logprobs = part.logprobs[len(came) :]
        return left - len(came)

    def _told(self, output: RequestOutput) -> RequestOutput:
        """`output`, of the rest alone, as of the whole answer."""
        [part] = output.outputs
        before = self._text.num_output_tokens()
        stop = self._text.update(list(part.token_ids), part.finish_reason == "stop")
        if stop is not None:
            part.finish_reason, part.stop_reason, output.finished = "stop", stop, True
            part.token_ids = self._text.output_token_ids[before:]
            if part.logprobs is not None:
                part.logprobs = part.logprobs[: len(part.token_ids)]
        part.text = self._text.get_next_output_text(output.finished, delta=True)
        output.prompt, output.prompt_token_ids = self._prompt.get("prompt"), self._tokens
        return output


def _prompt_tokens(prompt: Any, params: SamplingParams) -> list[int]:
    tokens = prompt.get("prompt_token_ids") if isinstance(prompt, dict) else None
    if tokens is None or params.n != 1 or params.output_kind is not RequestOutputKind.DELTA:
        raise VLLMValidationError("only one streamed answer can be gone on with", parameter=HEADER)
    return list(tokens)


def _must_repeat(prompt: Any, params: SamplingParams) -> bool:
    """A repetition penalty counts the prompt's tokens too, so it needs none of this."""
    return bool(
        prompt.get("type") != "token"
        or params.structured_outputs
        or params.bad_words
        or params.extra_args
        # a sample without a seed never comes out the same: it goes on, and they count from there
        or ((params.presence_penalty or params.frequency_penalty) and not params.temperature)
        or (params.seed is not None and params.temperature)
    )
