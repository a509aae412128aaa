"""How far an answer has come, and the rest of it from another node.

What a node of ours sends comes in frames with the tokens they were made of (see `carry`): another
is given those tokens, makes the same frames again, and the ones that the client has are left out.
Plain text of a node without frames is gone on with by a node of ours that is given the text, or by
any node that says the same again from its beginning.
"""

import re
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import replace

from r3mes_vllm.backend.cids import canonical
from r3mes_vllm.backend.dial import Beginning, Outgoing
from r3mes_vllm.backend.events import LAST
from r3mes_vllm.backend.known import KnownNode
from r3mes_vllm.backend.refusals import NodeFailed
from r3mes_vllm.carry import FRAMES, HEADER, MOST_TOKENS, RESUME, Frame, Past, Step, Unpacker

EVENTS = "text/event-stream"
_TEXT = "text/plain"
STREAMS = (EVENTS, _TEXT)
_CREATED = re.compile(rb'"created(?:_at)?":(\d{1,12})')
"""What differs from node to node. In a string, its quotation marks would have backslashes."""
_ADAPTER = b"x-adapter"
_MOST_TEXT = 4 << 20
"""Bytes."""
_LAST_EVENTS = (b"data: [DONE]", *(f"event: {it}".encode() for it in LAST))
"""At the beginning of a line, where nothing that a model says can be: that stands in JSON."""


class _Told:
    """By one node."""

    def __init__(self) -> None:
        self.steps: list[Step] | None = []
        """Of its frames; None where it can't tell them, or they are too many."""
        self.frames = 0
        self._tokens = 0

    def note(self, frame: Frame) -> None:
        self.frames += 1
        if self.steps is None:
            return
        self._tokens += sum(len(step.tokens) for step in frame.steps or ())
        if frame.steps is None or self._tokens > MOST_TOKENS:
            self.steps = None
        else:
            self.steps += frame.steps


