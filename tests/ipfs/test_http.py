"""HTTP as servers that nobody trusts speak it, over bare sockets."""

import asyncio
import base64
import datetime
import socket
import ssl
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from r3mes_vllm.errors import SourceFailed
from r3mes_vllm.ipfs import connection, http
from r3mes_vllm.ipfs.cid import CID, RAW
from r3mes_vllm.ipfs.http import exchange
from r3mes_vllm.ipfs.own_loop import in_own_loop
from r3mes_vllm.ipfs.sources import GatewaySource, KuboSource
from r3mes_vllm.ipfs.tree import Limits

SHORT = Limits(stall_s=0.5)
DATA = b"0123456789" * 1000
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 10000\r\n\r\n" + DATA


class Peer:
    """Answers each request on a connection with what `answer` gives for its head."""

    def __init__(self, answer: Callable[[bytes], bytes | None]) -> None:
        self.answer = answer
        self.heads: list[bytes] = []
        self.connections = 0
        self.pause_s = 0.0
        """Between the bytes."""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                self.heads.append(head)
                answer = self.answer(head)
                for part in [answer] if not self.pause_s else [*map(bytes, zip(answer or b""))]:
                    if part is None:
                        return
                    writer.write(part)
                    await writer.drain()
                    await asyncio.sleep(self.pause_s)
                if b"connection: close" in (answer or b"").lower() or b"HTTP/1.0" in (
                    answer or b""
                ):
                    return
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


@asynccontextmanager
async def listening(peer: Peer, tls: ssl.SSLContext | None = None) -> AsyncIterator[str]:
    server = await asyncio.start_server(peer.serve, "127.0.0.1", 0, ssl=tls)
    try:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()


async def got(url: str, limits: Limits = SHORT, times: int = 1) -> list[bytes]:
    """The bodies, asked for as blocks are."""

    async def run() -> list[bytes]:
        async with exchange(limits) as connections:
            source = GatewaySource(url)
            return [await source.block(CID.of(RAW, DATA), connections) for _ in range(times)]

    return await in_own_loop(run, name="test")


async def test_a_connection_is_used_again_and_a_closed_one_replaced() -> None:
    peer = Peer(lambda head: OK)
    async with listening(peer) as where:
        assert await got(f"http://{where}", times=3) == [DATA] * 3
        assert peer.connections == 1
        peer.answer = lambda head: OK.replace(b"OK", b"OK\r\nConnection: close", 1)
        assert await got(f"http://{where}", times=3) == [DATA] * 3
    assert peer.connections == 4


async def test_one_that_closes_without_saying_so_is_asked_over_a_new_connection() -> None:
    counts: list[int] = []

    def answer(head: bytes) -> bytes | None:
        counts.append(peer.connections)
        return OK if counts.count(peer.connections) == 1 else None

    peer = Peer(answer)
    async with listening(peer) as where:
        assert await got(f"http://{where}", times=3) == [DATA] * 3
    assert peer.connections == 3


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"".join(
    b"%x\r\n%s\r\n" % (len(part), part) for part in (DATA[:1], DATA[1:300], DATA[300:])
)


@pytest.mark.parametrize(
    "answer",
    [
        CHUNKED + b"0\r\n\r\n",
        CHUNKED + b"0\r\nTrailer: x\r\n\r\n",
        b"HTTP/1.0 200 OK\r\n\r\n" + DATA,
        b"HTTP/1.1 100 Continue\r\n\r\n" + OK,
        b"HTTP/1.1 102 Processing\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n" + OK,
        OK.replace(b"OK", b"OK\r\nContent-Encoding: Identity ", 1),
        OK.replace(b"OK", b"OK\r\nContent-Encoding: ", 1),
    ],
    ids=["chunked", "trailer", "1.0", "continue", "early hints", "not encoded", "no encoding"],
)
async def test_each_way_to_send_a_body(answer: bytes) -> None:
    async with listening(Peer(lambda head: answer)) as where:
        assert await got(f"http://{where}") == [DATA]


@pytest.mark.parametrize(
    "answer",
    [
        OK[:-1] + b"",
        CHUNKED,
        CHUNKED[:-5],
        CHUNKED + b"nonsense\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 9999999\r\n\r\n" + b"x" * (3 << 20),
        b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 1000,
        b"HTTP/1.1 200 OK\r\nX: " + b"y" * (1 << 17),
        b"nonsense\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 1\r\n\r\nx",
        b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 302 Found\r\nLocation: //[\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 302 Found\r\nLocation: file:///etc/passwd\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 302 Found\r\nLocation: /%zz \x00\xff\r\nContent-Length: 0\r\n\r\n",
    ],
)
async def test_what_is_not_a_body_is_a_failure_of_the_source(answer: bytes) -> None:
    def closing(head: bytes) -> bytes | None:
        return answer.replace(b"\r\n", b"\r\nConnection: close\r\n", 1)

    async with listening(Peer(closing)) as where:
        with pytest.raises(SourceFailed, match=where):
            await got(f"http://{where}")


