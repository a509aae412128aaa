"""A client's mistake is a 4xx that says where it is, whatever the route; never a 5xx."""

import asyncio
import gzip
import json
from typing import Any
from urllib.parse import urlsplit

import pytest

from r3mes_vllm.backend.bodies import API_BODY_LIMIT, INFERENCE_BODY_LIMIT, MOST_VALUES
from r3mes_vllm.wire import ChatRequest
from tests.backend.conftest import StartNode
from tests.backend.stand_ins import LEGAL_CID, PATIENCE_S, Network, StandIn, wallet

ON_BOTH = True

REGISTER = {
    "wallet_address": wallet(1),
    "endpoint_url": "http://127.0.0.1:8080",
    "available_lora_list": ["legal"],
}
BEAT = {"wallet_address": wallet(1), "status": "active", "current_load": 0}
LORA = {"name": "legal", "ipfs_hash": LEGAL_CID}
GOOD: dict[str, dict[str, Any]] = {
    "/api/lora/register": LORA,
    "/api/serving-node/register": REGISTER,
    "/api/serving-node/heartbeat": BEAT,
    "/api/serving-node/deregister": {"wallet_address": wallet(1)},
    "/chat": {"message": "hi"},
    "/v1/chat/completions": {"model": "legal"},
    "/v1/completions": {"model": "legal"},
    "/v1/responses": {"model": "legal"},
    "/v1/embeddings": {"model": "legal"},
}
"""Order matters: a node registers before it beats, and its adapter is there before it is asked."""

