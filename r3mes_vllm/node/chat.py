"""`POST /chat`: the existing network's way to ask, answered by vLLM's chat handler."""

import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, nullcontext

from fastapi import APIRouter, Request
from pydantic import ValidationError
from starlette.datastructures import MutableHeaders
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from r3mes_vllm.completion import completion_fields
from r3mes_vllm.disconnect import while_connected
from r3mes_vllm.engine.answer import Piece, answer
from r3mes_vllm.engine.host import Host
from r3mes_vllm.engine.version import Version
from r3mes_vllm.errors import BadRequest, EngineError, R3mesError
from r3mes_vllm.node import journal
from r3mes_vllm.node.fields import refuse_excess
from r3mes_vllm.node.hold import named
from r3mes_vllm.validation import first_mistake
from r3mes_vllm.wire import ChatRequest

_SSE = "text/event-stream"

router = APIRouter()

Form = Callable[[AsyncIterator[Piece], str | None, Version | None], AsyncGenerator[str, None]]
"""From the pieces of an answer of the adapter of that name, in that version, to what is sent."""


@router.post("/chat")
async def chat(request: Request) -> Response:
    try:
        asked = await _read(request)
    except R3mesError as error:
        return refusal(error)
    form: Form
    if not asked.stream:
        form, media_type = _whole, "application/json"
    elif _SSE in request.headers.get("accept", ""):
        form, media_type = _events, _SSE
    else:
        form, media_type = _text, "text/plain; charset=utf-8"

    async def body(headers: MutableHeaders) -> AsyncGenerator[str, None]:
        node = request.app.state.r3mes
        host: Host = node.host
        name, prompt = _choose(request, asked), None
        async with host.hold(name) if name else nullcontext() as version:
            if name and version:
                headers.update(named(name, version.cid))
                prompt = node.registry.system_prompt(name.partition("@")[0], version.cid)
            journal.note(name, version.cid if version else None)
            fields = completion_fields(asked, name or host.base_model, prompt)
            pieces = answer(request.app.state.openai_serving_chat, fields, request)
            async with aclosing(form(pieces, name, version)) as parts:
                async for part in parts:
                    yield part

    return HeldAnswer(body, media_type)


def refusal(error: R3mesError) -> Response:
    return JSONResponse(error.body(), error.status, error.headers)


class HeldAnswer(Response):
    """Streams `body`; the status is held back until its first part exists.

    An error before that becomes its own status. One after it breaks the connection before the
    terminating chunk, so that no client takes the answer for complete. A client that goes away
    ends the generation at once, also while it waits for the first token.
    """

    def __init__(
        self, body: Callable[[MutableHeaders], AsyncGenerator[str, None]], media_type: str
    ) -> None:
        """`body` may add headers before its first part."""
        super().__init__(media_type=media_type)
        del self.headers["content-length"]
        self._body = body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await while_connected(receive, self._send(scope, receive, send))

    async def _send(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False
        try:
            async with aclosing(self._body(self.headers)) as parts:
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
            await refusal(error)(scope, receive, send)
            return
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _text(pieces: AsyncIterator[Piece], *_: object) -> AsyncGenerator[str, None]:
    async for piece in pieces:
        if piece.text:
            yield piece.text


async def _events(pieces: AsyncIterator[Piece], *_: object) -> AsyncGenerator[str, None]:
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


async def _whole(
    pieces: AsyncIterator[Piece], name: str | None, version: Version | None
) -> AsyncGenerator[str, None]:
    text, finish_reason, usage = "", None, None
    async for piece in pieces:
        text += piece.text
        finish_reason = piece.finish_reason or finish_reason
        usage = piece.usage or usage
    if text:
        yield json.dumps(
            {
                "response": text,
                "lora_name": name.partition("@")[0] if name else None,
                "cid": version.cid if version else None,
                "usage": usage,
                "finish_reason": finish_reason,
            }
        )


async def _read(request: Request) -> ChatRequest:
    try:
        asked = ChatRequest.model_validate_json(await request.body())
    except ValidationError as error:
        raise BadRequest(first_mistake(error)) from error
    refuse_excess(asked.model_dump(), request.app.state.r3mes.settings.limits)
    if not asked.message and not asked.messages:
        raise BadRequest("message: it is empty", hint='send {"message": "..."}')
    return asked


def _choose(request: Request, asked: ChatRequest) -> str | None:
    """The adapter asked for; without a name the one that the policy chooses; None for the base."""
    node = request.app.state.r3mes
    name: str | None = asked.adapter or request.headers.get("x-adapter") or None
    if name is None:
        name = node.policy(asked.message or _last_text(asked), list(node.host.adapters))
    return None if node.host.is_base(name) else name


def _last_text(asked: ChatRequest) -> str:
    content = asked.messages[-1].get("content")
    return content if isinstance(content, str) else ""
