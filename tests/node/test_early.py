"""The port before the engine is there; a whole start of a real node is in test_https.py."""

import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest
import uvicorn
from starlette.responses import JSONResponse

from r3mes_vllm.errors import PortTaken
from r3mes_vllm.node import early as module
from r3mes_vllm.node.early import Early
from tests.certificates import Authority
from tests.probing import Probe, probed
from tests.programs import free_port, wait_until

HANDOVERS = 10
SILENT = 200


@pytest.fixture
def early() -> Iterator[Early]:
    opened = Early("127.0.0.1", free_port())
    yield opened
    opened.close()


def url(early: Early) -> str:
    return f"http://127.0.0.1:{early.address[1]}"


def connect(early: Early) -> socket.socket:
    return socket.create_connection(early.address, timeout=10)


def is_closed(connection: socket.socket) -> bool:
    connection.settimeout(0.01)
    try:
        return connection.recv(1) == b""
    except TimeoutError:
        return False
    except ConnectionError:
        return True


@pytest.mark.parametrize("path", ["/health", "//health", "/health?x=1"])
def test_health_says_what_the_node_does(early: Early, path: str) -> None:
    early.reason = "adapters are being fetched"
    answer = httpx.get(url(early) + path)
    assert answer.status_code == 503
    assert answer.json() == {
        "status": "starting",
        "available_loras": [],
        "reason": "adapters are being fetched",
    }
    assert answer.headers["connection"] == "close"


def test_it_is_not_ready(early: Early) -> None:
    answer = httpx.get(f"{url(early)}/ready")
    assert answer.status_code == 503
    assert answer.json() == {"ready": False, "reason": "starting"}


@pytest.mark.parametrize(
    ("path", "shape"),
    [
        ("/chat", {"code", "message", "hint"}),
        ("/nothing", {"code", "message", "hint"}),
        ("/v1/chat/completions", {"code", "message", "type", "param"}),
    ],
)
def test_all_else_is_refused_for_now(early: Early, path: str, shape: set[str]) -> None:
    answer = httpx.post(url(early) + path, content=bytes(4 << 20))
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "starting"
    assert answer.json()["error"].keys() == shape
    assert answer.headers["retry-after"] == "5"
    assert answer.headers["connection"] == "close"


def test_a_head_has_no_body(early: Early) -> None:
    with connect(early) as connection:
        connection.sendall(b"HEAD /health HTTP/1.1\r\nHost: x\r\n\r\n")
        said = b""
        while part := connection.recv(1000):
            said += part
    assert said.startswith(b"HTTP/1.1 503 ")
    assert said.endswith(b"\r\n\r\n")


@pytest.mark.parametrize(
    "sent", [b"\r\n\r\n", b"\x16\x03\x01\r\n\r\n", b"GET\r\n\r\n", b"x" * 99999]
)
def test_nonsense_hurts_nobody(early: Early, sent: bytes) -> None:
    with connect(early) as connection:
        connection.sendall(sent)
        assert httpx.get(f"{url(early)}/health").status_code == 503


def test_silent_clients_keep_nobody_out_and_are_not_kept(early: Early) -> None:
    silent = [connect(early) for _ in range(SILENT)]
    began = time.monotonic()
    assert httpx.get(f"{url(early)}/health").status_code == 503
    assert time.monotonic() - began < 2
    left = sum(not is_closed(it) for it in silent)
    assert left <= module._CONNECTIONS
    for it in silent:
        it.close()


def test_without_the_bound_they_would_be_kept(
    early: Early, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_CONNECTIONS", SILENT + 1)
    silent = [connect(early) for _ in range(SILENT)]
    assert httpx.get(f"{url(early)}/health").status_code == 503
    assert sum(not is_closed(it) for it in silent) == SILENT
    for it in silent:
        it.close()


@pytest.mark.parametrize(("seconds", "ends"), [(0.2, True), (60, False)])
def test_a_slow_client_has_so_many_seconds(
    early: Early, monkeypatch: pytest.MonkeyPatch, seconds: float, ends: bool
) -> None:
    monkeypatch.setattr(module, "_CONNECTION_S", seconds)
    with connect(early) as slow:
        slow.sendall(b"GET /health HTTP/1.1\r\n")
        if ends:
            wait_until(lambda: is_closed(slow), 5, "it to be closed")
        else:
            time.sleep(1)
            assert not is_closed(slow)


def test_a_taken_port_is_said_at_once(early: Early) -> None:
    with pytest.raises(PortTaken, match=str(early.address[1])) as caught:
        Early(*early.address)
    assert "--port" in caught.value.hint


def test_another_address_gets_another_socket(early: Early) -> None:
    assert early.socket_for(early.address)
    assert early.socket_for(("127.0.0.1", free_port())) is None
    with pytest.raises(ConnectionRefusedError):
        connect(early)


Files = tuple[Path, Path]


@contextmanager
def served(door: socket.socket, files: Files | None) -> Iterator[None]:
    """By uvicorn, which answers 200."""
    certificate, key = files or (None, None)
    config = uvicorn.Config(
        JSONResponse({}),
        log_level="error",
        lifespan="off",
        ssl_certfile=certificate,
        ssl_keyfile=key,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [door]})
    thread.start()
    wait_until(lambda: server.started, 10, "uvicorn")
    yield
    server.should_exit = True
    thread.join()


def handed_over(early: Early, files: Files | None, trusting: ssl.SSLContext | None) -> Probe:
    door = early.socket_for(early.address)
    assert door
    with ExitStack() as stack, probed(early.address[1], trusting) as probe:
        wait_until(lambda: len(probe.statuses) > 3, 10, "answers")
        early.end()
        stack.enter_context(served(door, files))
        wait_until(lambda: probe.statuses[-1] == 200, 10, "answers of the next server")
    return probe


@pytest.mark.parametrize("encrypted", [False, True])
def test_nobody_is_refused_while_the_port_is_handed_over(tmp_path: Path, encrypted: bool) -> None:
    authority = Authority(tmp_path)
    files = tmp_path / "certificate.pem", tmp_path / "key.pem"
    authority.issue().write(*files)
    trusting = serving = None
    if encrypted:
        trusting = authority.trusting
        serving = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        serving.load_cert_chain(*files)
    for _ in range(HANDOVERS):
        early = Early("127.0.0.1", free_port(), serving)
        probe = handed_over(early, files if encrypted else None, trusting)
        assert not probe.failures
        assert probe.changes == [503, 200]


def test_a_port_closed_in_between_would_refuse() -> None:
    early = Early("127.0.0.1", free_port())
    with probed(early.address[1]) as probe:
        wait_until(lambda: len(probe.statuses) > 3, 10, "answers")
        early.close()
        wait_until(lambda: bool(probe.failures), 10, "one who is refused")


PROGRAM = """
import os, sys
from r3mes_vllm.node.early import Early
early = Early("127.0.0.1", int(sys.argv[1]))
if len(sys.argv) == 2:
    {before}
    os.execv(sys.executable, [sys.executable, *sys.argv, "again"])
print("open again")
"""


@pytest.mark.parametrize(
    ("before", "opens"),
    [("pass", True), ("os.set_inheritable(early._socket.fileno(), True)", False)],
)
def test_a_program_that_starts_again_finds_its_port(
    tmp_path: Path, before: str, opens: bool
) -> None:
    script = tmp_path / "program.py"
    script.write_text(PROGRAM.format(before=before))
    command = [sys.executable, str(script), str(free_port())]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ("open again" in ended.stdout) is opens
    assert ("PortTaken" in ended.stderr) is not opens
