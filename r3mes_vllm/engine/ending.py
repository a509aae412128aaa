"""How requests and the engine end when something is wrong: as errors, and at once."""

import logging
import os
import signal
from asyncio import CancelledError
from collections.abc import AsyncGenerator
from typing import Any

import psutil
from vllm.exceptions import RetryableRequestError, VLLMClientError
from vllm.outputs import RequestOutput
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from r3mes_vllm.discretion import raised
from r3mes_vllm.errors import R3mesError


def refuse_aborted(engine: AsyncLLM) -> None:
    """Let a request that the engine aborted fail; vLLM's handlers would give the part that was
    generated as a whole answer, with the finish reason `abort`."""
    stock = engine.generate

    async def generate(*args: Any, **named: Any) -> AsyncGenerator[RequestOutput, None]:
        outputs = stock(*args, **named)
        try:
            async for output in outputs:
                if any(it.finish_reason == "abort" for it in output.outputs):
                    raise RetryableRequestError("the engine was stopped before the answer's end")
                yield output
        finally:
            await outputs.aclose()

    engine.generate = generate


async def abort(engine: AsyncLLM) -> None:
    """End all requests, as errors. vLLM's handlers of answers that are given whole go on when their
    own request is cancelled, and at its end the engine would wait for them."""
    requests = list(engine.output_processor.request_states)
    engine.output_processor.propagate_error(EngineDeadError())
    await engine.engine_core.abort_requests_async(requests)


def kill(engine: AsyncLLM) -> None:
    """End the engine's processes, hung ones too, and all requests that wait for it, as errors."""
    resources = engine.engine_core.resources
    resources.engine_dead = True
    for process in getattr(resources.engine_manager, "processes", ()):
        _kill_tree(process.pid)
    engine.output_processor.propagate_error(EngineDeadError())


def _kill_tree(pid: int | None) -> None:
    try:
        tree = [*psutil.Process(pid).children(recursive=True), psutil.Process(pid)]
    except psutil.NoSuchProcess:
        return
    for process in tree:
        try:
            os.kill(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def no_tracebacks() -> None:
    """Keep what broke a connection on purpose, what a dead engine or the end of the server did to
    each request, and what a client got wrong, out of the logs: those have been said in a line or to
    that client."""
    logging.getLogger("uvicorn.error").addFilter(_is_news)
    for handler in logging.getLogger("vllm").handlers:
        handler.addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    kinds = raised(record)
    expected = (R3mesError, EngineDeadError, RetryableRequestError, VLLMClientError)
    # Of a request that was aborted; in a chain, it is how another one came to its end.
    cancelled = kinds[:1] == (CancelledError,)
    return not cancelled and not any(issubclass(it, expected) for it in kinds)
