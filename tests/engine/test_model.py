"""A hub's model that can't be had: what is wrong with the name, and what passes."""

from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import httpx2
import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import OfflineModeIsEnabled

from r3mes_vllm.engine.model import why_not
from r3mes_vllm.errors import ConfigError, HubUnreachable, R3mesError


def listing(status: int, code: str) -> Callable[[], object]:
    """The hub's own client asks a hub that answers so."""

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            pass

    def ask() -> object:
        with HTTPServer(("127.0.0.1", 0), Hub) as server:
            Thread(target=server.handle_request, daemon=True).start()
            url = f"http://127.0.0.1:{server.server_port}"
            return HfApi(endpoint=url).list_repo_files("its/model")

    return ask


def raising(error: Exception) -> Callable[[], object]:
    def ask() -> object:
        raise error

    return ask


@pytest.mark.parametrize(
    ("ask", "kind", "said"),
    [
        (listing(403, "GatedRepo"), ConfigError, "HF_TOKEN"),
        (listing(401, "RepoNotFound"), ConfigError, "knows no such model"),
        (listing(404, "RepoNotFound"), ConfigError, "knows no such model"),
        (listing(501, ""), HubUnreachable, "does not answer now"),
        (raising(httpx2.ConnectError("Connection refused")), HubUnreachable, "refused"),
        (raising(httpx2.ReadTimeout("The read operation timed out")), HubUnreachable, "timed out"),
        (raising(OfflineModeIsEnabled("HF_HUB_OFFLINE")), ConfigError, "hub name or a local"),
        (raising(ValueError("no such architecture")), ConfigError, "hub name or a local"),
    ],
)
def test_only_what_passes_is_worth_another_start(
    ask: Callable[[], object], kind: type[R3mesError], said: str
) -> None:
    try:
        try:
            ask()
        except Exception as error:
            raise ValueError("Invalid repository ID or local directory specified") from error
    except ValueError as error:
        found = why_not("its/model", error)
    assert type(found) is kind
    assert said in f"{found}, {found.hint}"
    assert "its/model" in str(found)
