"""Requests drawn from the OpenAPI document; `make conformance` draws ten thousand."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tests.conformance import schema
from tests.conformance.document import document
from tests.conftest import Network

REQUESTS, SEED = 300, 5


def test_no_mistake_of_a_client_is_a_failure_of_the_node(network: Network) -> None:
    before, said = schema.answer(network.node.url), network.node.output()
    found = schema.fuzz(network.node.url, REQUESTS, SEED, document())
    assert not found.findings
    assert found.requests > 0.9 * REQUESTS
    assert {name[-3:] for name in found.statuses} >= {"200", "400", "404"}
    assert schema.answer(network.node.url) == before
    assert "Traceback" not in network.node.output().removeprefix(said)


@pytest.fixture
def failing() -> Iterator[str]:
    """A server that fails."""

    class Failing(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers.get("content-length") or 0))
            self.send_response(500)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Failing)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_failure_is_found(failing: str) -> None:
    body = {"content": {"application/json": {"schema": {"type": "object"}}}, "required": True}
    told = {"requestBody": body, "responses": {"200": {"description": ""}}}
    small = {
        "openapi": "3.1.0",
        "info": {"title": "", "version": ""},
        "paths": {"/v1/completions": {"post": told}},
    }
    [found] = schema.fuzz(failing, 20, SEED, small).findings
    assert found["wrong"] == "a failure of the server"
