"""Bodies that are no JSON object, at each route that takes one."""

import httpx
import pytest

from tests.conftest import Network

ROUTES = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings", "/chat")
NO_OBJECT = {
    "empty": b"",
    "no JSON": b"{not json}",
    "cut off": b'{"model": "legal"',
    "array": b"[]",
    "null": b"null",
    "NaN": b'{"model": "legal", "temperature": NaN}',
    "invalid UTF-8": b'{"model": "\xff"}',
    "UTF-16": '{"model": "legal"}'.encode("utf-16"),
    "deep": b'{"model": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "huge integer": b'{"model": ' + b"9" * 5000 + b"}",
    "lone surrogate": b'{"model": "\\ud800"}',
    "lone surrogate in depth": b'{"model": "legal", "messages": [{"content": ["\\ud83d x"]}]}',
}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("body", NO_OBJECT.values(), ids=NO_OBJECT.keys())
@pytest.mark.parametrize("through", ["node", "backend"])
def test_it_is_a_400(network: Network, through: str, body: bytes, route: str) -> None:
    url = (network.node if through == "node" else network.backend).url + route
    answer = httpx.post(url, content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert isinstance(error["message"], str)
    assert isinstance(error["code"], str)
    if route != "/chat":
        assert error["type"] == "invalid_request_error"
        assert error["param"] is None
