"""The node's certificate and the backend's, without an engine; with one in test_https.py."""

import asyncio
import os
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import uvicorn
from starlette.responses import JSONResponse

from r3mes_vllm.errors import BackendUnreachable, ConfigError
from r3mes_vllm.node import startup, tls
from r3mes_vllm.node.backend_client import BackendClient
from r3mes_vllm.settings import Settings, load
from tests.certificates import Authority, served_serial
from tests.programs import free_port, wait_until_async


class Files:
    """Of one certificate, as certbot keeps them: links that lead to others after a renewal."""

    def __init__(self, folder: Path) -> None:
        self.authority = Authority(folder)
        self.folder = folder
        self.certificate, self.key = folder / "certificate.pem", folder / "key.pem"
        self._number = 0

    @property
    def settings(self) -> Settings:
        return load({"ssl_certfile": self.certificate, "ssl_keyfile": self.key})

    def renew(self, *, key: bool = True) -> int:
        """The new certificate's serial number."""
        self._number += 1
        issued = self.authority.issue()
        self._lead(self.certificate, issued.certificate)
        if key:
            self._lead(self.key, issued.key)
        self.other_key = issued.key
        return issued.serial

    def renew_key(self) -> None:
        """To the last certificate."""
        self._lead(self.key, self.other_key)

    def _lead(self, link: Path, content: bytes) -> None:
        target = self.folder / f"{link.stem}-{self._number}.pem"
        target.write_bytes(content)
        aside = self.folder / "aside"
        aside.symlink_to(target)
        os.replace(aside, link)


@pytest.fixture
def files(tmp_path: Path) -> Files:
    made = Files(tmp_path)
    made.renew()
    return made


