"""A stand-in for an OpenAI-compatible server that is no node."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from tests.backend.stand_ins import Behaviour, Seen, StandIn, streams

WORDS = ("An ", "agree", "ment.")
TEXT = "".join(WORDS)
USAGE = {"prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6}
DONE = b"data: [DONE]\n\n"
EVENTS = "text/event-stream"


def chunk(text: str = "", finish_reason: str | None = None, **more: Any) -> bytes:
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": finish_reason}
    value = {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": "big"}
    return b"data: " + json.dumps(value | {"choices": [choice]} | more).encode() + b"\n\n"


STREAM = (
    b": processing\n\n",
    *map(chunk, WORDS),
    chunk("", "stop"),
    chunk(choices=[], usage=USAGE),
    DONE,
)


def completion(**more: Any) -> dict[str, Any]:
    message = {"role": "assistant", "content": TEXT}
    choice = {"index": 0, "finish_reason": "stop", "message": message}
    value = {"id": "1", "object": "chat.completion", "created": 1, "model": "big"}
    return value | {"choices": [choice], "usage": USAGE} | more


async def says_it(request: Request) -> Response:
    if (await request.json()).get("stream"):
        return await streams(*STREAM, media_type=EVENTS)(request)
    return JSONResponse(completion())


@dataclass
class Elsewhere:
    """Lists `models`, and answers what is posted as `behaviour` says."""

    behaviour: Behaviour = says_it
    models: Sequence[str] = ("big", "small")
    listed: list[Seen] = field(default_factory=list)
    _inner: StandIn = field(default_factory=StandIn)

    @property
    def seen(self) -> list[Seen]:
        """What was posted."""
        return self._inner.seen

    @property
    def fields(self) -> dict[str, Any]:
        """Of the last of these."""
        value: dict[str, Any] = json.loads(self.seen[-1].body)
        return value

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "GET":
            self.listed.append(Seen(scope["path"], list(scope["headers"]), b""))
            listing = {"object": "list", "data": [{"id": name} for name in self.models]}
            await JSONResponse(listing)(scope, receive, send)
            return
        self._inner.behaviour = self.behaviour
        await self._inner(scope, receive, send)
