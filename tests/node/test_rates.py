"""What a minute allows, of each key and each address; each limit from both sides."""

from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient
from starlette.types import ASGIApp, Receive, Scope, Send

from r3mes_vllm.node import rates
from r3mes_vllm.node.guard import CALLER, Caller
from r3mes_vllm.node.rates import Rates
from r3mes_vllm.tables import RateSettings

TOKENS = 30
"""Of one answer."""


async def answer(request: Request) -> PlainTextResponse:
    if spend := rates.spend.get():
        for _ in range(TOKENS):
            spend(1)
    return PlainTextResponse("yes")


class Known:
    """In the guard's place: the header says who calls."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        key = dict(scope["headers"]).get(b"x-api-key", b"").decode() or None
        scope[CALLER] = Caller(key, trusted=key == "admin")
        await self._app(scope, receive, send)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1_000_000.0]
    monkeypatch.setattr("time.time", lambda: now[0])
    return now


def client(address: str = "192.0.2.1", **limits: Any) -> TestClient:
    routes = [Route(path, answer, methods=["GET", "POST"]) for path in ("/chat", "/v1/x", "/other")]
    app = Known(Rates(Starlette(routes=routes), RateSettings(**limits)))
    return TestClient(app, client=(address, 1))


def statuses(client: TestClient, count: int, key: str = "", path: str = "/chat") -> list[int]:
    headers = {"x-api-key": key} if key else {}
    return [client.post(path, headers=headers).status_code for _ in range(count)]


def test_without_limits_nothing_is_refused() -> None:
    assert set(statuses(client(), 50, "one")) == {200}


def test_requests_of_a_key_and_only_of_that_key(clock: list[float]) -> None:
    it = client(requests=3)
    assert statuses(it, 4, "one") == [200] * 3 + [429]
    assert statuses(it, 4, "two") == [200] * 3 + [429]
    assert statuses(it, 9) == [200] * 9
    assert statuses(it, 9, "admin") == [200] * 9
    assert statuses(it, 9, "one", "/other") == [200] * 9
    clock[0] += 121
    assert statuses(it, 1, "one", "/v1/x") == [200]


def test_requests_of_an_address_whatever_its_keys(clock: list[float]) -> None:
    it = client(address_requests=3)
    assert statuses(it, 2, "one") + statuses(it, 2, "two") == [200] * 3 + [429]
    assert statuses(it, 9, "admin") == [200] * 9


def test_tokens_are_counted_as_they_come_and_the_next_request_is_refused(
    clock: list[float],
) -> None:
    it = client(tokens=2 * TOKENS + 1)
    assert statuses(it, 4, "one") == [200] * 3 + [429]
    assert statuses(it, 1, "two") == [200]
    clock[0] += 121
    assert statuses(it, 1, "one") == [200]


def test_a_refusal_says_which_limit_and_when_to_come_again(clock: list[float]) -> None:
    it = client(requests=1)
    statuses(it, 1, "one")
    for path, error in (("/chat", "code"), ("/v1/x", "type")):
        refused = it.post(path, headers={"x-api-key": "one"})
        assert refused.status_code == 429
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        assert "1 requests a minute for this key" in refused.json()["error"]["message"]
        assert refused.json()["error"][error]
    clock[0] += int(refused.headers["retry-after"])
    assert statuses(it, 1, "one") == [200]