@pytest.mark.parametrize(
    "answer", [OK, CHUNKED, b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 90 + b"\r\n"]
)
async def test_a_trickle_is_a_failure_wherever_it_begins(answer: bytes) -> None:
    peer = Peer(lambda head: answer)
    peer.pause_s = 0.01
    async with listening(peer) as where:
        began = time.monotonic()
        with pytest.raises(SourceFailed, match=r"only \d+ bytes came"):
            await got(f"http://{where}")
        assert 0.4 < time.monotonic() - began < 3


async def test_without_the_watch_a_trickle_would_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "_SLOWEST", 0)
    peer = Peer(lambda head: OK)
    peer.pause_s = 0.01
    async with listening(peer) as where:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(got(f"http://{where}"), 2)


async def test_informational_answers_have_an_end() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while True:
                writer.write(b"HTTP/1.1 100 Continue\r\n\r\n" * 100)
                await writer.drain()

    peer = Peer(lambda head: None)
    peer.serve = serve  # type: ignore[method-assign]
    async with listening(peer) as where:
        with pytest.raises(SourceFailed, match="more than 10 informational answers"):
            await asyncio.wait_for(got(f"http://{where}"), 5)


async def test_what_a_server_says_stands_in_errors_short_and_printable() -> None:
    answer = b"SSH-2.0-OpenSSH" + b"\x1b[31m\xff" * 3000 + b"\r\n"
    async with listening(Peer(lambda head: answer)) as where:
        with pytest.raises(SourceFailed, match="OpenSSH") as caught:
            await got(f"http://{where}")
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 300
    with pytest.raises(SourceFailed, match="sends elsewhere") as caught:
        http._followed("it", "http://gw/", f"http://{'x' * 3000}/")
    assert len(str(caught.value)) < 300


async def test_a_redirect_leads_to_a_host_below_on_the_same_port() -> None:
    for asked, location, followed in (
        ("http://gw:8080/ipfs/x", "http://x.ipfs.gw:8080/", "http://x.ipfs.gw:8080/"),
        ("http://gw/ipfs/x", "https://x.gw/", "https://x.gw/"),
        ("https://u:p@gw/ipfs/x", "/ipfs/y?a=b", "https://u:p@gw/ipfs/y?a=b"),
        ("http://u:p@gw/ipfs/x", "http://x.ipfs.gw/", "http://u:p@x.ipfs.gw/"),
        ("http://u:p@gw/ipfs/x", "https://other@gw/", "https://u:p@gw/"),
        ("http://gw/ipfs/x", "http://other@gw/", "http://gw/"),
    ):
        assert http._followed("it", asked, location) == followed
    for asked, location in (
        ("http://gw:8080/x", "http://gw:8081/"),
        ("http://gw/x", "http://evilgw/"),
        ("http://gw/x", "http://gw@evil/"),
        ("http://gw/x", "http://evil\\@gw.evil/"),
        ("https://gw/x", "http://x.gw:443/"),
        ("https://gw/x", "http://x.gw/"),
        ("http://u:p@gw/x", "http://gw.evil/"),
    ):
        with pytest.raises(SourceFailed, match="sends elsewhere"):
            http._followed("it", asked, location)


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
async def test_kubos_own_gateway_on_localhost_sends_to_a_host_that_no_resolver_knows(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(*asked: object, **named: object) -> list[object]:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)

    def answer(head: bytes) -> bytes:
        host = head.lower().partition(b"\r\nhost: ")[2].partition(b"\r\n")[0]
        if b".ipfs." in host:
            return OK
        there = b"http://cid.ipfs.%s/?format=raw" % host
        return b"HTTP/1.1 301 Moved\r\nLocation: %s\r\nContent-Length: 0\r\n\r\n" % there

    server = await asyncio.start_server(Peer(answer).serve, address, 0)
    try:
        port = server.sockets[0].getsockname()[1]
        assert await got(f"http://localhost:{port}") == [DATA]
    finally:
        server.close()