class Course:
    """Of one answer, of the adapter or model `name`. Who is asked for it comes into `asked`."""

    def __init__(self, outgoing: Outgoing, name: str | None, asked: set[str]) -> None:
        self._outgoing = replace(outgoing, headers=[*outgoing.headers, _header(FRAMES)])
        self._name = name.partition("@")[0] if name else None
        self._asked = asked
        self.begun = False
        self.kind = ""
        """Media type."""
        self._status = 0
        self.adapter: str | None = None
        self.cid: str | None = None
        """Of the adapter that answers, as far as the node says so."""
        self.base_model: str | None = None
        self.nodes: list[str] = []
        """Wallets of those that gave it, in order."""
        self._told: _Told | None = None
        """What the client has, as the last node that gave something told it."""
        self._ended = False
        """Events have said that they are at their end."""
        self.is_within_event = False
        self._text: bytearray | None = bytearray()
        """What the client has of a plain text; None if that is too much to keep."""
        self._created: bytes | None = None

    @property
    def is_whole(self) -> bool:
        """Whether the client has all of it, as far as that can be known."""
        if self.kind == EVENTS:
            return self._ended
        return bool(self.kind == _TEXT and self._steps and self._steps[-1].finish)

    @property
    def _steps(self) -> list[Step] | None:
        """Of what the client has; None if who gave it sends no frames, or can't tell them."""
        return self._told.steps if self._told else None

    def can_ask(self, node: KnownNode) -> bool:
        """Whether `node` could give the rest."""
        if not self.begun:
            return True
        is_kept = self.kind == _TEXT and self._text is not None
        return self._status == 200 and (self._by_steps(node) or is_kept)

    def outgoing(self, node: KnownNode) -> Outgoing | None:
        """What to ask of `node`: all, the rest, or None if it can't give the rest."""
        if not self.can_ask(node):
            return None
        self._asked.add(node.wallet_address)
        if not self.begun:
            return self._outgoing
        if self._by_steps(node):
            return self._resumed(Past(self._steps))
        if node.version is None:
            return replace(self._outgoing, resumes=True)
        return self._resumed(Past(None, (self._text or b"").decode(errors="ignore")))

    async def pieces(self, beginning: Beginning) -> AsyncGenerator[bytes, None]:
        """What the client has not had yet, as it comes. Raises NodeFailed if the node does not go
        on with what the client has had, ends before the answer's end, or says nothing; besides,
        what its connection raises."""
        framed, by_steps = self._enter(beginning)
        told = self._told if by_steps and self._told else _Told()
        known_frames = told.frames
        known_bytes = len(self._text or b"") if self.begun and not by_steps else 0
        self.begun = True
        async for frame in self._received(beginning, framed=framed):
            if known_frames:
                known_frames -= 1
                continue
            told.note(frame)
            data = frame.data
            if known_bytes:
                data, known_bytes = self._beyond(data, known_bytes)
            if not known_bytes:  # before, the client has what another node told
                self._told = told
            if data:
                if beginning.node.wallet_address not in self.nodes:
                    self.nodes.append(beginning.node.wallet_address)
                yield self._had(data)
        if known_frames or known_bytes:
            raise NodeFailed("its answer ended before what another had said")
        can_tell = self.kind == EVENTS or (self.kind == _TEXT and self._steps is not None)
        if framed and can_tell and not self.is_whole:
            raise NodeFailed("its answer ended before its end")
        if not self.nodes and 200 <= self._status < 300:
            raise NodeFailed("it answered nothing")

    def _by_steps(self, node: KnownNode) -> bool:
        return node.version is not None and self._steps is not None

    def _resumed(self, past: Past) -> Outgoing:
        headers = [it for it in self._outgoing.headers if it[0] not in (HEADER.encode(), _ADAPTER)]
        if self.adapter:  # that the first node may have chosen
            headers.append((_ADAPTER, self.adapter.encode()))
        body = past.pack(self._outgoing.body)
        return replace(self._outgoing, headers=[*headers, _header(RESUME)], body=body, resumes=True)

    def _enter(self, beginning: Beginning) -> tuple[bool, bool]:
        """Whether `beginning` is in frames, and repeats those that the client has."""
        headers, node = beginning.response.headers, beginning.node
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        framed = headers.get(HEADER) == FRAMES
        adapter, cid = headers.get("x-r3mes-adapter"), headers.get("x-r3mes-cid")
        by_steps = self.begun and self._by_steps(node)
        listed = node.adapters.get(adapter or "")
        if cid and listed and canonical(cid) != canonical(listed):
            raise NodeFailed(f"it has another version of {adapter!r} by now")
        if self.begun:
            status = beginning.response.status_code
            if status != 200 or kind != self.kind:
                raise NodeFailed(f"it does not go on with the answer: {status}, or of another kind")
            if (by_steps or (cid and self.cid)) and (adapter, cid) != (self.adapter, self.cid):
                raise NodeFailed("it does not go on with the answer: it has another version")
            if by_steps and not framed:
                raise NodeFailed("it does not go on with the answer: it sends no frames")
            return framed, by_steps
        if adapter and self._name and adapter != self._name:
            raise NodeFailed(f"it answered as another adapter than {self._name!r}")
        self.kind, self.adapter, self.cid = kind, adapter, cid
        self._status = beginning.response.status_code
        self.base_model = node.base_model
        return framed, by_steps

    async def _received(self, beginning: Beginning, *, framed: bool) -> AsyncIterator[Frame]:
        unpacker = Unpacker()
        piece: bytes | None = beginning.first
        while piece is not None:
            if piece and not framed:
                yield Frame(None, piece)
            elif piece:
                try:
                    for frame in unpacker.feed(piece):
                        yield frame
                except (ValueError, RecursionError) as error:
                    raise NodeFailed(f"its frames are none: {error}") from error
            piece = await anext(beginning.rest, None)
        if unpacker.is_within:
            raise NodeFailed("its answer ended within a frame")

    def _beyond(self, data: bytes, known: int) -> tuple[bytes, int]:
        """What of `data` is more than the `known` bytes that are still to come again."""
        text = self._text or b""
        again, start = data[:known], len(text) - known
        if text[start : start + len(again)] != again:
            raise NodeFailed("it says something else than what the client has had")
        return data[known:], known - len(again)

    def _had(self, data: bytes) -> bytes:
        """`data` as it goes to the client."""
        if self.kind == _TEXT and self._text is not None:
            self._text += data
            if len(self._text) > _MOST_TEXT:
                self._text = None
        if self.kind != EVENTS:
            return data
        self._ended |= any(data.startswith(it) or b"\n" + it in data for it in _LAST_EVENTS)
        self.is_within_event = not data.endswith(b"\n\n")
        if len(self.nodes) > 1 and (created := self._created):
            return _CREATED.sub(lambda it: it[0].replace(it[1], created), data)
        if self._created is None and (found := _CREATED.search(data)):
            self._created = found[1]
        return data


def _header(value: str) -> tuple[bytes, bytes]:
    return HEADER.encode(), value.encode()
