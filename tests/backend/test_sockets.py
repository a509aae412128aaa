"""The backend's own way of httpx to the network: what it must do as httpx's does."""

import asyncio
import contextlib
import errno
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from r3mes_vllm.backend.dial import Timeouts, http_client
from r3mes_vllm.backend.refusals import NoSocket
from r3mes_vllm.backend.sockets import Transport
from tests.backend.stand_ins import StandIn, serving, unused_port
from tests.certificates import Authority


@pytest.fixture
async def http() -> AsyncIterator[httpx.AsyncClient]:
    async with http_client(Timeouts(connect=0.5, between_bytes=0.5)) as client:
        yield client


async def test_an_idle_connection_is_used_again(http: httpx.AsyncClient) -> None:
    ports = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        ports.add(writer.get_extra_info("peername")[1])
        while await reader.readuntil(b"\r\n\r\n"):
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        for _ in range(3):
            assert (await http.get(f"http://127.0.0.1:{port}")).text == "ok"
        assert len(ports) == 1
        await http.aclose()


async def test_a_connection_that_the_server_closed_is_not(http: httpx.AsyncClient) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        for _ in range(3):
            assert (await http.get(f"http://127.0.0.1:{port}")).text == "ok"
            await asyncio.sleep(0.05)


async def test_what_a_server_says_unasked_is_no_answer(http: httpx.AsyncClient) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        await asyncio.sleep(0.02)
        writer.write(b"HTTP/1.1 408 Request Timeout\r\nContent-Length: 4\r\n\r\nlate")
        with contextlib.suppress(asyncio.IncompleteReadError):
            await reader.readuntil(b"\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        for _ in range(3):
            assert (await http.get(f"http://127.0.0.1:{port}")).text == "ok"
            await asyncio.sleep(0.1)


async def test_nobody_listens(http: httpx.AsyncClient) -> None:
    with pytest.raises(httpx.ConnectError):
        await http.get(f"http://127.0.0.1:{unused_port()}")


@pytest.mark.parametrize(
    ("lack", "address", "is_ours"),
    [
        *((it, "127.0.0.1", True) for it in ("EMFILE", "ENFILE", "ENOBUFS", "ENOMEM")),
        *(("EADDRNOTAVAIL", it, it == "127.0.0.1") for it in ("127.0.0.1", "[::1]")),
        *((it, "127.0.0.1", False) for it in ("ECONNREFUSED", "ENETUNREACH")),
    ],
)
async def test_what_this_machine_lacks_is_told_from_what_fails_there(
    http: httpx.AsyncClient,
    monkeypatch: pytest.MonkeyPatch,
    lack: str,
    address: str,
    is_ours: bool,
) -> None:
    async def open_connection(*_: object) -> None:
        raise OSError(getattr(errno, lack), lack)

    monkeypatch.setattr(asyncio, "open_connection", open_connection)
    with pytest.raises(NoSocket if is_ours else httpx.ConnectError):
        await http.get(f"http://{address}:8080")


async def test_a_server_that_reads_nothing(http: httpx.AsyncClient) -> None:
    given_up = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        await given_up.wait()
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(httpx.WriteTimeout):
            await http.post(f"http://127.0.0.1:{port}", content=bytes(64 << 20))
        given_up.set()


@pytest.fixture
async def https(tmp_path: Path) -> AsyncIterator[tuple[int, Authority]]:
    """A server with a certificate for localhost and 127.0.0.1: its port, and who signed it."""
    authority = Authority(tmp_path)
    authority.issue().write(tmp_path / "cert.pem", tmp_path / "key.pem")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError):
            while await reader.readuntil(b"\r\n\r\n"):
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context) as server:
        yield server.sockets[0].getsockname()[1], authority


@pytest.mark.parametrize(("name", "fits"), [("localhost", True), ("node.example", False)])
async def test_tls(https: tuple[int, Authority], name: str, fits: bool) -> None:
    """The address is dialled, and the certificate must be of the name."""
    port, authority = https
    transport = Transport(keepalive_s=5, context=authority.trusting)
    async with httpx.AsyncClient(transport=transport) as client:
        asked = client.get(f"https://127.0.0.1:{port}", extensions={"sni_hostname": name})
        if fits:
            assert (await asked).text == "ok"
        else:
            with pytest.raises(httpx.ConnectError, match=r"node\.example"):
                await asked


async def test_a_connection_of_one_name_is_not_used_for_another(
    https: tuple[int, Authority],
) -> None:
    """Two nodes' names may lead to one address; only one of them has this certificate."""
    port, authority = https
    transport = Transport(keepalive_s=5, context=authority.trusting)
    async with httpx.AsyncClient(transport=transport) as client:
        url = f"https://127.0.0.1:{port}"
        assert (await client.get(url, extensions={"sni_hostname": "localhost"})).text == "ok"
        with pytest.raises(httpx.ConnectError, match=r"node\.example"):
            await client.get(url, extensions={"sni_hostname": "node.example"})


async def test_a_certificate_that_nobody_knows_signed(
    https: tuple[int, Authority], http: httpx.AsyncClient
) -> None:
    with pytest.raises(httpx.ConnectError):
        await http.get(f"https://127.0.0.1:{https[0]}")


async def test_a_server_without_tls(http: httpx.AsyncClient) -> None:
    async with serving(StandIn()) as url:
        with pytest.raises(httpx.ConnectError):
            await http.get(url.replace("http:", "https:"))


async def test_a_connection_is_used_again_until_its_time_is_over() -> None:
    opened, closed = [], asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        opened.append(writer)
        while await reader.readuntil(b"\r\n\r\n") if not reader.at_eof() else b"":
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
            if await _ends(reader):
                closed.set()
                break
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        transport = Transport(keepalive_s=0.3)
        async with httpx.AsyncClient(transport=transport) as client:
            for _ in range(5):
                assert (await client.get(url)).text == "ok"
            assert len(opened) == 1
            await asyncio.wait_for(closed.wait(), 5)
            assert not transport._pool._idle  # type: ignore[attr-defined]
            assert (await client.get(url)).text == "ok"
            assert len(opened) == 2


async def _ends(reader: asyncio.StreamReader) -> bool:
    """Whether the client closes before it asks again."""
    while not reader._buffer and not reader.at_eof():  # type: ignore[attr-defined]
        await asyncio.sleep(0.005)
    return reader.at_eof()


async def test_as_many_as_are_needed_and_all_are_used_again() -> None:
    opened = 0
    all_here = asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal opened
        opened += 1
        if opened == 20:
            all_here.set()
        try:
            while True:
                await reader.readuntil(b"\r\n\r\n")
                await all_here.wait()
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
        except asyncio.IncompleteReadError:
            writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(transport=Transport(keepalive_s=5), limits=limits) as client:
            for _ in range(3):
                await asyncio.gather(*(client.get(url) for _ in range(20)))
    assert opened == 20
