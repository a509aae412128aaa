"""One chat answer from vLLM's own handler, as pieces of text instead of OpenAI's events."""

import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

from fastapi import Request
from pydantic import ValidationError
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.exceptions import VLLMClientError, VLLMServerError

from r3mes_vllm.errors import BadRequest, EngineError, R3mesError
from r3mes_vllm.validation import first_mistake

_PREFIX = "data: "


@dataclass(frozen=True)
class Piece:
    """`finish_reason` and `usage` (in tokens) come with the last pieces."""

    text: str = ""
    finish_reason: str | None = None
    usage: dict[str, Any] | None = None


async def answer(
    serving: OpenAIServingChat, fields: Mapping[str, Any], raw_request: Request
) -> AsyncIterator[Piece]:
    """Generate for the chat completion request `fields`.

    Raises BadRequest when vLLM refuses the request, EngineError when the engine fails, also in
    the middle. Closing the iterator frees the engine's request.
    """
    try:
        request = ChatCompletionRequest(
            **fields, stream=True, stream_options={"include_usage": True}
        )
        events = await serving.create_chat_completion(request, raw_request)
    except ValidationError as error:
        raise BadRequest(first_mistake(error, levels=3)) from error
    except (VLLMClientError, ValueError, TypeError, OverflowError) as error:
        raise BadRequest(str(error)) from error
    except VLLMServerError as error:
        raise EngineError("the engine is not well") from error
    if isinstance(events, ErrorResponse):
        raise _failure(events.error.code)(events.error.message)
    try:
        async for event in events:
            data = event.strip().removeprefix(_PREFIX)
            if data == "[DONE]":
                return
            yield _piece(json.loads(data))
    finally:
        await events.aclose()


def _failure(status: int) -> type[R3mesError]:
    return BadRequest if status < 500 else EngineError


def _piece(chunk: dict[str, Any]) -> Piece:
    if error := chunk.get("error"):
        raise _failure(error.get("code", 500))(error["message"])
    choice = chunk["choices"][0] if chunk["choices"] else {}
    if choice.get("finish_reason") == "abort":
        raise EngineError("the engine was stopped before the answer's end", hint="ask again")
    return Piece(
        text=choice.get("delta", {}).get("content") or "",
        finish_reason=choice.get("finish_reason"),
        usage=chunk.get("usage"),
    )
