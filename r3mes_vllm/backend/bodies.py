"""Reading a JSON body that may be hostile: bounded, strict, and a 4xx for whatever is wrong."""

import json
from collections.abc import Callable
from typing import NoReturn, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError

from r3mes_vllm.backend.refusals import BadInput, Malformed, TooLarge

API_BODY_LIMIT = 1 << 20
"""Bytes of a registration or a beat: room for some ten thousand adapter names."""

INFERENCE_BODY_LIMIT = 8 << 20
"""Bytes of a `/chat` or `/v1` request."""

Model = TypeVar("Model", bound=BaseModel)
Json = dict[str, object]


async def read_body(request: Request, limit: int) -> bytes:
    """The request's body. Raises TooLarge past `limit` bytes, before reading them if it can."""
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced[:20]) > limit:
        _too_large(limit)
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            _too_large(limit)
    return bytes(body)


def parse_object(body: bytes) -> Json:
    """`body` as a JSON object. Raises Malformed.

    Beyond RFC 8259 it refuses NaN, Infinity and escapes that make a lone surrogate: text that
    Python holds but that no UTF-8 can carry on.
    """
    try:
        value = json.loads(body.decode("utf-8"), parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise Malformed(f"the body is not UTF-8: byte {error.start} is wrong") from error
    except RecursionError as error:
        raise Malformed("the body is nested too deeply") from error
    except ValueError as error:  # JSONDecodeError, and integers of more than 4300 digits
        raise Malformed(f"the body is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise Malformed(f"the body must be a JSON object, not {_kind(value)}")
    if b"\\u" in body and _any_string(value, _is_lone):
        raise Malformed("the body has text with half of a surrogate pair, which is no Unicode")
    return value


def validated(model: type[Model], value: Json) -> Model:
    """`value` as a `model`. Raises BadInput naming the first wrong field."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(str(part) for part in first["loc"])[:100]
        raise BadInput(f"{field}: {first['msg']}", field=field) from error


async def registration(request: Request, model: type[Model]) -> Model:
    """A `model` from the body of a request to `/api`, whose strings a database must be able to
    hold: PostgreSQL has no NUL."""
    value = parse_object(await read_body(request, API_BODY_LIMIT))
    for field, part in value.items():
        if _any_string({field: part}, _has_nul):
            name = field.replace("\0", "")[:100]
            raise BadInput(f"{name}: contains a NUL character", field=name)
    return validated(model, value)


def _any_string(value: object, wrong: Callable[[str], bool]) -> bool:
    """Whether any key or string in `value`, at any depth, is `wrong`."""
    waiting = [value]
    while waiting:
        match waiting.pop():
            case str() as text if wrong(text):
                return True
            case dict() as fields:
                waiting += [*fields.keys(), *fields.values()]
            case list() as items:
                waiting += items
    return False


def _is_lone(text: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in text)


def _has_nul(text: str) -> bool:
    return "\0" in text


def _too_large(limit: int) -> NoReturn:
    raise TooLarge(f"the body has more than {limit} bytes")


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _kind(value: object) -> str:
    names = {list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
