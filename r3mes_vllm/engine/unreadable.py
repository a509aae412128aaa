"""A request that the engine can't take is a mistake of its client's, whatever vLLM calls it."""

from collections.abc import AsyncGenerator
from types import TracebackType
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.outputs import RequestOutput
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineGenerateError

_BEFORE_THE_ENGINE = "add_request"
_SLIPS = (TypeError, ValueError, AttributeError, LookupError, OverflowError)


def refuse_unreadable(engine: AsyncLLM) -> None:
    """Let what fails before its first token, and for what it asks, fail as a bad request; vLLM says
    that the engine failed."""
    stock = engine.generate

    async def generate(
        prompt: Any, sampling_params: Any, *args: Any, **named: Any
    ) -> AsyncGenerator[RequestOutput, None]:
        outputs = stock(prompt, sampling_params, *args, **named)
        formed = getattr(sampling_params, "structured_outputs", None) is not None
        begun = False
        try:
            async for output in outputs:
                if formed and not begun and _failed(output):
                    raise VLLMValidationError(
                        "no answer has the form that is asked for", parameter="structured_outputs"
                    )
                begun = True
                yield output
        except EngineGenerateError as error:
            if begun or not _is_of_the_request(error.__cause__):
                raise
            raise VLLMValidationError(f"the request can't be taken: {error.__cause__}") from error
        finally:
            await outputs.aclose()

    engine.generate = generate


def _failed(output: RequestOutput) -> bool:
    return any(it.finish_reason == "error" for it in output.outputs)


def _is_of_the_request(error: BaseException | None) -> bool:
    trace: TracebackType | None = error.__traceback__ if error else None
    while trace is not None:
        if trace.tb_frame.f_code.co_name == _BEFORE_THE_ENGINE:
            return isinstance(error, _SLIPS)
        trace = trace.tb_next
    return False
