"""What vLLM and others log of a request, with our factory of records and without it."""

import io
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
from vllm.v1.engine.exceptions import EngineDeadError

from r3mes_vllm import discretion
from r3mes_vllm.discretion import UNSAID

SECRET = "what-nobody-may-read"
HANDLERS = logging.getLogger("vllm.entrypoints.openai.chat_completion.serving")
TEMPLATE = "a template of %s tokens: %d"


@contextmanager
def logged(*, discreet: bool) -> Iterator[io.StringIO]:
    """All that is logged meanwhile, at every level, as vLLM's handler would write it."""
    text = io.StringIO()
    handler = logging.StreamHandler(text)
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s %(message)s"))
    loggers = [logging.getLogger(name) for name in ("", "vllm", "uvicorn.error", "asyncio")]
    before = [(it.level, it.propagate) for it in loggers]
    factory = logging.getLogRecordFactory()
    plain: Any = logging.LogRecord
    logging.setLogRecordFactory(discretion._discreet(plain) if discreet else plain)
    for it in loggers:
        it.setLevel(logging.DEBUG)
        it.propagate = False
        it.addHandler(handler)
    try:
        yield text
    finally:
        logging.setLogRecordFactory(factory)
        for it, (level, propagate) in zip(loggers, before, strict=True):
            it.setLevel(level)
            it.propagate = propagate
            it.removeHandler(handler)


class Model(BaseModel):
    number: int


def wrong_value() -> None:
    try:
        Model.model_validate({"number": SECRET})
    except ValidationError as error:
        create_error_response(error)


def traceback() -> None:
    try:
        Model.model_validate({"number": SECRET})
    except ValidationError:
        HANDLERS.exception("Error in chat completion stream generator.")


def chain() -> None:
    try:
        try:
            raise ValueError(SECRET)
        except ValueError as error:
            raise RuntimeError("it went wrong") from error
    except RuntimeError:
        logging.getLogger("uvicorn.error").exception("Exception in ASGI application\n")


def argument() -> None:
    HANDLERS.warning("Chat template rejected the request: %s", SECRET)


def named_argument() -> None:
    HANDLERS.warning("rejected: %(what)s", {"what": SECRET})


def f_string() -> None:
    HANDLERS.error(f"Error in streaming tool calls: {SECRET}")


def exception_as_message() -> None:
    HANDLERS.error(ValueError(SECRET))


def both() -> None:
    HANDLERS.error(f"of {SECRET}: %d", 5)


LEAKS = [wrong_value, traceback, chain, argument, named_argument, f_string]
LEAKS += [exception_as_message, both]


@pytest.mark.parametrize("leak", LEAKS)
def test_what_was_asked_is_left_out_at_every_level(leak: Callable[[], None]) -> None:
    with logged(discreet=True) as text:
        leak()
    assert text.getvalue()
    assert SECRET not in text.getvalue()


@pytest.mark.parametrize("leak", LEAKS)
def test_without_it_what_was_asked_is_in_the_log(leak: Callable[[], None]) -> None:
    with logged(discreet=False) as text:
        leak()
    assert SECRET in text.getvalue()


def test_templates_numbers_and_places_stay() -> None:
    with logged(discreet=True) as text:
        HANDLERS.info("%s tokens of %d, %.1f s", SECRET, 5, 0.25)
        HANDLERS.info(TEMPLATE, SECRET, 7)
        traceback()
    said = text.getvalue()
    assert "… tokens of 5, 0.2 s" in said
    assert "a template of … tokens: 7" in said
    assert "Error in chat completion stream generator." in said
    assert "ValidationError: …" in said
    assert "in traceback" in said


def test_others_log_as_they_do() -> None:
    with logged(discreet=True) as text:
        logging.getLogger("vllm.config.model").info("max length: %s", "long")
        logging.getLogger("vllm.entrypoints.launchers.launcher").info("Route: %s", "/health")
        logging.getLogger("vllm.entrypoints.serve.utils.request_logger").info("asked: %s", "this")
        logging.getLogger("vllm.entrypointsx").info(f"it is {5}")
    assert all(it in text.getvalue() for it in ("max length: long", "/health", "this", "it is 5"))
    assert UNSAID not in text.getvalue()


def test_the_kinds_of_exceptions_are_known_still() -> None:
    factory = discretion._discreet(logging.LogRecord)
    try:
        try:
            raise EngineDeadError
        except EngineDeadError as error:
            raise ValueError(SECRET) from error
    except ValueError as error:
        info = (type(error), error, error.__traceback__)
        for name in ("uvicorn.error", "elsewhere"):
            record = factory(name, 40, __file__, 1, "text", (), info, "f")
            assert discretion.raised(record) == (ValueError, EngineDeadError)


def test_pydantics_warnings_quote_nothing() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.filterwarnings("ignore", message="Pydantic serializer warnings")
        Model.model_construct(number=SECRET).model_dump()
    assert not caught
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Model.model_construct(number=SECRET).model_dump()
    assert SECRET in str(caught[0].message)