NO_OBJECT = {
    "empty": b"",
    "blank": b"   ",
    "no JSON": b"{not json}",
    "cut off": b'{"message": "hi"',
    "two values": b"{}{}",
    "array": b"[]",
    "string": b'"text"',
    "number": b"1",
    "null": b"null",
    "true": b"true",
    "NaN": b'{"message": NaN}',
    "Infinity": b'{"message": "hi", "temperature": -Infinity}',
    "invalid UTF-8": b'{"message": "\xff\xfe"}',
    "UTF-16": '{"message": "hi"}'.encode("utf-16"),
    "byte order mark": b'\xef\xbb\xbf{"message": "hi"}',
    "raw NUL": b'{"message": "\x00"}',
    "deep array": b'{"message": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep object": b'{"message":' * 50_000 + b"1" + b"}" * 50_000,
    "huge integer": b'{"message": ' + b"9" * 5000 + b"}",
    "lone surrogate": b'{"message": "\\ud800"}',
    "lone surrogate as a key": b'{"message": "hi", "\\udfff": 1}',
    "lone surrogate in depth": b'{"message": "hi", "messages": [{"content": ["\\ud83d x"]}]}',
}


def assert_refused(path: str, status: int, body: dict[str, Any], what: object) -> dict[str, Any]:
    assert 400 <= status < 500, (what, status, body)
    error: dict[str, Any] = body["error"]
    fields = {"message", "type", "param", "code"} if path.startswith("/v1") else {"code", "hint"}
    assert fields <= set(error), (what, body)
    assert error["message"]
    return error


@pytest.mark.parametrize("path", GOOD)
async def test_a_body_that_is_no_json_object_is_400(network: Network, path: str) -> None:
    for what, content in NO_OBJECT.items():
        headers = {"Content-Type": "application/json"}
        answer = await network.http.post(path, content=content, headers=headers)
        assert_refused(path, answer.status_code, answer.json(), what)
        assert answer.status_code == 400, what


async def test_the_same_routes_take_what_is_right(network: Network, start_node: StartNode) -> None:
    """The twin: it is the mistake that is refused."""
    url = await start_node(StandIn())
    for path, body in GOOD.items():
        if path.endswith("deregister"):
            continue
        right = body | ({"endpoint_url": url} if "endpoint_url" in body else {})
        answer = await network.http.post(path, json=right)
        assert answer.status_code == 200, (path, answer.text)


WRONG_FIELDS: list[tuple[str, str, Any]] = [
    ("/api/lora/register", "name", None),
    ("/api/lora/register", "name", ""),
    ("/api/lora/register", "name", "../etc"),
    ("/api/lora/register", "name", "a" * 129),
    ("/api/lora/register", "name", "legal\n"),
    ("/api/lora/register", "name", "le\0gal"),
    ("/api/lora/register", "name", ["legal"]),
    ("/api/lora/register", "ipfs_hash", "nonsense"),
    ("/api/lora/register", "ipfs_hash", ""),
    ("/api/lora/register", "ipfs_hash", "Qm" + "0" * 44),
    ("/api/lora/register", "ipfs_hash", LEGAL_CID + "\n"),
    ("/api/lora/register", "ipfs_hash", f"/ipfs/{LEGAL_CID}"),
    ("/api/lora/register", "ipfs_hash", 7),
    ("/api/lora/register", "description", "x" * 10_001),
    ("/api/lora/register", "description", "\0"),
    ("/api/lora/register", "category", "x" * 129),
    ("/api/lora/register", "version", "x" * 129),
    ("/api/lora/register", "version", 1.0),
    ("/api/lora/register", "system_prompt", "x" * 8193),
    ("/api/lora/register", "system_prompt", 1),
    ("/api/lora/register", "system_prompt", "\0"),
    ("/api/serving-node/register", "wallet_address", "cosmos1abc"),
    ("/api/serving-node/register", "wallet_address", "remes1short"),
    ("/api/serving-node/register", "wallet_address", wallet(1) + "\n"),
    ("/api/serving-node/register", "wallet_address", "remes" + "ä" * 30),
    ("/api/serving-node/register", "endpoint_url", "ftp://node.example"),
    ("/api/serving-node/register", "endpoint_url", 1),
    ("/api/serving-node/register", "available_lora_list", "legal"),
    ("/api/serving-node/register", "available_lora_list", [1]),
    ("/api/serving-node/register", "available_lora_list", ["x" * 129]),
    ("/api/serving-node/register", "available_lora_list", ["\0"]),
    ("/api/serving-node/register", "adapters", ["legal"]),
    ("/api/serving-node/register", "adapters", {"legal": "x" * 257}),
    ("/api/serving-node/register", "adapters", {"\0": LEGAL_CID}),
    ("/api/serving-node/register", "base_model", "x" * 129),
    ("/api/serving-node/register", "access_key", 1),
    ("/api/serving-node/register", "access_key", "x" * 15),
    ("/api/serving-node/register", "access_key", "x" * 16 + "\n"),
    ("/api/serving-node/heartbeat", "current_load", "much"),
    ("/api/serving-node/heartbeat", "current_load", -1),
    ("/api/serving-node/heartbeat", "current_load", 10**400),
    ("/api/serving-node/heartbeat", "current_load", None),
    ("/api/serving-node/heartbeat", "status", 1),
    ("/api/serving-node/heartbeat", "status", "x" * 33),
    ("/api/serving-node/heartbeat", "status", "a\0"),
    ("/api/serving-node/heartbeat", "wallet_address", 1),
    ("/api/serving-node/deregister", "wallet_address", None),
    ("/chat", "message", 1),
    ("/chat", "message", ""),
    ("/chat", "lora_name", ["legal"]),
    ("/chat", "messages", "hi"),
    ("/chat", "max_tokens", "many"),
    ("/chat", "max_tokens", 1.5),
    ("/chat", "stream", "perhaps"),
    ("/v1/chat/completions", "model", None),
    ("/v1/chat/completions", "model", ""),
    ("/v1/chat/completions", "model", ["legal"]),
    ("/v1/completions", "model", {"id": "legal"}),
    ("/v1/responses", "model", 1),
    ("/v1/embeddings", "model", True),
]


async def test_a_wrong_field_is_named(network: Network) -> None:
    for path, field, value in WRONG_FIELDS:
        answer = await network.http.post(path, json=GOOD[path] | {field: value})
        what = (path, field, value)
        error = assert_refused(path, answer.status_code, answer.json(), what)
        if path.startswith("/v1"):
            assert (answer.status_code, error["param"]) == (400, field), what
        else:
            assert answer.status_code == 422, what
            assert error["field"].startswith(field), what
        assert field in error["message"], what
    assert (await network.http.get("/api/lora/list")).json() == []
    assert await network.wallets() == []


async def test_a_null_of_a_chat_is_as_good_as_nothing(
    network: Network, start_node: StartNode
) -> None:
    await network.register(await start_node(StandIn()), "legal")
    nothing = dict.fromkeys(ChatRequest.model_fields)
    for field, value in (("message", "hi"), ("messages", [{"role": "user", "content": "hi"}])):
        answer = await network.http.post("/chat", json=nothing | {field: value})
        assert answer.status_code == 200, answer.text
    refused = await network.http.post("/chat", json=nothing)
    assert (refused.status_code, refused.json()["error"]["field"]) == (422, "message")


async def test_a_missing_field_is_named(network: Network) -> None:
    for path, body in GOOD.items():
        optional = {"lora_name"}
        for field in body.keys() - optional:
            rest = {key: value for key, value in body.items() if key != field}
            answer = await network.http.post(path, json=rest)
            error = assert_refused(path, answer.status_code, answer.json(), (path, field))
            assert field in error["message"]


async def test_an_infinite_load_is_refused(network: Network) -> None:
    content = json.dumps(BEAT).replace("0}", "1e999}")
    answer = await network.http.post("/api/serving-node/heartbeat", content=content)
    assert answer.status_code == 422
    assert answer.json()["error"]["field"] == "current_load"


@pytest.mark.parametrize(
    "name", ["\0", "../x", "legal\n", "ä", "x" * 100_000, "legal@", "@", f"legal@{'x' * 5000}"]
)
async def test_a_strange_name_is_an_unknown_one(
    network: Network, start_node: StartNode, name: str
) -> None:
    await network.register(await start_node(StandIn()), "legal")
    chat = await network.http.post("/chat", json={"message": "hi", "lora_name": name})
    openai = await network.http.post("/v1/completions", json={"model": name})
    assert (chat.status_code, openai.status_code) == (404, 404)
    assert len(chat.content) < 3000


@pytest.mark.parametrize(
    ("header", "value"),
    [("X-Wallet-Address", b"\xff\xfe"), ("Accept", b"\x80"), ("Accept", b"x" * 5000)],
)
async def test_a_header_that_can_not_travel_is_named(
    network: Network, start_node: StartNode, header: str, value: bytes
) -> None:
    await network.register(await start_node(StandIn()), "legal")
    headers = {header.encode(): value}
    answer = await network.http.post("/chat", json={"message": "hi"}, headers=headers)
    error = assert_refused("/chat", answer.status_code, answer.json(), header)
    assert error["field"] == header.lower()


async def test_an_adapter_header_of_any_bytes_is_an_unknown_name(
    network: Network, start_node: StartNode
) -> None:
    await network.register(await start_node(StandIn()), "legal")
    headers = {b"X-Adapter": b"\xff"}
    answer = await network.http.post("/chat", json={"message": "hi"}, headers=headers)
    assert answer.status_code == 404


@pytest.mark.parametrize(
    "query",
    [
        "max_age_seconds=soon",
        "max_age_seconds=-1",
        "max_age_seconds=0",
        "max_age_seconds=1e99",
        f"max_age_seconds={'9' * 400}",
        f"lora={'x' * 200}",
    ],
)
async def test_a_wrong_query_is_named(network: Network, query: str) -> None:
    answer = await network.http.get(f"/api/serving-node/list?{query}")
    error = assert_refused("/api", answer.status_code, answer.json(), query)
    assert error["field"] == query.partition("=")[0]


async def test_a_body_that_is_packed_is_refused_by_its_header(
    network: Network, start_node: StartNode
) -> None:
    await network.register(await start_node(StandIn()), "legal")
    for path, body in GOOD.items():
        content = json.dumps(body).encode()
        for encoding in ("gzip", "identity, br"):
            packed = await network.http.post(
                path, content=gzip.compress(content), headers={"Content-Encoding": encoding}
            )
            assert (packed.status_code, packed.headers["accept-encoding"]) == (415, "identity")
            error = assert_refused(path, 415, packed.json(), path)
            assert error["code"] == "unsupported_encoding"
            assert "Content-Encoding" in error["message"]
    plain = await network.http.post(
        "/chat", json=GOOD["/chat"], headers={"Content-Encoding": "identity"}
    )
    assert plain.status_code == 200


@pytest.mark.parametrize("query", ["lora=%00", "lora=%ff%fe", "lora=%ED%A0%80", "lora=", "x=%"])
async def test_a_strange_query_finds_nothing(network: Network, query: str) -> None:
    answer = await network.http.get(f"/api/serving-node/list?{query}")
    assert answer.json() == {"nodes": [], "count": 0}


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nothing", 404),
        ("GET", "/docs", 404),
        ("GET", "/redoc", 404),
        ("GET", "/openapi.json", 404),
        ("GET", "/v1/nothing", 404),
        ("POST", "/v1/load_lora_adapter", 404),
        ("GET", "/v1/models/%00%ff", 404),
        ("GET", "/v1/models/..%2f..", 404),
        ("GET", "/chat", 405),
        ("DELETE", "/v1/completions", 405),
        ("POST", "/health", 405),
        ("POST", "/api/lora/list", 405),
        ("POST", "/chat/", 404),
    ],
)
async def test_what_is_not_there_is_a_4xx_in_the_right_shape(
    network: Network, method: str, path: str, status: int
) -> None:
    answer = await network.http.request(method, path)
    assert answer.status_code == status
    assert_refused(path, status, answer.json(), path)


