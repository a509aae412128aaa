"""`POST /chat`: the existing network's way to ask, answered by vLLM's chat handler."""

import json
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from pydantic import ValidationError
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from r3mes_vllm.disconnect import while_connected
from r3mes_vllm.engine.answer import Piece, answer
from r3mes_vllm.engine.host import Hosted
from r3mes_vllm.errors import BadRequest, EngineError, R3mesError, UnknownAdapter
from r3mes_vllm.wire import ChatRequest

DEFAULT_MAX_TOKENS = 512
_SSE = "text/event-stream"

router = APIRouter()


@router.post("/chat")
async def chat(request: Request) -> Response:
    request_id = request.headers.get("x-request-id", "")[:128] or uuid.uuid4().hex
    headers = {"X-Request-Id": request_id}
    try:
        asked = await _read(request)
        hosted = _choose(request, asked)
    except R3mesError as error:
        return JSONResponse(error.body(), error.status, headers)
    if hosted:
        headers |= {"X-R3MES-Adapter": hosted.name, "X-R3MES-CID": hosted.cid}
    pieces = answer(
        request.app.state.openai_serving_chat, _completion_fields(request, asked, hosted), request
    )
    if not asked.stream:
        return HeldAnswer(lambda: _whole(pieces, hosted), headers, "application/json")
    if _SSE in request.headers.get("accept", ""):
        return HeldAnswer(lambda: _events(pieces), headers, _SSE)
    return HeldAnswer(lambda: _text(pieces), headers, "text/plain; charset=utf-8")


class HeldAnswer(Response):
    """Streams `body`; the status is held back until its first part exists.

    An error before that becomes its own status. One after it breaks the connection before the
    terminating chunk, so that no client takes the answer for complete. A client that goes away
    ends the generation at once, also while it waits for the first token.
    """

    def __init__(
        self,
        body: Callable[[], AsyncGenerator[str, None]],
        headers: dict[str, str],
        media_type: str,
    ) -> None:
        super().__init__(headers=headers, media_type=media_type)
        del self.headers["content-length"]
        self._body = body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await while_connected(receive, self._send(scope, receive, send))

    async def _send(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False
        try:
            async with aclosing(self._body()) as parts:
                async for part in parts:
                    if not started:
                        await send(
                            {
                                "type": "http.response.start",
                                "status": 200,
                                "headers": self.raw_headers,
                            }
                        )
                        started = True
                    await send(
                        {"type": "http.response.body", "body": part.encode(), "more_body": True}
                    )
            if not started:
                raise EngineError("the model answered nothing", hint="ask in other words")
        except R3mesError as error:
            if started:
                raise
            headers = {"X-Request-Id": self.headers["x-request-id"]}
            await JSONResponse(error.body(), error.status, headers)(scope, receive, send)
            return
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _text(pieces: AsyncIterator[Piece]) -> AsyncGenerator[str, None]:
    async for piece in pieces:
        if piece.text:
            yield piece.text


async def _events(pieces: AsyncIterator[Piece]) -> AsyncGenerator[str, None]:
    finish_reason, usage, begun = None, None, False
    try:
        async for piece in pieces:
            finish_reason = piece.finish_reason or finish_reason
            usage = piece.usage or usage
            if piece.text:
                begun = True
                yield f"data: {json.dumps({'text': piece.text})}\n\n"
    except R3mesError as error:
        if begun:
            yield f"event: error\ndata: {json.dumps(error.body())}\n\n"
        raise
    if begun:
        yield f"data: {json.dumps({'finish_reason': finish_reason, 'usage': usage})}\n\n"
        yield "data: [DONE]\n\n"


async def _whole(pieces: AsyncIterator[Piece], hosted: Hosted | None) -> AsyncGenerator[str, None]:
    text, finish_reason, usage = "", None, None
    async for piece in pieces:
        text += piece.text
        finish_reason = piece.finish_reason or finish_reason
        usage = piece.usage or usage
    if text:
        yield json.dumps(
            {
                "response": text,
                "lora_name": hosted.name if hosted else None,
                "cid": hosted.cid if hosted else None,
                "usage": usage,
                "finish_reason": finish_reason,
            }
        )


async def _read(request: Request) -> ChatRequest:
    try:
        asked = ChatRequest.model_validate_json(await request.body())
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise BadRequest(f"{field}: {first['msg']}" if field else first["msg"]) from error
    if not asked.message and not asked.messages:
        raise BadRequest("message: it is empty", hint='send {"message": "..."}')
    return asked


def _choose(request: Request, asked: ChatRequest) -> Hosted | None:
    """The adapter asked for; without a name the one that the policy chooses, if there is any."""
    node = request.app.state.r3mes
    name = asked.adapter or request.headers.get("x-adapter")
    if name is None:
        text = asked.message or _last_text(asked)
        name = node.policy(text, [hosted.name for hosted in node.host.adapters])
        return node.host.find(name) if name else None
    if name == node.host.base_model:
        return None
    hosted: Hosted | None = node.host.find(name)
    if hosted is None:
        served = ", ".join(hosted.name for hosted in node.host.adapters)
        raise UnknownAdapter(f"no adapter {name[:200]!r} here", hint=f"served are: {served}")
    return hosted


def _completion_fields(
    request: Request, asked: ChatRequest, hosted: Hosted | None
) -> dict[str, Any]:
    messages = list(asked.messages)
    if asked.message:
        messages.append({"role": "user", "content": asked.message})
    node = request.app.state.r3mes
    fields = {
        "model": f"{hosted.name}@{hosted.cid}" if hosted else node.host.base_model,
        "messages": messages,
        "max_tokens": DEFAULT_MAX_TOKENS if asked.max_tokens is None else asked.max_tokens,
        "temperature": asked.temperature,
        "top_p": asked.top_p,
        "seed": asked.seed,
        "stop": asked.stop,
    }
    return {name: value for name, value in fields.items() if value is not None}


def _last_text(asked: ChatRequest) -> str:
    content = asked.messages[-1].get("content")
    return content if isinstance(content, str) else ""
