"""What fails in vLLM before the engine has it, and whose mistake that is."""

from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.exceptions import VLLMValidationError
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

from r3mes_vllm.engine.unreadable import refuse_unreadable

FORMED = SimpleNamespace(structured_outputs=object())
FREE = SimpleNamespace(structured_outputs=None)


class Engine:
    """As vLLM's: what goes wrong with one request is an EngineGenerateError."""

    def __init__(self, error: Exception | None = None, *reasons: str | None) -> None:
        self._error = error
        self._reasons = reasons

    async def add_request(self) -> None:
        if self._error and not self._reasons:
            raise self._error

    async def generate(self, prompt: Any, params: Any) -> AsyncIterator[RequestOutput]:
        try:
            await self.add_request()
            for reason in self._reasons:
                part = CompletionOutput(0, "x", [5], None, None, finish_reason=reason)
                yield RequestOutput("x", "say", [1], None, [part], finished=reason is not None)
            if self._error:
                raise self._error
        except EngineDeadError:
            raise
        except Exception as error:
            raise EngineGenerateError from error


async def outcome(engine: Any, params: Any, *, protected: bool = True) -> list[str | None]:
    if protected:
        refuse_unreadable(engine)
    found = [output async for output in engine.generate("say", params)]
    return [output.outputs[0].finish_reason for output in found]


@pytest.mark.parametrize(
    "error", [AttributeError("get"), OverflowError("big"), TypeError("x"), ValueError("x")]
)
async def test_what_can_t_be_given_to_the_engine_is_a_bad_request(error: Exception) -> None:
    with pytest.raises(VLLMValidationError, match=str(error)):
        await outcome(Engine(error), FREE)


async def test_without_it_the_engine_is_said_to_have_failed() -> None:
    with pytest.raises(EngineGenerateError):
        await outcome(Engine(AttributeError("get")), FREE, protected=False)


async def test_a_form_that_no_answer_has_is_a_bad_request() -> None:
    with pytest.raises(VLLMValidationError) as caught:
        await outcome(Engine(None, "error"), FORMED)
    assert caught.value.parameter == "structured_outputs"
    assert await outcome(Engine(None, "error"), FORMED, protected=False) == ["error"]


@pytest.mark.parametrize(
    ("params", "reasons"),
    [(FREE, ["error"]), (FORMED, [None, "error"]), (FORMED, [None, "stop"]), (FREE, ["length"])],
)
async def test_other_answers_are_left_alone(params: Any, reasons: list[str | None]) -> None:
    assert await outcome(Engine(None, *reasons), params) == reasons


@pytest.mark.parametrize("engine", [Engine(MemoryError()), Engine(KeyError("x"), None)])
async def test_a_failure_of_the_engines_stays_one(engine: Engine) -> None:
    with pytest.raises(EngineGenerateError):
        await outcome(engine, FREE)


async def test_a_dead_engine_is_a_dead_engine() -> None:
    with pytest.raises(EngineDeadError):
        await outcome(Engine(EngineDeadError()), FREE)
