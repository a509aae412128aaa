"""An OpenAI-compatible server that answers where no node can.

Its operator chose it, so it may be anywhere; what it says is still looked at: only whole answers
and a client's mistakes pass, and none of its headers.
"""

import asyncio
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass

import httpx

from r3mes_vllm import strict_json
from r3mes_vllm.backend import translation
from r3mes_vllm.backend.course import EVENTS
from r3mes_vllm.backend.dial import Timeouts, told
from r3mes_vllm.backend.events import read_events, refuse_half
from r3mes_vllm.backend.headers import RawHeaders, of_fallback, to_fallback
from r3mes_vllm.backend.refusals import NodeFailed, NodeTimedOut
from r3mes_vllm.completion import completion_fields
from r3mes_vllm.errors import ConfigError
from r3mes_vllm.strict_json import Json
from r3mes_vllm.wire import ChatRequest

_JSON = "application/json"
_TEXT = "text/plain; charset=utf-8"
_CHAT = "/chat/completions"
CLIENTS_MISTAKES = (400, 413, 422)
_LISTED_S = 60.0
"""For so long a list of models holds."""
_LONGEST = 64 << 20
"""Bytes of an answer that is not streamed: embeddings are long."""
_LONGEST_LIST = 4 << 20


@dataclass(frozen=True)
class Where:
    root: str
    """With `/v1` or what the server has in its place."""
    key: str | None


@dataclass(frozen=True)
class Asked:
    """By a client of `path`, for the adapter or base model `name`."""

    name: str | None
    path: str
    headers: RawHeaders
    """As for a node."""
    body: bytes
    """That was understood once. It is kept as it came, which takes the least."""
    streams: bool
    events: bool = False
    """The answer to a chat is to be a stream of events."""
    system_prompt: str | None = None

    @property
    def is_chat(self) -> bool:
        return self.path == "/chat"

    def outgoing(self, model: str) -> tuple[str, bytes]:
        """Path below the server's root, and body."""
        asked = strict_json.parse_object(self.body)
        if not self.is_chat:
            return self.path.removeprefix("/v1"), json.dumps(asked | {"model": model}).encode()
        chat = ChatRequest.model_validate(asked)
        fields: Json = completion_fields(chat, model, self.system_prompt)
        if self.streams:
            fields["stream"] = True
        if self.streams and self.events:
            fields["stream_options"] = {"include_usage": True}
        return _CHAT, json.dumps(fields).encode()


@dataclass(frozen=True)
class Substitute:
    """Of a node's answer: its beginning, and the rest to come. Close it with `aclose`."""

    kind: str
    status: int
    headers: RawHeaders
    first: bytes
    rest: AsyncGenerator[bytes, None]
    response: httpx.Response

    @property
    def is_events(self) -> bool:
        return (b"content-type", EVENTS.encode()) in self.headers

    async def pieces(self) -> AsyncGenerator[bytes, None]:
        """Raises NodeFailed if it breaks off."""
        yield self.first
        try:
            async for piece in self.rest:
                yield piece
        except httpx.HTTPError as error:
            raise NodeFailed(f"it broke off: {told(error)}") from error

    async def aclose(self) -> None:
        await self.rest.aclose()
        await self.response.aclose()


