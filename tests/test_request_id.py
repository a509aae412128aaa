"""The id of a request, where one server sees it; from end to end in test_observed.py."""

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from r3mes_vllm.node.early import Early
from r3mes_vllm.request_id import RequestIds, surround
from tests.programs import free_port


async def says(request: Request) -> PlainTextResponse:
    headers = {"X-Request-Id": "of the application"}
    return PlainTextResponse(",".join(request.headers.getlist("x-request-id")), headers=headers)


async def fails(request: Request) -> PlainTextResponse:
    raise RuntimeError


def client() -> httpx.AsyncClient:
    app = Starlette(routes=[Route("/", says), Route("/fails", fails)])
    surround(app, RequestIds)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://x")


@pytest.mark.parametrize("given", ["a", "A.b_c:d-9", "x" * 128])
async def test_a_tame_one_is_kept(given: str) -> None:
    async with client() as http:
        answer = await http.get("/", headers={"X-Request-Id": given})
    assert answer.text == given
    assert answer.headers.get_list("x-request-id") == [given]


@pytest.mark.parametrize("given", [None, "", " ", "x" * 129, "a b", "é", 'a"', "a/b", "a%0ab"])
async def test_another_is_replaced(given: str | None) -> None:
    headers = [] if given is None else [(b"X-Request-Id", given.encode("latin-1"))]
    async with client() as http:
        answers = [await http.get("/", headers=headers) for _ in range(2)]
    ids = {answer.headers["x-request-id"] for answer in answers}
    assert ids == {answer.text for answer in answers}
    assert [len(id_) for id_ in ids] == [32, 32]


async def test_two_are_none() -> None:
    headers = [("X-Request-Id", "a"), ("X-Request-Id", "b")]
    async with client() as http:
        answer = await http.get("/", headers=headers)
    assert len(answer.text) == 32


@pytest.mark.parametrize(("path", "status"), [("/nowhere", 404), ("/fails", 500)])
async def test_errors_carry_it_too(path: str, status: int) -> None:
    async with client() as http:
        answer = await http.get(path, headers={"X-Request-Id": "mine"})
    assert (answer.status_code, answer.headers["x-request-id"]) == (status, "mine")


async def test_the_port_answers_with_it_before_the_engine_is_there() -> None:
    early = Early("127.0.0.1", free_port())
    try:
        async with httpx.AsyncClient() as http:
            url = f"http://127.0.0.1:{early.address[1]}/chat"
            answer = await http.post(url, headers={"X-Request-Id": "mine"})
            made = await http.post(url, headers={"X-Request-Id": "not / mine"})
    finally:
        early.close()
    assert (answer.status_code, answer.headers["x-request-id"]) == (503, "mine")
    assert len(made.headers["x-request-id"]) == 32
