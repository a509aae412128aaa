"""Where a node may say it lives."""

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import aclosing, nullcontext
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from r3mes_vllm.backend import addresses, endpoints
from r3mes_vllm.backend.addresses import Addresses
from r3mes_vllm.backend.endpoints import check_endpoint, is_public
from r3mes_vllm.backend.refusals import BadInput, Unresolved
from tests.backend.conftest import StartBackend, StartNode
from tests.backend.stand_ins import StandIn, untouched, wallet

PUBLIC = "93.184.216.34"


def resolving(*addresses: str) -> endpoints.Resolve:
    async def resolve(host: str, port: int) -> list[str]:
        return list(addresses)

    return resolve


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:8080",
        "http://127.1",
        "http://2130706433/",
        "http://0x7f.0.0.1",
        "http://localhost:8080",
        "http://localhost.",
        "http://0.0.0.0",
        "http://10.1.2.3",
        "http://172.16.0.1",
        "http://192.168.1.1:443",
        "http://169.254.169.254/latest/meta-data",
        "http://100.64.0.1",
        "http://224.0.0.1",
        "http://255.255.255.255",
        "http://[::1]:8080",
        "http://[::]",
        "http://[::ffff:127.0.0.1]",
        "http://[::ffff:7f00:1]",
        "http://[fe80::1]",
        "http://[fd00::1]",
        "http://[fec0::1]",
        "http://[64:ff9b::7f00:1]",
        "http://[64:ff9b:1::5db8:d822]",
        "http://[::ffff:0:10.0.0.1]",
        "http://[::10.0.0.1]",
        "http://[4000::1]",
        "http://[2002:7f00:1::]",
    ],
)
async def test_a_private_address_is_refused_unless_allowed(url: str) -> None:
    with pytest.raises(BadInput) as caught:
        await check_endpoint(url, allow_private=False)
    assert caught.value.field == "endpoint_url"
    # Some spellings are no host at all for this machine's resolver, which refuses them as well.
    assert "--allow-private-nodes" in caught.value.hint or "resolve" in caught.value.message
    # The twin: with the protection off each of them is taken.
    assert await check_endpoint(url, allow_private=True)


@pytest.mark.parametrize(
    "address",
    [
        *(PUBLIC, f"::ffff:{PUBLIC}", "2606:4700::1111"),
        *("64:ff9b::5db8:d822", "2002:5db8:d822::1"),
    ],
)
def test_a_public_address_is_public(address: str) -> None:
    assert is_public(address)


async def test_one_private_address_among_many_is_enough_to_refuse() -> None:
    url = "https://node.example"
    assert await check_endpoint(url, allow_private=False, resolve=resolving(PUBLIC)) == url
    with pytest.raises(BadInput, match=r"10\.0\.0\.1, a private address"):
        await check_endpoint(url, allow_private=False, resolve=resolving(PUBLIC, "10.0.0.1"))


async def test_a_host_that_does_not_resolve_is_the_clients_mistake() -> None:
    async def resolve(host: str, port: int) -> list[str]:
        raise OSError("Name or service not known")

    for lookup in (resolve, resolving()):
        with pytest.raises(BadInput, match="does not resolve"):
            await check_endpoint("http://nowhere.example", allow_private=False, resolve=lookup)


@pytest.mark.parametrize(
    ("url", "stored"),
    [
        ("http://node.example/", "http://node.example"),
        ("https://node.example:8443/r3mes//", "https://node.example:8443/r3mes"),
        ("http://Node.Example:80", "http://node.example"),
    ],
)
async def test_the_stored_form_has_no_trailing_slash(url: str, stored: str) -> None:
    assert await check_endpoint(url, allow_private=True) == stored


@pytest.mark.parametrize("port", [22, 25, 6000, 6667])
async def test_a_port_of_another_protocol_is_refused(port: int) -> None:
    """A stranger could have mail servers called, and the like."""
    url = f"http://node.example:{port}"
    with pytest.raises(BadInput, match=f"port {port}") as caught:
        await check_endpoint(url, allow_private=False, resolve=resolving(PUBLIC))
    assert caught.value.field == "endpoint_url"
    assert await check_endpoint(url, allow_private=True) == url


@pytest.mark.parametrize("port", [3000, 5000, 8000, 8080, 8081, 8443])
async def test_the_ports_of_nodes_are_taken(port: int) -> None:
    url = f"http://node.example:{port}"
    assert await check_endpoint(url, allow_private=False, resolve=resolving(PUBLIC)) == url


async def test_the_name_that_is_resolved_is_the_one_in_the_url() -> None:
    """Python's own rule for names that are not ASCII (IDNA 2003) has ss for ß."""
    asked = []

    async def resolve(host: str, port: int) -> list[str]:
        asked.append(host)
        return [PUBLIC]

    stored = await check_endpoint("https://faß.example", allow_private=False, resolve=resolve)
    assert (stored, asked) == ("https://xn--fa-hia.example", ["xn--fa-hia.example"])


