"""Nodes that send their answers in frames, as ours do, and say what they are told to say."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from starlette.requests import Request
from starlette.responses import Response

from r3mes_vllm.carry import FRAMES, HEADER, RESUME, Frame, Past, Step, unpack_past
from tests.backend.stand_ins import LEGAL_CID, DiesAfter, streams

WORDS = ("To", " be", ",", " or", " nöt", " to", " be", ".")
TEXT = "".join(WORDS)
TOLD = {"X-R3MES-Adapter": "legal", "X-R3MES-CID": LEGAL_CID}


def event(word: str, created: int) -> bytes:
    delta = {"id": "chatcmpl-1", "created": created, "choices": [{"delta": {"content": word}}]}
    return b"data: " + json.dumps(delta, separators=(",", ":")).encode() + b"\n\n"


@dataclass
class Framing:
    """Says `words`, a token each, and dies after `dies_after` frames."""

    dies_after: int | None = None
    created: int = 1
    headers: dict[str, str] = field(default_factory=lambda: dict(TOLD))
    past: list[Past] = field(default_factory=list)
    words: Sequence[str] = WORDS

    async def __call__(self, request: Request) -> Response:
        frames, headers = self.frames(await request.body(), request.headers[HEADER])
        if self.dies_after is not None:
            return DiesAfter(*frames[: self.dies_after], headers=headers)
        response = await streams(*frames, media_type=headers["content-type"])(request)
        response.headers.update(headers)
        return response

    def frames(self, body: bytes, carry: str) -> tuple[list[bytes], dict[str, str]]:
        """And their headers. As the node does, it repeats the steps that it is given."""
        groups: list[Sequence[int]] = []
        if carry == RESUME:
            past, body = unpack_past(body)
            self.past.append(past)
            if past.steps is None:
                count = next(n for n in range(99) if "".join(self.words[:n]) == past.text)
                groups = [range(count)]
            else:
                groups = [step.tokens for step in past.steps]
        known = sum(map(len, groups))
        groups += [[number] for number in range(known, len(self.words))]
        events = "messages" in json.loads(body)
        kind = "text/event-stream; charset=utf-8" if events else "text/plain; charset=utf-8"
        headers = self.headers | {HEADER: FRAMES, "content-type": kind}
        return list(self._framed(groups, events=events)), headers

    def _framed(self, groups: Iterable[Sequence[int]], *, events: bool) -> Iterable[bytes]:
        for tokens in groups:
            word = "".join(self.words[it] for it in tokens)
            last = tokens[-1] == len(self.words) - 1
            step = Step(list(tokens), "stop" if last else None)
            if not events:
                yield Frame([step], word.encode()).pack()
                continue
            if tokens[0] == 0:
                yield Frame([step], event("", self.created)).pack()
                yield Frame([], event(word, self.created)).pack()
            else:
                yield Frame([step], event(word, self.created)).pack()
            if last:
                yield Frame([], b"data: [DONE]\n\n").pack()
