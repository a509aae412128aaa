"""The backend as a program of its own."""

import asyncio
import contextlib
import json
import re
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from r3mes_vllm import __version__
from r3mes_vllm.backend.database import database_url
from r3mes_vllm.backend.registry import Registry
from r3mes_vllm.backend.server import listen, run, warnings
from r3mes_vllm.errors import ConfigError, DatabaseUnreachable, PortTaken
from r3mes_vllm.settings import load
from tests.backend.stand_ins import Clock, Network, StandIn, serving, unused_port

PROGRAM = (
    "import json, sys; from r3mes_vllm.settings import load; "
    "from r3mes_vllm.backend.server import run; run(load(json.loads(sys.argv[1])))"
)
STOPS_S = 15


@contextmanager
def program(**settings: Any) -> "Iterator[subprocess.Popen[str]]":
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, json.dumps(settings)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_it_says_where_it_listens_and_ends_when_told(tmp_path: Path, stop: signal.Signals) -> None:
    port, database = unused_port(), f"sqlite:///{tmp_path}/b.sqlite3"
    with program(backend_port=port, database_url=database) as process:
        assert process.stdout
        line = process.stdout.readline()
        assert line == (
            f"backend listens on http://127.0.0.1:{port}, "
            f"database sqlite+aiosqlite:///{tmp_path}/b.sqlite3\n"
        )
        answer = httpx.get(f"http://127.0.0.1:{port}/health", trust_env=False)
        assert answer.json() == {"status": "ok", "nodes": 0, "version": __version__}
        assert "server" not in answer.headers
        process.send_signal(stop)
        process.wait(STOPS_S)
        assert process.stdout.read() == ""
    with socket.create_server(("127.0.0.1", port)):
        pass


def test_it_takes_all_descriptors_that_it_may_have(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    port, database = unused_port(), f"sqlite:///{tmp_path}/b.sqlite3"
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        with program(backend_port=port, database_url=database) as process:
            assert process.stdout
            process.stdout.readline()
            limits = resource.prlimit(process.pid, resource.RLIMIT_NOFILE)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert limits == (hard, hard)


@pytest.mark.parametrize(("drain_s", "is_whole"), [(20, True), (1, False)])
async def test_an_answer_under_way_has_the_drains_time(
    tmp_path: Path, drain_s: float, is_whole: bool
) -> None:
    rest = asyncio.Event()

    async def slowly(request: Request) -> Response:
        async def body() -> AsyncIterator[bytes]:
            yield b"half "
            await rest.wait()
            yield b"whole"

        return StreamingResponse(body(), media_type="text/plain")

    given = {
        "database_url": f"sqlite:///{tmp_path}/b.sqlite3",
        "allow_private_nodes": True,
        "drain_timeout": drain_s,
    }
    url = f"http://127.0.0.1:{(port := unused_port())}"
    async with (
        serving(StandIn(slowly)) as node,
        httpx.AsyncClient(base_url=url, timeout=30, trust_env=False) as http,
    ):
        with program(backend_port=port, **given) as process:
            assert process.stdout
            await asyncio.to_thread(process.stdout.readline)
            await Network(url, http, Clock()).register(node, "legal")
            asked = {"message": "hi", "lora_name": "legal"}
            said = b""
            with contextlib.suppress(httpx.RemoteProtocolError):
                async with http.stream("POST", "/chat", json=asked) as answer:
                    async for piece in answer.aiter_raw():
                        said += piece
                        if said == b"half ":
                            process.terminate()
                            await asyncio.sleep(3)
                            rest.set()
            assert said == (b"half whole" if is_whole else b"half ")
            await asyncio.to_thread(process.wait, STOPS_S)


def test_a_port_in_use_is_a_sentence(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        settings = load({"backend_port": port, "database_url": f"sqlite:///{tmp_path}/b.sqlite3"})
        with pytest.raises(PortTaken, match=f"port {port} is in use") as caught:
            run(settings)
    assert "--port" in caught.value.hint


def test_an_address_that_is_not_this_machines_is_a_sentence() -> None:
    with pytest.raises(ConfigError, match=r"can't listen on 192\.0\.2\.1:8000"):
        listen("192.0.2.1", 8000)
    with pytest.raises(ConfigError, match="can't listen on 'no such host'"):
        listen("no such host", 8000)


@pytest.mark.parametrize("where", ["{}/missing/b.sqlite3", "/proc/b.sqlite3", "{}"])
def test_a_database_that_can_not_be_opened_is_a_sentence(
    tmp_path: Path, where: str, capfd: pytest.CaptureFixture[str]
) -> None:
    url = f"sqlite:///{where.format(tmp_path)}"
    with pytest.raises(ConfigError, match="can't open the database") as caught:
        run(load({"backend_port": unused_port(), "database_url": url}))
    assert "--database-url" in caught.value.hint
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("given", "used"),
    [
        ("sqlite:////var/b.sqlite3", "sqlite+aiosqlite:////var/b.sqlite3"),
        ("sqlite+aiosqlite:///b.sqlite3", "sqlite+aiosqlite:///b.sqlite3"),
        ("postgresql://u@h/d", "postgresql+asyncpg://u@h/d"),
        ("postgres://u:p@h:5/d?ssl=require", "postgresql+asyncpg://u:p@h:5/d?ssl=require"),
    ],
)
def test_plain_database_urls_get_their_async_driver(given: str, used: str) -> None:
    assert database_url(given).render_as_string(hide_password=False) == used


@pytest.mark.parametrize("given", ["nonsense", "mysql://u@h/d", "sqlite+pysqlite:///x", "://"])
def test_another_database_is_refused(given: str) -> None:
    with pytest.raises(ConfigError, match="database_url"):
        database_url(given)


def test_the_default_database_is_in_the_users_data_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    assert database_url(None).database == f"{tmp_path}/data/r3mes-vllm/backend.sqlite3"
    assert (tmp_path / "data" / "r3mes-vllm").is_dir()


async def test_a_password_is_shown_nowhere() -> None:
    url = f"postgresql://user:secret@127.0.0.1:{unused_port()}/r3mes"
    with pytest.raises(DatabaseUnreachable) as caught:
        async with Registry.open(url):
            pass
    assert "secret" not in caught.value.message + caught.value.hint


def test_an_open_backend_beyond_loopback_is_warned_of() -> None:
    said = " ".join(warnings(load({"backend_host": "0.0.0.0"})))
    assert re.search("R3MES_API_KEYS.*R3MES_ADMIN_KEY", said)
    assert warnings(load()) == []
    assert warnings(load({"backend_host": "0.0.0.0", "api_keys": ["k"], "admin_key": "a"})) == []
    assert warnings(load({"backend_host": "0.0.0.0", "insecure": True})) == []


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:"])
async def test_a_database_in_memory_is_enough(url: str) -> None:
    async with Registry.open(url) as registry:
        assert await registry.loras() == []
