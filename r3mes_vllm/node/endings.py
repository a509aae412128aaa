"""A stream that failed never ends as if it were complete.

vLLM's streams end with `data: [DONE]` and the terminating chunk also after an error event: a client
that looks for those takes half an answer for all of it. Here the event is the last that is sent,
and the connection breaks before the terminating chunk.
"""

from asyncio import CancelledError

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from r3mes_vllm.errors import EngineError
from r3mes_vllm.node.load import INFERENCE
from r3mes_vllm.node.refusals import refusal

# What a model says stands in JSON strings, where a quotation mark has a backslash before it.
ERROR = b'data: {"error"'
"""What vLLM's event of an error begins with."""
ERRORS = (b"event: error", ERROR)
"""And what our own does."""
_DONE = b"data: [DONE]"
_EVENT = (
    b'event: error\ndata: {"error": {"message": "the answer failed after it had begun", '
    b'"type": "server_error", "param": null, "code": "engine"}}\n\n'
)
_ENDED = "this node ended before the answer did; ask another"


class Endings:
    """ASGI middleware; bytes pass as they come."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith(INFERENCE):
            await self._app(scope, receive, send)
            return
        begun = events = told = False

        async def watched(message: Message) -> None:
            nonlocal begun, events, told
            if message["type"] == "http.response.start":
                begun = True
                kind = Headers(raw=message["headers"]).get("content-type", "")
                events = message["status"] == 200 and kind.startswith("text/event-stream")
            elif events and ERROR in (body := message.get("body", b"")):
                told = True
                await send(_more(body.partition(_DONE)[0]))
                raise EngineError("the answer failed after it had begun")
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except (Exception, CancelledError) as error:
            # vLLM's responses break off without a word
            if events and not told:
                await send(_more(_EVENT))
            if isinstance(error, CancelledError) and not begun:  # the server ends
                await refusal(scope["path"], 503, "draining", _ENDED)(scope, receive, send)
            raise


def _more(body: bytes) -> Message:
    return {"type": "http.response.body", "body": body, "more_body": True}