async def test_an_international_name_that_is_none_is_a_name_that_does_not_resolve(
    start_backend: StartBackend,
) -> None:
    network = await start_backend(allow_private_nodes=False)
    fields = {"wallet_address": wallet(1), "available_lora_list": []}
    for host in ("xn--a", "xn--a.invalid", "xn--\u00df"):
        answer = await network.http.post(
            "/api/serving-node/register", json=fields | {"endpoint_url": f"http://{host}"}
        )
        assert (answer.status_code, answer.json()["error"]["field"]) == (422, "endpoint_url")


@pytest.mark.parametrize(
    "url",
    [
        "",
        "node.example",
        "//node.example",
        "http://",
        "http:///chat",
        "ftp://node.example",
        "file:///etc/passwd",
        "unix:///run/docker.sock",
        "javascript:alert(1)",
        "http://user:secret@node.example",
        "http://user@node.example",
        "http://@node.example",
        "http://node.example?x=1",
        "http://node.example/?",
        "http://node.example#here",
        "http://node.example:0",
        "http://node.example:99999",
        "http://node.example:port",
        "http://node.example\r\nHost: x",
        "http://node example",
        "http://evil.example\\@127.0.0.1",
        "http://[::1",
        "http://\u0000",
        f"http://{'a' * 64}.example{'/x' * 2000}",
    ],
)
@pytest.mark.parametrize("allow_private", [True, False])
async def test_what_is_no_plain_http_url_is_refused(url: str, allow_private: bool) -> None:
    with pytest.raises(BadInput) as caught:
        await check_endpoint(url, allow_private=allow_private, resolve=resolving(PUBLIC))
    assert caught.value.field == "endpoint_url"
    assert "secret" not in caught.value.message


async def test_the_route_refuses_a_private_node_and_says_how_to_allow_it(
    start_backend: StartBackend,
) -> None:
    network = await start_backend(allow_private_nodes=False)
    answer = await network.http.post(
        "/api/serving-node/register",
        json={
            "wallet_address": wallet(1),
            "endpoint_url": "http://127.0.0.1:8080",
            "available_lora_list": ["legal"],
        },
    )
    assert answer.status_code == 422
    error = answer.json()["error"]
    assert error["field"] == "endpoint_url"
    assert "--allow-private-nodes" in error["hint"]
    assert await network.wallets() == []


@pytest.mark.parametrize("allowed", [False, True])
async def test_a_name_that_turns_private_after_its_registration_is_not_dialled(
    start_backend: StartBackend, start_node: StartNode, allowed: bool
) -> None:
    """DNS rebinding. With the protection off the node on loopback is reached."""
    addresses = [PUBLIC]

    async def resolve(host: str, port: int) -> list[str]:
        return addresses

    network = await start_backend(allow_private_nodes=allowed, resolve=resolve)
    with untouched() if not allowed else nullcontext() as port:
        at = port or (await start_node(StandIn())).rpartition(":")[2]
        await network.register(f"http://localhost:{at}", "legal")
        addresses[:] = ["127.0.0.1"]
        answer = await network.http.post("/chat", json={"message": "hi"})
    assert answer.status_code == (200 if allowed else 503)


async def test_the_dial_goes_to_the_address_that_was_checked_under_the_name(
    start_backend: StartBackend, start_node: StartNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoints, "is_public", lambda address: address == "127.0.0.1")
    network = await start_backend(allow_private_nodes=False, resolve=resolving("127.0.0.1"))
    node = StandIn()
    port = (await start_node(node)).rpartition(":")[2]
    await network.register(f"http://node.invalid:{port}/prefix", "legal")
    answer = await network.http.post("/chat", json={"message": "hi"})
    assert answer.text == "hello"
    assert node.seen[0].header("host") == [f"node.invalid:{port}"]
    assert node.seen[0].path == "/prefix/chat"


