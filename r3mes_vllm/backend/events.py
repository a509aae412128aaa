"""A stream of events of an OpenAI-compatible server, each looked at before it goes on."""

import json
import re
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass

from r3mes_vllm.backend.refusals import NodeFailed
from r3mes_vllm.strict_json import Json

_BLANK_LINE = re.compile(rb"\r\n\r\n|\n\n|\r\r")
_LINE_END = re.compile(rb"\r\n|\n|\r")
_LONGEST = 4 << 20
"""Bytes of one event; the last of `/v1/responses` holds the whole answer."""
LAST = ("response.completed", "response.incomplete")
"""Types of the events that end an answer of `/v1/responses`."""
_FAILED = ("error", "response.failed")
_ABORTED = ("abort", "error")
"""What vLLM and some others say for a reason when they broke off."""


@dataclass(frozen=True)
class Event:
    block: bytes
    """As it came, with the blank line after it."""
    value: Json | None
    """Its data; None for `[DONE]`."""

    @property
    def is_last(self) -> bool:
        return self.value is None or self.value.get("type") in LAST


async def read_events(pieces: AsyncIterator[bytes]) -> AsyncGenerator[Event, None]:
    """Whole events, from bytes in whatever pieces they come, up to the last one; comments are left
    out. Raises NodeFailed for an error among them, for what is no event, and if the last one is
    missing: a server that breaks off may end its stream as if it were whole."""
    waiting, looked_at = bytearray(), 0
    async for piece in pieces:
        waiting += piece
        while found := _BLANK_LINE.search(waiting, looked_at):
            block = bytes(waiting[: found.end()])
            del waiting[: found.end()]
            looked_at = 0
            event = _read(block)
            if event is None:
                continue
            yield event
            if event.is_last:
                return
        looked_at = max(len(waiting) - 3, 0)
        if len(waiting) > _LONGEST:
            raise NodeFailed(f"it sends an event of over {_LONGEST} bytes")
    raise NodeFailed("its stream ended without its end")


def _read(block: bytes) -> Event | None:
    lines = _LINE_END.split(block)
    fields = [(name, it.removeprefix(b" ")) for name, _, it in (it.partition(b":") for it in lines)]
    data = b"\n".join(it for name, it in fields if name == b"data")
    if (b"event", b"error") in fields:
        raise NodeFailed("it broke off with an error")
    if not data:
        return None
    if data.strip() == b"[DONE]":
        return Event(block, None)
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise NodeFailed("its stream holds what is no JSON") from error
    if not isinstance(value, dict):
        raise NodeFailed("its stream holds what is no JSON object")
    refuse_half(value)
    return Event(block, value)


def refuse_half(answer: Json) -> None:
    """Raise NodeFailed if `answer`, or a part of one, says that it will not be whole."""
    choices = answer.get("choices")
    parts = [it for it in choices if isinstance(it, dict)] if isinstance(choices, list) else []
    aborted = any(it.get("finish_reason") in _ABORTED for it in parts)
    if answer.get("error") or answer.get("type") in _FAILED or aborted:
        raise NodeFailed("it broke off with an error")
