"""How each request ended: a line for the operator, a count for Prometheus.

Nothing of what was asked or answered is here, no key and no wallet: names stand for adapters that
are served, routes for paths, codes for errors.
"""

import json
import time
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from r3mes_vllm import report
from r3mes_vllm.engine.watching import Generation
from r3mes_vllm.node.guard import ROUTES, asked_of
from r3mes_vllm.node.load import INFERENCE
from r3mes_vllm.node.measures import BASE, OTHER, Measures
from r3mes_vllm.request_id import HEADER
from r3mes_vllm.settings import Settings

COMPLETE, LEFT, FAILED, REFUSED = "complete", "left", "failed", "refused"

_POLLED = {"/health", "/ready", "/metrics"}
"""Somebody asks for these all the time: not worth a line."""

_ERROR_BYTES = 1 << 16


@dataclass(eq=False)
class Entry:
    """One request. What is not known stays empty."""

    request_id: str
    route: str
    """Method and path, as they stand in the guard's table; `unknown` if they don't."""
    began: float = field(default_factory=time.perf_counter)
    adapter: str = ""
    cid: str = ""
    status: int = 0
    code: str = ""
    """Of the error that was answered."""
    prompt_tokens: int = 0
    generated_tokens: int = 0
    first_token_s: float | None = None
    seconds: float = 0.0
    outcome: str = FAILED

    @property
    def is_inference(self) -> bool:
        method, _, path = self.route.partition(" ")
        return method == "POST" and path.startswith(INFERENCE)


Ended = Callable[[Entry], None]

_current: ContextVar[Entry | None] = ContextVar("r3mes_entry", default=None)


def note(adapter: str | None, cid: str | None) -> None:
    """The request being answered holds that adapter; None is the base model."""
    if (entry := _current.get()) is not None:
        entry.adapter = adapter.partition("@")[0] if adapter else BASE
        entry.cid = cid or ""


def observe(generation: Generation) -> "_Watch":
    """To be told of each generation of the engine."""
    note(generation.adapter, generation.cid)
    entry = _current.get()
    if entry is not None:
        entry.prompt_tokens += generation.prompt_tokens
    return _Watch(generation, entry)


class _Watch:
    def __init__(self, generation: Generation, entry: Entry | None) -> None:
        self._generation = generation
        self._entry = entry

    def generated(self, tokens: int) -> None:
        entry = self._entry
        if entry is None:
            return
        entry.generated_tokens += tokens
        if entry.first_token_s is None:
            entry.first_token_s = self._generation.first_s

    def ended(self) -> None:
        pass


class Journal:
    """ASGI middleware: each of `ended` is called once for each request, whatever came of it."""

    def __init__(self, app: ASGIApp, ended: Sequence[Ended]) -> None:
        self._app = app
        self._ended = ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        entry = Entry(Headers(scope=scope).get(HEADER, ""), _route(scope))
        left = whole = False

        async def watching() -> Message:
            nonlocal left
            message = await receive()
            left = left or message["type"] == "http.disconnect"
            return message

        async def watched(message: Message) -> None:
            nonlocal whole
            if message["type"] == "http.response.start":
                entry.status = message["status"]
            elif message["type"] == "http.response.body":
                if entry.status >= 400 and not entry.code:
                    entry.code = _code(message.get("body", b""), entry.status)
                whole = not left and not message.get("more_body", False)
            await send(message)

        token = _current.set(entry)
        try:
            await self._app(scope, watching, watched)
        finally:
            _current.reset(token)
            entry.seconds = time.perf_counter() - entry.began
            entry.outcome = _outcome(entry, left=left, whole=whole)
            for told in self._ended:
                told(entry)


def ends(settings: Settings, measures: Measures) -> list[Ended]:
    """What is done of each request that has ended."""
    if not (settings.log_requests or settings.log_json):
        return [_counting(measures)]
    return [_counting(measures), lines(as_json=settings.log_json)]


def _counting(measures: Measures) -> Ended:
    """Into the metrics, what was asked of a model."""

    def count(entry: Entry) -> None:
        if entry.is_inference:
            of = measures.of(entry.adapter or OTHER)
            of.requests[entry.outcome] += 1
            of.asked_at = time.time()

    return count


def lines(*, as_json: bool) -> Ended:
    """On the standard output, one for each request."""
    form = _json if as_json else _text

    def write(entry: Entry) -> None:
        if entry.route.partition(" ")[2] not in _POLLED:
            report.line(form(entry))

    return write


def _route(scope: Scope) -> str:
    method, route, _ = asked_of(scope)
    return f"{method} {route}" if (method, route) in ROUTES else "unknown"


def _outcome(entry: Entry, *, left: bool, whole: bool) -> str:
    if entry.status and whole:
        if entry.status < 400:
            return COMPLETE
        # what the node has no room for now is refused; what it could not do has failed
        if entry.status < 500 or (entry.status == 503 and entry.code != "engine"):
            return REFUSED
        return FAILED
    return LEFT if left else FAILED


def _code(body: bytes, status: int) -> str:
    """Of an error of ours; vLLM's own have none, and are told by their status."""
    try:
        code = json.loads(body)["error"]["code"] if len(body) <= _ERROR_BYTES else None
    except (ValueError, TypeError, KeyError, RecursionError):
        code = None
    return code if isinstance(code, str) else str(status)


def _json(entry: Entry) -> str:
    fields: dict[str, Any] = {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "request_id": entry.request_id,
        "route": entry.route,
        "adapter": entry.adapter or None,
        "cid": entry.cid or None,
        "status": entry.status or None,
        "outcome": _told(entry),
        "prompt_tokens": entry.prompt_tokens,
        "generated_tokens": entry.generated_tokens,
        "first_token_s": _rounded(entry.first_token_s),
        "seconds": _rounded(entry.seconds),
    }
    return json.dumps(fields)


def _text(entry: Entry) -> str:
    parts = [f"request {entry.request_id} {entry.route} {entry.status or '-'} {_told(entry)}"]
    if entry.adapter:
        parts.append(f"{entry.adapter}@{entry.cid}" if entry.cid else entry.adapter)
    if entry.prompt_tokens or entry.generated_tokens:
        parts.append(f"{entry.prompt_tokens}+{entry.generated_tokens} tokens")
    if entry.first_token_s is not None:
        parts.append(f"first {entry.first_token_s:.3f} s")
    return ", ".join([*parts, f"{entry.seconds:.3f} s"])


def _told(entry: Entry) -> str:
    return f"{entry.outcome}:{entry.code}" if entry.outcome == REFUSED else entry.outcome


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 4)