@pytest.fixture
def hanging(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The resolver hangs for names in `slow.example`, which are those that it was asked for."""
    asked, go_on, real = list[str](), threading.Event(), socket.getaddrinfo

    def getaddrinfo(host: str, *more: Any, **named: Any) -> Any:
        if host.endswith("slow.example"):
            asked.append(host)
            go_on.wait()
            raise GONE
        return real(host, *more, **named)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    yield asked
    go_on.set()


async def test_a_slow_resolver_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, hanging: list[str]
) -> None:
    monkeypatch.setattr(endpoints, "_RESOLVE_TIMEOUT_S", 0.2)
    with pytest.raises(Unresolved, match="does not resolve"):
        await check_endpoint("http://slow.example", allow_private=False)
    assert hanging


async def test_strangers_names_take_no_lookup_from_routing(
    start_backend: StartBackend,
    start_node: StartNode,
    monkeypatch: pytest.MonkeyPatch,
    hanging: list[str],
) -> None:
    monkeypatch.setattr(endpoints, "is_public", lambda address: address == "127.0.0.1")
    strangers = endpoints.Resolver(8)
    monkeypatch.setattr(endpoints, "resolve", strangers)
    network = await start_backend(allow_private_nodes=False)
    port = (await start_node(StandIn())).rpartition(":")[2]
    await network.register(f"http://127.0.0.1:{port}", "legal")
    registering = [
        asyncio.create_task(
            network.register(f"http://{number}.slow.example", "legal", number=number)
        )
        for number in range(2, 66)
    ]
    while len(hanging) < 8:
        await asyncio.sleep(0.01)
    answer = await network.http.post("/chat", json={"message": "hi"})
    assert answer.text == "hello"
    assert not any(it.done() for it in registering)
    assert len(hanging) == 8
    for it in registering:
        it.cancel()
    await asyncio.gather(*registering, return_exceptions=True)


@dataclass
class Names:
    """Leads to loopback, or fails as it is told."""

    failure: Exception | None = None
    asked: int = 0

    async def __call__(self, host: str, port: int) -> list[str]:
        self.asked += 1
        if self.failure:
            raise self.failure
        return ["127.0.0.1"]


AGAIN = socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
GONE = socket.gaierror(socket.EAI_NONAME, "Name or service not known")


@pytest.mark.parametrize("failure", [AGAIN, TimeoutError(), OSError(24, "no descriptor")])
async def test_a_resolver_that_fails_marks_no_node(
    start_backend: StartBackend,
    start_node: StartNode,
    monkeypatch: pytest.MonkeyPatch,
    failure: Exception,
) -> None:
    monkeypatch.setattr(endpoints, "is_public", lambda address: address == "127.0.0.1")
    monkeypatch.setattr(addresses, "_PAUSE_S", 0)
    names = Names()
    network = await start_backend(allow_private_nodes=False, resolve=names)
    port = (await start_node(StandIn())).rpartition(":")[2]
    await network.register(f"http://node.invalid:{port}", "legal")
    names.failure = failure
    assert (await network.http.post("/chat", json={"message": "hi"})).status_code == 503
    assert "r3mes_backend_dial_failures_total 0.0" in (await network.http.get("/metrics")).text
    names.failure = None
    assert (await network.http.post("/chat", json={"message": "hi"})).text == "hello"

    # The twin: a name that there is not.
    monkeypatch.setattr(addresses, "_FRESH_S", 0)
    await network.register(f"http://other.invalid:{port}", "legal")
    names.failure = GONE
    assert (await network.http.post("/chat", json={"message": "hi"})).status_code == 503
    assert "r3mes_backend_dial_failures_total 1.0" in (await network.http.get("/metrics")).text


class TestAddresses:
    URL = httpx.URL("http://node.invalid")

    @pytest.fixture(autouse=True)
    def _loopback(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(endpoints, "is_public", lambda address: address == "127.0.0.1")

    async def test_one_is_kept_for_some_seconds(self) -> None:
        now, names = [0.0], Names()
        async with aclosing(Addresses(names, lambda: now[0])) as found:
            for _ in range(3):
                assert await found.of(self.URL) == "127.0.0.1"
            assert names.asked == 1
            now[0] = addresses._FRESH_S
            await found.of(self.URL)
            assert names.asked == 2

    @pytest.mark.parametrize("failure", [AGAIN, TimeoutError()])
    async def test_the_last_one_serves_while_the_resolver_fails(self, failure: Exception) -> None:
        now, names = [0.0], Names()
        async with aclosing(Addresses(names, lambda: now[0])) as found:
            await found.of(self.URL)
            names.failure = failure
            now[0] = addresses._FRESH_S
            for _ in range(3):
                assert await found.of(self.URL) == "127.0.0.1"
            assert names.asked == 2
            now[0] = addresses._GOOD_S
            with pytest.raises(Unresolved):
                await found.of(self.URL)

    async def test_the_last_one_serves_while_the_resolver_is_slow(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(addresses, "_SLOW_S", 0.01)
        now, go_on, asked = [0.0], asyncio.Event(), 0

        async def resolve(host: str, port: int) -> list[str]:
            nonlocal asked
            asked += 1
            if asked > 1:
                await go_on.wait()
            return ["127.0.0.1"]

        async with aclosing(Addresses(resolve, lambda: now[0])) as found:
            await found.of(self.URL)
            for now[0] in (addresses._FRESH_S, 3 * addresses._FRESH_S):
                assert await found.of(self.URL) == "127.0.0.1"
            assert asked == 2
            assert found._looking

    async def test_a_name_that_is_gone_has_none(self) -> None:
        now, names = [0.0], Names()
        async with aclosing(Addresses(names, lambda: now[0])) as found:
            await found.of(self.URL)
            names.failure = GONE
            now[0] = addresses._FRESH_S
            with pytest.raises(BadInput):
                await found.of(self.URL)
            names.failure = AGAIN
            with pytest.raises(Unresolved):
                await found.of(self.URL)

    async def test_so_many_are_kept(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(addresses, "_MOST", 3)
        async with aclosing(Addresses(Names())) as found:
            for number in range(5):
                await found.of(httpx.URL(f"http://{number}.invalid"))
            assert [*found._kept] == ["2.invalid", "3.invalid", "4.invalid"]