async def test_what_is_sent() -> None:
    peer = Peer(lambda head: OK)
    async with listening(peer) as where:
        source = f"http://us%20er:p%3Aw@{where}/"
        assert GatewaySource(source).name == f"http://{where}/"
        await got(source)
    head = peer.heads[0].decode().lower()
    assert f"host: {where}\r\n" in head
    assert "accept-encoding: identity\r\n" in head
    assert "accept: application/vnd.ipld.raw\r\n" in head
    assert "origin" not in head
    assert "cookie" not in head
    assert base64.b64encode(b"us er:p:w").decode().lower() in head


@pytest.mark.parametrize("end", ["/ipfs", "/ipfs/", "/ipfs/?", "/", ""])
async def test_a_gateways_url_may_be_as_people_copy_it(end: str) -> None:
    peer = Peer(lambda head: OK)
    async with listening(peer) as where:
        assert await got(f"http://{where}{end}") == [DATA]
    assert peer.heads[0].startswith(b"GET /ipfs/bafk")


async def test_the_query_of_a_gateways_url_is_asked_for_with_each_block_and_shown_nowhere() -> None:
    peer = Peer(lambda head: OK)
    async with listening(peer) as where:
        url = f"http://{where}/pre/ipfs/?token=hunter2#here"
        assert await got(url) == [DATA]
        assert GatewaySource(url).name == f"http://{where}/pre/ipfs/"
        peer.answer = lambda head: b"HTTP/1.1 500 no\r\nContent-Length: 0\r\n\r\n"
        for failing in (url, "no url?token=hunter2"):
            with pytest.raises(SourceFailed) as caught:
                await got(failing)
            assert "hunter2" not in str(caught.value)
    assert b"?format=raw&token=hunter2 HTTP/1.1" in peer.heads[0]
    assert peer.heads[0].startswith(b"GET /pre/ipfs/bafk")


async def test_a_file_is_uploaded_as_a_form(tmp_path: Path) -> None:
    (tmp_path / "x.car").write_bytes(DATA * 300)
    bodies: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r")[0])
        bodies.append(head + await reader.readexactly(length))
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
        await writer.drain()
        writer.close()

    peer = Peer(lambda head: None)
    peer.serve = serve  # type: ignore[method-assign]
    async with listening(peer) as where, exchange(Limits()) as connections:
        await KuboSource(f"http://{where}").import_car(tmp_path / "x.car", connections)
    assert b"dag/import" in bodies[0]
    assert b'name="file"' in bodies[0]
    assert DATA * 300 in bodies[0]


async def cancelled(work: Callable[[], Awaitable[object]]) -> float:
    """Seconds until a cancelled one has ended."""
    task = asyncio.ensure_future(work())
    await asyncio.sleep(0.3)
    assert not task.done()
    began = time.monotonic()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    return time.monotonic() - began


@pytest.mark.parametrize("answer", [b"", OK[:20], OK[:-1], CHUNKED])
async def test_cancelling_ends_at_once_and_leaves_no_thread(answer: bytes) -> None:
    peer = Peer(lambda head: answer)
    async with listening(peer) as where:
        assert await cancelled(lambda: got(f"http://{where}", Limits())) < 2
    assert not [it for it in threading.enumerate() if it.name.startswith("r3mes-http")]


async def test_cancelling_while_it_connects_ends_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full:
        held = [socket.socket() for _ in range(4)]
        for sock in held:
            sock.setblocking(False)
            sock.connect_ex(full.getsockname())
        where = f"http://127.0.0.1:{full.getsockname()[1]}"
        assert await cancelled(lambda: got(where, Limits())) < 2
        with pytest.raises(SourceFailed):
            await got(where, SHORT)
        for sock in held:
            sock.close()


def certificate(folder: Path) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """Of localhost, for the server; and what trusts it."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    path = folder / "certificate.pem"
    path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        + made.public_bytes(serialization.Encoding.PEM)
    )
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(path)
    return server, ssl.create_default_context(cafile=path)


async def test_https_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server, trusting = certificate(tmp_path)
    peer = Peer(lambda head: OK)
    async with listening(peer, server) as where:
        port = where.rpartition(":")[2]
        with pytest.raises(SourceFailed, match="certificate verify failed"):
            await got(f"https://localhost:{port}")
        monkeypatch.setattr(connection, "_system_tls", lambda: trusting)
        with pytest.raises(SourceFailed, match="certificate verify failed"):
            await got(f"https://{where}")  # not its name
        assert await got(f"https://localhost:{port}", times=3) == [DATA] * 3
        peer.answer = lambda head: OK[:-1]
        assert await cancelled(lambda: got(f"https://localhost:{port}", Limits())) < 2
