"""What is asked and answered stays out of the logs, at every level.

vLLM's handlers, its parsers, asyncio and HTTP clients quote a request in what they log: at DEBUG
the text of each error, in a traceback the value that was wrong. A record of theirs keeps its
template and the numbers in it; texts, and what exceptions say, are left out.
"""

import logging
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

LOGGERS = (
    "asyncio",
    "httpcore",
    "httpx",
    "uvicorn.error",
    "vllm.entrypoints",
    "vllm.inputs",
    "vllm.logging_utils.dump_input",
    "vllm.multimodal",
    "vllm.parser",
    "vllm.reasoning",
    "vllm.renderers",
    "vllm.sampling_params",
    "vllm.tokenizers",
    "vllm.tool_parsers",
    "vllm.v1.core.sched",
    "vllm.v1.engine.async_llm",
    "vllm.v1.engine.detokenizer",
    "vllm.v1.engine.input_processor",
    "vllm.v1.structured_output",
)
"""And what is below them. Others tell of models and machines."""

SPOKEN = (
    "vllm.entrypoints.cli",
    "vllm.entrypoints.launchers",
    "vllm.entrypoints.serve.middleware.log_response",
    "vllm.entrypoints.serve.utils.request_logger",
)
"""Among them: these start the server, or tell of requests because the operator asked vLLM to."""

HIDDEN = "…"
UNSAID = "(left out: it may quote a request)"
_CHAIN = 10
"""Exceptions of one chain that are told."""

_Factory = Callable[..., logging.LogRecord]

_kept = False


def keep() -> None:
    """From now on, in this process."""
    global _kept
    if not _kept:
        logging.setLogRecordFactory(_discreet(logging.getLogRecordFactory()))
        warnings.filterwarnings("ignore", message="Pydantic serializer warnings")
    _kept = True


def raised(record: logging.LogRecord) -> tuple[type[BaseException], ...]:
    """The kinds of the exceptions that the record tells of, in a chain."""
    kept: tuple[type[BaseException], ...] | None = getattr(record, "raised", None)
    error = record.exc_info[1] if record.exc_info else None
    return tuple(map(type, _chain(error))) if kept is None else kept


def _discreet(stock: _Factory) -> _Factory:
    """In place of logging's factory of records: ahead of every handler, whoever adds it."""

    def record(
        name: str,
        level: int,
        file: str,
        line: int,
        message: object,
        args: Any,
        exc_info: Any,
        function: str | None = None,
        *rest: Any,
        **more: Any,
    ) -> logging.LogRecord:
        if not _may_quote(name, file, function):
            return stock(name, level, file, line, message, args, exc_info, function, *rest, **more)
        text = _without_texts(message, args) if _is_constant(message, file, function) else UNSAID
        made = stock(name, level, file, line, text, (), None, function, *rest, **more)
        error = exc_info[1] if isinstance(exc_info, tuple) else None
        if error is not None:
            made.exc_text = _frames(error)
            made.raised = tuple(map(type, _chain(error)))
        return made

    return record


def _may_quote(name: str, file: str, function: str | None) -> bool:
    if not name:
        return False  # a record to be filled in by who makes it
    if function == "_handle_request_preproc_error":  # of the engine: a grammar, perhaps
        return True
    if file.endswith("lifespan/on.py"):  # of uvicorn: before any request
        return False
    return _below(name, LOGGERS) and not _below(name, SPOKEN)


def _below(name: str, roots: tuple[str, ...]) -> bool:
    return any(name == root or name.startswith(f"{root}.") for root in roots)


def _is_constant(message: object, file: str, function: str | None) -> bool:
    """Whether the code that logs it holds it as it is, and no f-string made it."""
    frame = sys._getframe()
    while frame is not None:
        code = frame.f_code
        if code.co_filename == file and code.co_name == function:
            return message in code.co_consts or message in [
                it for it in frame.f_globals.values() if isinstance(it, str)
            ]
        frame = frame.f_back  # type: ignore[assignment]
    return False


def _without_texts(message: object, args: Any) -> str:
    try:
        if len(args) == 1 and isinstance(args[0], dict):  # for a template with names
            return str(message) % {name: _without_text(it) for name, it in args[0].items()}
        return str(message) % tuple(map(_without_text, args)) if args else str(message)
    except (TypeError, ValueError, KeyError):
        return UNSAID


def _without_text(value: object) -> object:
    return value if value is None or isinstance(value, int | float) else HIDDEN


def _frames(error: BaseException) -> str:
    """Where each of the chain was raised, and its kind."""
    parts = []
    for it in _chain(error):
        where = "".join(traceback.format_tb(it.__traceback__))
        parts.append(f"Traceback (most recent call last):\n{where}{type(it).__name__}: {HIDDEN}")
    return "\n\n".join(reversed(parts))


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    def all_of_it() -> Iterator[BaseException]:
        it = error
        while it is not None:
            yield it
            it = it.__cause__ or it.__context__

    return islice(all_of_it(), _CHAIN)