@asynccontextmanager
async def serving(serves: ssl.SSLContext) -> AsyncIterator[int]:
    async def nothing(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    server = await asyncio.start_server(nothing, "127.0.0.1", (port := free_port()), ssl=serves)
    async with server:
        yield port


async def shown(port: int, files: Files) -> int:
    return await asyncio.to_thread(served_serial, port, files.authority.trusting)


async def shown_soon(port: int, files: Files, serial: int) -> None:
    async with asyncio.timeout(10):
        while await shown(port, files) != serial:
            await asyncio.sleep(0.05)


def usable(files: Files) -> ssl.SSLContext:
    made = tls.context(files.settings)
    assert made
    return made


async def test_a_renewed_certificate_is_used_and_half_of_one_is_not(
    files: Files, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tls, "_LOOK_S", 0.05)
    serves = usable(files)
    async with serving(serves) as port, asyncio.TaskGroup() as tasks:
        following = tasks.create_task(tls.follow(serves, files.settings))
        first = files.renew()
        await shown_soon(port, files, first)
        second = files.renew(key=False)
        said = ""
        while "stays in use" not in said:
            await asyncio.sleep(0.05)
            said += capfd.readouterr().err
        assert await shown(port, files) == first
        files.renew_key()
        await shown_soon(port, files, second)
        files.key.unlink()
        await asyncio.sleep(0.2)
        assert await shown(port, files) == second
        following.cancel()


async def test_half_of_a_renewal_would_end_all_serving(files: Files) -> None:
    serves = usable(files)
    async with serving(serves) as port:
        files.renew(key=False)
        with pytest.raises(ssl.SSLError):
            serves.load_cert_chain(files.certificate, files.key)
        with pytest.raises(OSError, match=r".+"):
            await shown(port, files)


async def test_vllms_own_way_does_not_see_a_renewal_through_a_link(files: Files) -> None:
    from vllm.entrypoints.launchers.utils.ssl import SSLCertRefresher

    serves = usable(files)
    before = await asyncio.to_thread(files.renew)
    serves = usable(files)
    async with serving(serves) as port:
        refresher = SSLCertRefresher(serves, str(files.key), str(files.certificate))
        await asyncio.sleep(0.5)
        files.renew()
        await asyncio.sleep(2.5)
        assert await shown(port, files) == before
        refresher.stop()


def test_what_can_not_be_used_is_said_before_the_engine_starts(
    files: Files, tmp_path: Path
) -> None:
    (tmp_path / "garbage").write_text("garbage")
    other, secret = files.authority.issue(), files.authority.issue(password=b"secret")
    other.write(tmp_path / "other.pem", tmp_path / "other-key.pem")
    secret.write(tmp_path / "secret.pem", tmp_path / "secret-key.pem")
    (tmp_path / "whole.pem").write_bytes(other.certificate + other.key)
    refused = [
        ("absent", "other-key.pem", "can't read"),
        ("other.pem", "absent", "can't read"),
        ("other.pem", "key.pem", "is not that of the certificate"),
        ("other.pem", "garbage", "no certificate with its key"),
        ("other.pem", None, "no certificate with its key"),
        ("garbage", "other-key.pem", "no certificate with its key"),
        ("secret.pem", "secret-key.pem", "no certificate with its key"),
        (None, "other-key.pem", "without --ssl-certfile"),
    ]
    for certificate, key, said in refused:
        given = {
            "ssl_certfile": tmp_path / certificate if certificate else None,
            "ssl_keyfile": tmp_path / key if key else None,
        }
        with pytest.raises(ConfigError, match=said) as caught:
            tls.context(load(given))
        assert caught.value.hint
    assert tls.context(load()) is None
    assert tls.context(load({"ssl_certfile": tmp_path / "whole.pem"}))


def test_the_command_says_it_in_a_line(files: Files, tmp_path: Path) -> None:
    started = subprocess.run(
        [
            *(sys.executable, "-m", "r3mes_vllm", "serve", "--host", "127.0.0.1"),
            *("--port", str(free_port()), "--ssl-certfile", str(files.certificate)),
            *("--ssl-keyfile", str(tmp_path / "absent")),
        ],
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
        timeout=60,
    )
    assert started.returncode == 2
    assert started.stderr.startswith(f"error: can't read {tmp_path / 'absent'}: No such file")
    assert "try: --ssl-certfile and --ssl-keyfile" in started.stderr


@pytest.mark.parametrize(
    "form", ["--ssl-certfile {} --ssl-keyfile={}", "--ssl_certfile={} --ssl_keyfile {}"]
)
def test_vllms_options_count_as_our_own(form: str) -> None:
    words = form.format("/c.pem", "/k.pem").split()
    passed_on = ["--max-model-len", "4096", *words, "--enable-ssl-refresh", "-tp", "2"]
    settings, rest = tls.taken_over(load({"ssl_certfile": "/other"}), passed_on)
    assert (settings.ssl_certfile, settings.ssl_keyfile) == (Path("/c.pem"), Path("/k.pem"))
    assert rest == ["--max-model-len", "4096", "-tp", "2"]
    assert tls.options(settings) == ["--ssl-certfile", "/c.pem", "--ssl-keyfile", "/k.pem"]
    assert settings.public_url == "https://localhost:8081"


@pytest.mark.parametrize("form", ["--host {} --port {}", "--host={} --port={}"])
def test_so_does_its_address(form: str) -> None:
    settings, rest = tls.taken_over(load(), [*form.format("::", 9000).split(), "--seed", "1"])
    assert (settings.serving_node_host, settings.serving_node_port) == ("::", 9000)
    assert rest == ["--seed", "1"]
    with pytest.raises(ConfigError, match="port"):
        tls.taken_over(load(), ["--port", "70000"])


def test_an_open_door_is_seen_behind_the_dashes_too(tmp_path: Path) -> None:
    closed = load({"serving_node_host": "127.0.0.1", "state_dir": tmp_path})
    with pytest.raises(ConfigError, match="without an API key"):
        startup.serve(closed, ["--host", "0.0.0.0"])


def test_without_a_certificate_all_stays_as_it_is() -> None:
    settings, rest = tls.taken_over(load(), ["--seed", "1"])
    assert (tls.options(settings), rest) == ([], ["--seed", "1"])
    assert settings.public_url == "http://localhost:8081"
    with pytest.raises(ConfigError, match="ssl-certfile"):
        tls.taken_over(load(), ["--ssl-certfile"])


@asynccontextmanager
async def backend(files: Files) -> AsyncIterator[int]:
    config = uvicorn.Config(
        JSONResponse([]),
        port=(port := free_port()),
        log_level="error",
        lifespan="off",
        ssl_certfile=files.certificate,
        ssl_keyfile=files.key,
    )
    server = uvicorn.Server(config)
    task = asyncio.create_task(server.serve())
    await wait_until_async(lambda: server.started, 10, "the backend")
    yield port
    server.should_exit = True
    await task


async def test_a_backend_is_known_by_the_authority_that_was_named(
    files: Files, tmp_path: Path
) -> None:
    stranger = Authority(tmp_path / "stranger")
    async with backend(files) as port:
        url = f"https://localhost:{port}"
        async with BackendClient(url, ca=files.authority.file) as client:
            assert await client.loras() == []
        for ca in (None, stranger.file):
            async with BackendClient(url, ca=ca) as client:
                with pytest.raises(BackendUnreachable, match="certificate"):
                    await client.loras()


@pytest.mark.parametrize("content", [None, "", "garbage"])
def test_a_file_without_certificates_is_named(tmp_path: Path, content: str | None) -> None:
    file = tmp_path / "ca.pem"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ConfigError, match=str(file)):
        BackendClient("https://localhost", ca=file)


@pytest.mark.parametrize(
    ("url", "fine"),
    [
        ("http://localhost:8000", True),
        ("http://127.0.0.1", True),
        ("http://127.9.8.7:1", True),
        ("http://[::1]:8000", True),
        ("https://network.example", True),
        ("http://network.example:8000", False),
        ("http://192.168.1.2", False),
        ("http://localhost.example", False),
        ("http://127.0.0.1.example", False),
        ("http://localhost@network.example", False),
        ("http://[::1", False),
    ],
)
def test_plain_http_stays_on_this_machine(url: str, fine: bool) -> None:
    settings = load({"backend_url": url})
    if fine:
        BackendClient.of(settings)
        return
    with pytest.raises(ConfigError, match="backend"):
        BackendClient.of(settings)


def test_plain_http_elsewhere_is_had_for_the_asking(tmp_path: Path) -> None:
    given = {"backend_url": "http://network.example:8000"}
    with pytest.raises(ConfigError) as caught:
        BackendClient.of(load(given))
    assert caught.value.hint.startswith("--backend-url https://network.example:8000, ")
    assert "--insecure" in caught.value.hint
    BackendClient.of(load({**given, "insecure": True}))
