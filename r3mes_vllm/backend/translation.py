"""Chat completions of an OpenAI-compatible server in the words of `/chat`: as `node/chat.py` says
what vLLM answers."""

import json
from collections.abc import AsyncGenerator, AsyncIterator

from r3mes_vllm.backend.events import Event
from r3mes_vllm.backend.refusals import NodeFailed
from r3mes_vllm.errors import BadRequest
from r3mes_vllm.strict_json import Json

_SHOWN = 1000
"""Characters of another server's message."""


async def as_text(events: AsyncIterator[Event]) -> AsyncGenerator[bytes, None]:
    async for event in events:
        if event.value and (text := _text(event.value)):
            yield text.encode(errors="replace")


async def as_chat_events(events: AsyncIterator[Event]) -> AsyncGenerator[bytes, None]:
    finish_reason = usage = None
    begun = False
    async for event in events:
        if event.value is None:
            break
        finish_reason = _choice(event.value).get("finish_reason") or finish_reason
        usage = event.value.get("usage") or usage
        if text := _text(event.value):
            begun = True
            yield _event(json.dumps({"text": text}))
    if begun:
        yield _event(json.dumps({"finish_reason": finish_reason, "usage": usage}))
        yield _event("[DONE]")


async def as_openai_events(events: AsyncIterator[Event]) -> AsyncGenerator[bytes, None]:
    """As they came."""
    async for event in events:
        yield event.block


def as_whole(completion: Json) -> Json:
    """`/chat` with `"stream": false`. Raises NodeFailed if it says nothing."""
    text = _text(completion)
    if not text:
        raise NodeFailed("it answered nothing")
    return {
        "response": text,
        "lora_name": None,
        "cid": None,
        "usage": completion.get("usage"),
        "finish_reason": _choice(completion).get("finish_reason"),
    }


def as_refusal(refusal: Json) -> Json:
    """OpenAI's error, in the shape that errors have outside `/v1`."""
    error = refusal.get("error")
    message = error.get("message") if isinstance(error, dict) else error
    shown = message[:_SHOWN] if isinstance(message, str) else "it can't be answered like this"
    return dict(BadRequest(shown).body())


def _choice(value: Json) -> Json:
    choices = value.get("choices")
    first = choices[0] if isinstance(choices, list) and choices else None
    return first if isinstance(first, dict) else {}


def _text(value: Json) -> str:
    choice = _choice(value)
    said = choice.get("delta") or choice.get("message")
    text = said.get("content") if isinstance(said, dict) else None
    return text if isinstance(text, str) else ""


def _event(data: str) -> bytes:
    return f"data: {data}\n\n".encode()
