"""Streams in frames, for a backend that would have another node go on with them (see `carry`)."""

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from r3mes_vllm.carry import FRAMES, HEADER, RESUME, Frame, Past, unpack_past
from r3mes_vllm.engine.carrying import Carried, Texts, carried
from r3mes_vllm.node import bodies
from r3mes_vllm.node.endings import ERRORS
from r3mes_vllm.node.load import INFERENCE
from r3mes_vllm.node.refusals import refusal


class Carrying:
    """ASGI middleware. Answers that don't stream pass as they are."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._texts: Texts | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        asked = Headers(scope=scope).get(HEADER) if scope["type"] == "http" else None
        if asked not in (FRAMES, RESUME) or not scope["path"].startswith(INFERENCE):
            await self._app(scope, receive, send)
            return
        past: Past | None = None
        if asked == RESUME:
            body = await bodies.read(receive)
            if body is None:
                return  # the client is gone
            try:
                past, body = unpack_past(body)
                self._texts = self._texts or Texts(scope["app"].state.engine_client)
                past = await self._texts.in_tokens(past)
            except (ValueError, RecursionError) as error:
                message = f"{HEADER}: {RESUME}: {error}"
                await refusal(scope["path"], 400, "bad_request", message)(scope, receive, send)
                return
            receive = bodies.Replay(body, receive)
        it = Carried(past)
        token = carried.set(it)
        try:
            await self._app(scope, receive, _Framed(send, it))
        finally:
            carried.reset(token)


class _Framed:
    """`send` in frames."""

    def __init__(self, send: Send, it: Carried) -> None:
        self._send = send
        self._it = it
        self._streams = self._events = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(raw=list(message["headers"]))
            self._streams = message["status"] == 200 and "content-length" not in headers
            self._events = headers.get("content-type", "").startswith("text/event-stream")
            if self._streams:
                headers[HEADER] = FRAMES
                message = {**message, "headers": headers.raw}
        elif self._streams:
            data = message.get("body", b"")
            if self._events and data.startswith(ERRORS):
                return  # another node may go on, and the client not hear of it
            steps = self._it.take() if data or not message.get("more_body") else []
            if data or steps:  # a last step may have no text
                message = {**message, "body": Frame(steps, data).pack()}
        await self._send(message)