class Server:
    """`kind` is its name in headers and metrics. `where` it is may change; None while it is
    nowhere. Without a `model`, the one that was asked for if it lists that, else its first."""

    def __init__(
        self,
        kind: str,
        where: Callable[[], Where | None],
        client: httpx.AsyncClient,
        timeouts: Timeouts,
        *,
        model: str | None = None,
    ) -> None:
        self.kind = kind
        self._where = where
        self._client = client
        self._timeouts = timeouts
        self._model = model
        self._listed: tuple[Where, float, list[str]] | None = None

    async def begin(self, asked: Asked) -> Substitute:
        """Raises NodeFailed if it gives no answer."""
        limit = self._timeouts.limit(streams=asked.streams)
        try:
            async with asyncio.timeout(limit):
                return await self._begin(asked)
        except TimeoutError as error:
            raise NodeTimedOut(f"it did not begin to answer within {limit:g} s") from error
        except httpx.HTTPError as error:
            raise NodeFailed(f"it gave no answer: {told(error)}") from error

    async def _begin(self, asked: Asked) -> Substitute:
        where = self._where()
        if where is None:
            raise NodeFailed("it is not running")
        headers = to_fallback(asked.headers, key=where.key)
        model = self._model or await self._chosen(where, headers, asked.name)
        path, body = asked.outgoing(model)
        request = httpx.Request("POST", where.root + path, headers=headers, content=body)
        response = await self._client.send(request, stream=True)
        try:
            if response.status_code == 404:
                self._listed = None
            return await self._substitute(asked, response, model)
        except BaseException:
            await response.aclose()
            raise

    async def _substitute(self, asked: Asked, response: httpx.Response, model: str) -> Substitute:
        status = response.status_code
        if status != 200 and status not in CLIENTS_MISTAKES:
            raise NodeFailed(f"it answered {status}")
        pieces = _received(response, self._timeouts.between_bytes)
        if asked.streams and status == 200:
            media_type, parts = _streamed(asked, pieces)
        else:
            media_type = _JSON
            parts = _once(_whole(asked, status, await _read(pieces, _LONGEST)))
        first = await anext(parts, b"")
        if not first:
            raise NodeFailed("it answered nothing")
        headers = of_fallback(self.kind, model, media_type)
        return Substitute(self.kind, status, headers, first, parts, response)

    async def _chosen(self, where: Where, headers: RawHeaders, name: str | None) -> str:
        now = time.monotonic()
        if self._listed is None or self._listed[0] != where or now - self._listed[1] > _LISTED_S:
            self._listed = where, now, await self._models(where, headers)
        models = self._listed[2]
        return name if name in models else models[0]

    async def _models(self, where: Where, headers: RawHeaders) -> list[str]:
        """At least one."""
        request = httpx.Request("GET", f"{where.root}/models", headers=headers)
        response = await self._client.send(request, stream=True)
        async with aclosing(response):
            if response.status_code != 200:
                raise NodeFailed(f"its list of models is {response.status_code}")
            pieces = _received(response, self._timeouts.between_bytes)
            listed = (await _read(pieces, _LONGEST_LIST)).get("data")
        models = [it for it in listed if isinstance(it, dict)] if isinstance(listed, list) else []
        names = [name for it in models if isinstance(name := it.get("id"), str) and name]
        if not names:
            raise NodeFailed("it lists no model")
        return names


def root_of(url: str) -> str:
    """Of the server at `url`: `/v1` is added to one without a path. Raises ConfigError."""
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise ConfigError(f"fallback_url is no URL: {error}") from error
    if not parsed.host or parsed.userinfo or "?" in url or "#" in url:
        raise ConfigError(
            "fallback_url must be a scheme, a host and perhaps a port and a path",
            hint="a key goes into R3MES_FALLBACK_KEY",
        )
    return url.rstrip("/") + ("/v1" if parsed.path in ("", "/") else "")


def _streamed(
    asked: Asked, pieces: AsyncIterator[bytes]
) -> tuple[str, AsyncGenerator[bytes, None]]:
    """Media type and body of an answer to `asked`."""
    events = read_events(pieces)
    if not asked.is_chat:
        return EVENTS, translation.as_openai_events(events)
    if asked.events:
        return EVENTS, translation.as_chat_events(events)
    return _TEXT, translation.as_text(events)


def _whole(asked: Asked, status: int, answer: Json) -> Json:
    if status != 200:
        return translation.as_refusal(answer) if asked.is_chat else answer
    refuse_half(answer)
    return translation.as_whole(answer) if asked.is_chat else answer


async def _once(answer: Json) -> AsyncGenerator[bytes, None]:
    yield json.dumps(answer, ensure_ascii=False).encode(errors="replace")


async def _received(response: httpx.Response, patience_s: float) -> AsyncGenerator[bytes, None]:
    """What comes, unpacked if it was packed all the same. Raises NodeFailed for a silence after
    the first byte."""
    pieces = response.aiter_bytes()
    piece: bytes | None = await anext(pieces, None)
    while piece is not None:
        yield piece
        try:
            async with asyncio.timeout(patience_s):
                piece = await anext(pieces, None)
        except TimeoutError as error:
            raise NodeFailed(f"it was silent for {patience_s:g} s") from error


async def _read(pieces: AsyncIterator[bytes], limit: int) -> Json:
    body = bytearray()
    async for piece in pieces:
        body += piece
        if len(body) > limit:
            raise NodeFailed(f"it answered with over {limit} bytes")
    try:
        return strict_json.parse_object(bytes(body))
    except ValueError as error:
        raise NodeFailed("it answered with what is no JSON object") from error
