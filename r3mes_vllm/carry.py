"""How a node gives its backend an answer that another node can go on with.

A request with `X-R3MES-Carry: frames` is answered, if its answer is a stream, by frames under the
same header: a line of JSON `[bytes, steps]`, then so many bytes of the answer itself. `steps` are
what the engine gave since the last frame, `null` once the answer can't be gone on with. All that a
node says it says because of those steps, in order, so another one that is given them (a request
with `X-R3MES-Carry: resume`, whose body is a line of JSON and then the first node's request) says
the same again, frame by frame, and goes on.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

HEADER = "x-r3mes-carry"
FRAMES = "frames"
RESUME = "resume"

_LONGEST_LINE = 1 << 20
"""Bytes. A frame's line is some hundred, of a request that waited long some thousands."""
_LARGEST_FRAME = 8 << 20
"""Bytes."""
_MOST_STEPS = 1024
"""In one frame."""
MOST_TOKENS = 1 << 17
"""Of an answer that another node can go on with."""
_ENDS = ("stop", "length", "repetition")
_LONGEST_STOP = 10_000
"""Characters."""


@dataclass(frozen=True, slots=True)
class Step:
    """Tokens that the engine gave at a time, and how the answer ended with them, in vLLM's words;
    `stop` is the string or token that ended it."""

    tokens: Sequence[int]
    finish: str | None = None
    stop: int | str | None = None


@dataclass(frozen=True, slots=True)
class Frame:
    steps: Sequence[Step] | None
    data: bytes

    def pack(self) -> bytes:
        return _line([len(self.data), _plain(self.steps)]) + self.data


@dataclass(frozen=True)
class Past:
    """What an answer is to go on with: the `steps` of a node that sent frames, or the `text` of one
    that did not."""

    steps: Sequence[Step] | None
    text: str = ""

    def pack(self, body: bytes) -> bytes:
        return _line({"steps": _plain(self.steps), "text": self.text}) + body


def unpack_past(body: bytes) -> tuple[Past, bytes]:
    """And the request itself. Raises ValueError."""
    line, found, rest = body.partition(b"\n")
    value = json.loads(line) if found else None
    if not isinstance(value, dict) or not isinstance(value.get("text"), str):
        raise ValueError("its first line is not what an answer is to go on with")
    return Past(_steps(value.get("steps"), MOST_TOKENS), value["text"]), rest


@dataclass
class Unpacker:
    """From bytes, in whatever pieces they come, to frames."""

    _waiting: bytearray = field(default_factory=bytearray)
    _head: tuple[int, Sequence[Step] | None] | None = None

    @property
    def is_within(self) -> bool:
        """Whether the rest of a frame is to come."""
        return bool(self._waiting or self._head)

    def feed(self, piece: bytes) -> Iterator[Frame]:
        """Those that `piece` completes. Raises ValueError for what is none."""
        self._waiting += piece
        while True:
            if self._head is None:
                end = self._waiting.find(b"\n")
                if (len(self._waiting) if end < 0 else end) > _LONGEST_LINE:
                    raise ValueError("the line of a frame is too long")
                if end < 0:
                    return
                self._head = _read_head(bytes(self._waiting[:end]))
                del self._waiting[: end + 1]
            size, steps = self._head
            if len(self._waiting) < size:
                return
            data = bytes(self._waiting[:size])
            del self._waiting[:size]
            self._head = None
            yield Frame(steps, data)


def _read_head(line: bytes) -> tuple[int, Sequence[Step] | None]:
    value = json.loads(line)
    if not isinstance(value, list) or len(value) != 2 or not _is_count(value[0]):
        raise ValueError("no frame")
    if value[0] > _LARGEST_FRAME:
        raise ValueError("a frame is too large")
    return value[0], _steps(value[1], _MOST_STEPS)


def _steps(value: object, most: int) -> list[Step] | None:
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(it, list) and it for it in value):
        raise ValueError("steps are lists")
    if len(value) > most:
        raise ValueError("too many steps")
    found: list[Step] = []
    for tokens, *end in value:
        if not isinstance(tokens, list) or not all(map(_is_count, tokens)):
            raise ValueError("tokens are numbers")
        finish, stop = end if end else (None, None)
        if end and (finish not in _ENDS or not isinstance(stop, int | str | None)):
            raise ValueError("an end is a word and what stopped it")
        if isinstance(stop, str) and len(stop) > _LONGEST_STOP:
            raise ValueError("what stopped it is too long")
        if not (tokens or finish) or (found and found[-1].finish):
            raise ValueError("a step has tokens, and the last one may have an end")
        found.append(Step(tokens, finish, stop))
    return found


def _plain(steps: Sequence[Step] | None) -> Any:
    if steps is None:
        return None
    return [[it.tokens, it.finish, it.stop] if it.finish else [it.tokens] for it in steps]


def _line(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode() + b"\n"


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0
