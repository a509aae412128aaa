"""The dashboard in a browser, and nodes that stream for it."""

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from tests.backend.stand_ins import Network
from tests.peers.chromium import Page

ATTACK = "window.pwned = true"
HOSTILE = f"\"'><img src=x onerror='{ATTACK}'><script>{ATTACK}</script>"


@dataclass
class Speaker:
    """A node that streams `pieces`, of which those after the first wait until `go` is set."""

    pieces: tuple[str, ...]
    go: asyncio.Event = field(default_factory=asyncio.Event)

    async def __call__(self, request: Request) -> Response:
        return StreamingResponse(self._events(), media_type="text/event-stream")

    async def _events(self) -> AsyncIterator[str]:
        for number, piece in enumerate(self.pieces):
            if number:
                await self.go.wait()
            yield event({"choices": [{"index": 0, "delta": {"content": piece}}]})
        yield event({"choices": [], "usage": {"completion_tokens": len(self.pieces)}})
        yield "data: [DONE]\n\n"


def event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body)}\n\n"


@dataclass
class Pair:
    """A base model and the adapter `legal`, at two nodes."""

    network: Network
    base: Speaker
    legal: Speaker

    def go(self) -> None:
        self.base.go.set()
        self.legal.go.set()


async def choose(page: Page, *models: str) -> None:
    await page.evaluate(
        "for (const box of document.querySelectorAll('[name=model]')) "
        f"box.checked = {json.dumps(models)}.includes(box.value)"
    )


async def ask(page: Page, *models: str) -> None:
    await choose(page, *models)
    await page.evaluate("document.querySelector('#ask').requestSubmit()")


def spotless(page: Page, network: Network) -> None:
    """No error, and no request to anyone else."""
    assert page.errors == []
    assert page.requests
    assert [url for url in page.requests if not url.startswith(network.url)] == []