@pytest.mark.parametrize(
    ("path", "limit"),
    [
        ("/chat", INFERENCE_BODY_LIMIT),
        ("/v1/chat/completions", INFERENCE_BODY_LIMIT),
        ("/api/lora/register", API_BODY_LIMIT),
        ("/api/serving-node/register", API_BODY_LIMIT),
    ],
)
@pytest.mark.parametrize("announced", [True, False])
async def test_a_body_that_is_too_large_is_413(
    network: Network, path: str, limit: int, announced: bool
) -> None:
    host, port = urlsplit(network.url).hostname, urlsplit(network.url).port
    reader, writer = await asyncio.open_connection(host, port)
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\n"
    if announced:
        # Refused by its length alone: not a byte of it is sent.
        writer.write(f"{head}Content-Length: {limit + 1}\r\n\r\n".encode())
    else:
        chunked = f"{head}Transfer-Encoding: chunked\r\n\r\n{limit + 1:x}\r\n".encode()
        writer.write(chunked + b" " * (limit + 1))
    status = await asyncio.wait_for(reader.readuntil(b"\r\n"), PATIENCE_S)
    assert status.split()[1] == b"413"
    writer.close()


async def test_a_body_of_just_the_limit_is_taken(network: Network, start_node: StartNode) -> None:
    await network.register(await start_node(StandIn()), "legal")
    frame = len(b'{"message": ""}')
    body = b'{"message": "%b"}' % (b"x" * (INFERENCE_BODY_LIMIT - frame))
    assert (await network.http.post("/chat", content=body)).status_code == 200


