"""Reading a JSON body that may be hostile: bounded, strict, and a 4xx for whatever is wrong."""

import asyncio
from dataclasses import dataclass
from typing import TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.types import ASGIApp, Receive, Scope, Send

from r3mes_vllm import content_encoding, strict_json
from r3mes_vllm.backend.refusals import BadInput, Encoded, Malformed, NoRoom, TooLarge, TooSlow
from r3mes_vllm.bounded_http import swallow
from r3mes_vllm.strict_json import Json, any_string
from r3mes_vllm.validation import words

API_BODY_LIMIT = 1 << 20
"""Bytes of a registration or a beat: room for some ten thousand adapter names."""

INFERENCE_BODY_LIMIT = 8 << 20
"""Bytes of a `/chat` or `/v1` request."""

_SMALL = 64 << 10

MOST_VALUES = 1 << 19
"""In a body, where lists and objects count twice. A conversation of 10,000 messages in parts has
70,000; OpenAI takes 300,000 tokens as numbers for embeddings."""

WORD_LIMIT = 128
"""Characters of a name, a version and the like."""

_TAKEN = "r3mes.taken"
"""In a request's scope: the bytes of `Room` that its body has."""

Model = TypeVar("Model", bound=BaseModel)


@dataclass
class Room:
    """For bodies that are on their way, or being answered: the first `_SMALL` bytes of each have
    room, beyond that all share `left`, so that what they can fill is bounded."""

    seconds: float = 30.0
    """In which a body must have come."""
    left: int = 512 << 20
    """Bytes."""


async def read_body(request: Request, limit: int) -> bytes:
    """The request's body, which has its room until `Kept` gives it back. Raises TooLarge past
    `limit` bytes, before reading them if it can; TooSlow, NoRoom, and Encoded once it is read."""
    try:
        body = await _read(request, limit, request.app.state.room)
    except (TooLarge, NoRoom):
        if "expect" not in request.headers:  # such a client waits to be told whether to send
            await swallow(request.receive)
        raise
    if problem := content_encoding.objection(request.headers):
        raise Encoded(problem, field="Content-Encoding")
    return body


async def _read(request: Request, limit: int, room: Room) -> bytes:
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced[:20]) > limit:
        raise _too_large(limit)
    body, taken = bytearray(), 0
    try:
        async with asyncio.timeout(room.seconds):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limit:
                    raise _too_large(limit)
                more = max(len(body) - _SMALL - taken, 0)
                if more > room.left:
                    raise NoRoom("too many long requests are on their way", retry_after=1)
                taken, room.left = taken + more, room.left - more
        request.scope[_TAKEN], taken = taken, 0
    except TimeoutError as error:
        raise TooSlow(f"the body took over {room.seconds:g} s to come") from error
    finally:
        room.left += taken
    return bytes(body)


class Kept:
    """ASGI middleware: a body's room is free again after the answer's end."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._app(scope, receive, send)
        finally:
            if taken := scope.get(_TAKEN):
                scope["app"].state.room.left += taken


def parse_object(body: bytes) -> Json:
    """`body` as a JSON object. Raises Malformed, and TooLarge before it makes so many values."""
    if strict_json.has_over(MOST_VALUES, body):
        raise TooLarge(
            f"the body has more than {MOST_VALUES} values; lists and objects count twice"
        )
    try:
        return strict_json.parse_object(body)
    except ValueError as error:
        raise Malformed(str(error)) from error


def validated(model: type[Model], value: Json) -> Model:
    """`value` as a `model`. Raises BadInput naming the first wrong field."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(str(part) for part in first["loc"])[:100]
        raise BadInput(f"{field}: {words(first)}", field=field) from error


def parsed(body: bytes, model: type[Model]) -> Model:
    """A `model` from the body of a request to `/api`, whose strings a database must be able to
    hold: PostgreSQL has no NUL."""
    value = parse_object(body)
    for field, part in value.items():
        if any_string({field: part}, _has_nul):
            name = field.replace("\0", "")[:100]
            raise BadInput(f"{name}: contains a NUL character", field=name)
    return validated(model, value)


def at_most(limit: int, **fields: str | None) -> None:
    """Raise BadInput for the first field that is longer."""
    for field, value in fields.items():
        if value is not None and len(value) > limit:
            raise BadInput(f"{field}: longer than {limit} characters", field=field)


def _has_nul(text: str) -> bool:
    return "\0" in text


def _too_large(limit: int) -> TooLarge:
    return TooLarge(f"the body has more than {limit} bytes")
