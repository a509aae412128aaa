"""How each kind of request ends, as the node's operator reads it."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp

from r3mes_vllm import report
from r3mes_vllm.disconnect import while_connected
from r3mes_vllm.engine.watching import Generation
from r3mes_vllm.errors import EngineError
from r3mes_vllm.node import journal
from r3mes_vllm.node.journal import Entry, Journal
from r3mes_vllm.node.measures import Measures
from r3mes_vllm.request_id import RequestIds
from r3mes_vllm.settings import load

SECRET = "what-nobody-may-read"


async def answers(request: Request) -> Response:
    watch = journal.observe(
        Generation("legal", "baf1", prompt_tokens=5, streamed=True, first_s=0.25)
    )
    watch.generated(3)
    watch.ended()
    return JSONResponse({"answer": SECRET})


async def refuses(request: Request) -> Response:
    status = int(request.query_params["status"])
    code: Any = request.query_params.get("code") or status
    return JSONResponse({"error": {"code": code, "message": SECRET}}, status)


async def breaks(request: Request) -> Response:
    async def parts() -> AsyncIterator[str]:
        yield SECRET
        raise EngineError("the engine died")

    return StreamingResponse(parts())


async def fails(request: Request) -> Response:
    raise RuntimeError(SECRET)


def application(*ended: journal.Ended) -> ASGIApp:
    routes = [
        Route("/chat", answers, methods=["POST"]),
        Route("/v1/completions", refuses, methods=["POST"]),
        Route("/v1/chat/completions", breaks, methods=["POST"]),
        Route("/v1/responses", fails, methods=["POST"]),
        Route("/health", answers),
    ]
    return RequestIds(Journal(Starlette(routes=routes), ended))


async def post(path: str, *ended: journal.Ended, **more: Any) -> None:
    transport = httpx.ASGITransport(application(*ended), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://node") as client:
        with contextlib.suppress(EngineError):
            await client.post(path, json={"message": SECRET}, **more)


async def entry(path: str, **more: Any) -> Entry:
    found: list[Entry] = []
    await post(path, found.append, **more)
    (only,) = found
    return only


async def test_an_answer_is_told_with_its_adapter_and_tokens() -> None:
    it = await entry("/chat", headers={"X-Request-Id": "one"})
    assert (it.request_id, it.route) == ("one", "POST /chat")
    assert (it.status, it.outcome) == (200, "complete")
    assert (it.adapter, it.cid) == ("legal", "baf1")
    assert (it.prompt_tokens, it.generated_tokens, it.first_token_s) == (5, 3, 0.25)
    assert it.seconds > 0


@pytest.mark.parametrize(
    ("status", "code", "outcome", "told"),
    [
        (400, "", "refused", "400"),
        (404, "model_not_found", "refused", "model_not_found"),
        (503, "busy", "refused", "busy"),
        (503, "engine", "failed", "engine"),
        (500, "", "failed", "500"),
        (502, "ipfs", "failed", "ipfs"),
    ],
)
async def test_a_refusal_is_told_with_its_code(
    status: int, code: str, outcome: str, told: str
) -> None:
    it = await entry("/v1/completions", params={"status": status, "code": code})
    assert (it.outcome, it.code) == (outcome, told)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses"])
async def test_what_breaks_has_failed(path: str) -> None:
    assert (await entry(path)).outcome == "failed"


async def test_a_client_that_leaves_has_left() -> None:
    found: list[Entry] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await while_connected(receive, asyncio.sleep(60))

    async def receive() -> Any:
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        raise AssertionError("nobody is there")

    scope = {"type": "http", "method": "POST", "path": "/chat", "headers": []}
    await Journal(app, [found.append])(scope, receive, send)
    assert found[0].outcome == "left"


@pytest.mark.parametrize("path", [f"/{SECRET}", f"/chat/{SECRET}"])
async def test_a_path_of_somebodys_own_is_not_repeated(path: str) -> None:
    assert (await entry(path)).route == "unknown"
    assert (await entry(f"/adapters/{SECRET}")).route == "unknown"  # POST is not in the table


@pytest.mark.parametrize("as_json", [False, True])
async def test_lines_hold_nothing_of_what_was_said(
    as_json: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []
    monkeypatch.setattr(report, "line", written.append)
    for path in ("/chat", "/v1/chat/completions", "/v1/responses", f"/{SECRET}"):
        await post(path, journal.lines(as_json=as_json))
    await post("/v1/completions", journal.lines(as_json=as_json), params={"status": 404})
    assert len(written) == 5
    assert SECRET not in "".join(written)
    if not as_json:
        assert "POST /chat 200 complete, legal@baf1, 5+3 tokens, first 0.250 s" in written[0]
        return
    fields = json.loads(written[0])
    assert fields["adapter"] == "legal"
    assert fields["generated_tokens"] == 3
    assert json.loads(written[-1])["outcome"] == "refused:404"


async def test_what_is_asked_all_the_time_has_no_line(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    monkeypatch.setattr(report, "line", written.append)
    transport = httpx.ASGITransport(application(journal.lines(as_json=False)))
    async with httpx.AsyncClient(transport=transport, base_url="http://node") as client:
        await client.get("/health")
    assert not written


async def test_requests_to_a_model_are_counted_by_outcome() -> None:
    measures = Measures()
    measures.served = lambda: ["legal"]
    (count,) = journal.ends(load(), measures)
    for path in ("/chat", "/chat", "/v1/responses", "/elsewhere"):
        await post(path, count)
    assert measures.of("legal").requests == {"complete": 2}
    assert measures.of("other").requests == {"failed": 1}
    assert len(journal.ends(load({"log_requests": True}), measures)) == 2
    assert len(journal.ends(load({"log_json": True}), measures)) == 2
