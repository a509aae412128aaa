"""Where a node may say it lives."""

import asyncio
from contextlib import nullcontext

import pytest

from r3mes_vllm.backend import endpoints
from r3mes_vllm.backend.endpoints import check_endpoint, is_public
from r3mes_vllm.backend.refusals import BadInput
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


async def test_a_slow_resolver_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    async def never(*args: object, **kwargs: object) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", never)
    monkeypatch.setattr(endpoints, "_RESOLVE_TIMEOUT_S", 0.01)
    with pytest.raises(BadInput, match="does not resolve"):
        await check_endpoint("http://node.example", allow_private=False)