SEPARATED = {
    "lists": (b"[],", 2),
    "objects": (b'{"a":1},', 2),
    "texts": (rb'"\\\",[{",', 1),
    "numbers": (b"1000,", 1),
}


@pytest.mark.parametrize("path", ["/chat", "/v1/completions"])
async def test_a_body_of_too_many_values_is_413(
    network: Network, start_node: StartNode, path: str
) -> None:
    node = StandIn()
    await network.register(await start_node(node), "legal")
    head = b'{"message":"hi \\u0061","model":"legal","x":['
    for kind, (piece, counted) in SEPARATED.items():
        most = (MOST_VALUES - 3 - counted) // counted  # four are in the head
        for number, status in ((most, 200), (most + 2, 413)):
            body = head + number * piece + piece.rstrip(b",") + b"]}"
            answer = await network.http.post(path, content=body)
            assert answer.status_code == status, (kind, answer.text)
        error = assert_refused(path, 413, answer.json(), kind)
        assert f"{MOST_VALUES} values" in error["message"]
    assert len(node.seen) == len(SEPARATED)


async def test_a_text_may_look_like_many_values(network: Network, start_node: StartNode) -> None:
    await network.register(await start_node(StandIn()), "legal")
    table = json.dumps([{"a": [number, "b"]} for number in range(200_000)])
    assert (await network.http.post("/chat", json={"message": table})).status_code == 200


async def test_a_long_conversation_with_tools_is_taken(
    network: Network, start_node: StartNode
) -> None:
    await network.register(await start_node(StandIn()), "legal")
    turn = {"role": "user", "content": [{"type": "text", "text": "one, two [three]"}]}
    properties = {f"p{it}": {"type": "string", "enum": ["a", "b"]} for it in range(30)}
    function = {"name": "look", "parameters": {"type": "object", "properties": properties}}
    asked = {
        "model": "legal",
        "messages": [turn] * 20_000,
        "tools": [{"type": "function", "function": function}] * 128,
        "logit_bias": {str(it): -100 for it in range(152_000)},
    }
    answer = await network.http.post("/v1/chat/completions", json=asked)
    assert answer.status_code == 200
