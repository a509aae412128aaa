"""Trace context goes from the client to the node, if it is one; so does the request's id."""

import pytest

from tests.backend.conftest import StartNode
from tests.backend.stand_ins import Network, StandIn

ASK = {"message": "hello", "lora_name": "legal"}
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
STATE = "rojo=00f067aa0ba902b7,congo=t61rcWkgMzE"


async def heard(network: Network, start_node: StartNode, headers: list[tuple[str, str]]) -> StandIn:
    node = StandIn()
    await network.register(await start_node(node), "legal")
    answer = await network.http.post("/chat", json=ASK, headers=headers)
    assert answer.status_code == 200
    return node


async def test_a_trace_goes_on_at_the_node(network: Network, start_node: StartNode) -> None:
    given = [("traceparent", PARENT), ("tracestate", STATE)]
    (seen,) = (await heard(network, start_node, given)).seen
    assert seen.header("traceparent") == [PARENT]
    assert seen.header("tracestate") == [STATE]


@pytest.mark.parametrize(
    "given",
    [
        [("traceparent", "x" * 10_000)],
        [("traceparent", f"{PARENT}-{'x' * 10_000}")],
        [("traceparent", PARENT.upper())],
        [("traceparent", PARENT), ("traceparent", PARENT)],
        [("tracestate", STATE)],
    ],
)
async def test_what_is_no_trace_is_left_out(
    network: Network, start_node: StartNode, given: list[tuple[str, str]]
) -> None:
    (seen,) = (await heard(network, start_node, given)).seen
    assert seen.header("traceparent") == seen.header("tracestate") == []


@pytest.mark.parametrize("state", ["x" * 10_000, "caf\u00e9=1"])
async def test_a_state_that_is_too_long_or_odd_is_left_out(
    network: Network, start_node: StartNode, state: str
) -> None:
    given = [("traceparent", PARENT), ("tracestate", state.encode("latin-1").decode("latin-1"))]
    node = StandIn()
    await network.register(await start_node(node), "legal")
    raw = [(key.encode(), value.encode("latin-1")) for key, value in given]
    assert (await network.http.post("/chat", json=ASK, headers=raw)).status_code == 200
    assert node.seen[0].header("traceparent") == [PARENT]
    assert node.seen[0].header("tracestate") == []


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/health"), ("GET", "/nowhere"), ("POST", "/chat"), ("POST", "/v1/chat/completions")],
)
async def test_every_answer_carries_the_requests_id(
    network: Network, method: str, path: str
) -> None:
    answer = await network.http.request(method, path, headers={"X-Request-Id": "mine"})
    assert answer.headers["x-request-id"] == "mine"
    assert len((await network.http.request(method, path)).headers["x-request-id"]) == 32
