"""Each field of a request that has a limit, from both sides."""

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from r3mes_vllm.node.fields import TooMuch, refuse_excess
from r3mes_vllm.node.hold import Hold
from r3mes_vllm.tables import RequestLimits

LIMITS = RequestLimits(
    tokens=100,
    answers=4,
    logprobs=5,
    prompts=3,
    messages=3,
    stops=2,
    stop_characters=8,
    biases=3,
    choices=3,
    tools=2,
    schema_bytes=300,
    schema_depth=8,
    pattern_characters=10,
)


def nested(depth: int) -> dict[str, Any]:
    return {} if depth == 1 else {"a": nested(depth - 1)}


def schema(inner: dict[str, Any]) -> dict[str, Any]:
    """Three levels around `inner`."""
    return {"type": "json_schema", "json_schema": {"schema": inner}}


SIDES: list[tuple[str, Any, Any]] = [
    ("max_tokens", 100, 101),
    ("max_tokens", "100", "101"),  # vLLM takes both
    ("max_completion_tokens", 100, 1e9),
    ("max_output_tokens", 100, 101),
    ("n", 4, 5),
    ("best_of", 4, 5),
    ("logprobs", True, 6),
    ("top_logprobs", 5, 6),
    ("prompt_logprobs", 5, 6),
    ("messages", [{}] * 3, [{}] * 4),
    ("prompt", ["a"] * 3, ["a"] * 4),
    ("prompt", [[1]] * 3, [[1]] * 4),
    ("prompt", [1] * 1000, [1, "a"] * 2),
    ("input", [{}] * 3, [{}] * 4),
    ("input", "text", ["a"] * 4),
    ("stop", ["a"] * 2, ["a"] * 3),
    ("stop", "a" * 8, "a" * 9),
    ("stop", ["a" * 8], ["a" * 9]),
    ("bad_words", ["a" * 8], ["a" * 9]),
    ("stop_token_ids", [1] * 2, [1] * 3),
    ("logit_bias", dict.fromkeys("abc", 1), dict.fromkeys("abcd", 1)),
    ("structured_outputs", {"choice": ["a"] * 3}, {"choice": ["a"] * 4}),
    ("structured_outputs", {"regex": "a" * 10}, {"regex": "a" * 11}),
    ("structured_outputs", {"grammar": "a" * 250}, {"grammar": "a" * 301}),
    ("structured_outputs", {"json": nested(7)}, {"json": nested(8)}),
    ("structured_outputs", {"json": json.dumps(nested(8))}, {"json": json.dumps(nested(9))}),
    ("structured_outputs", {"json": "{" * 200}, {"json": "{" * 301}),
    ("tools", [{}] * 2, [{}] * 3),
    ("tools", [{"function": {"parameters": nested(5)}}], [{"function": {"parameters": nested(6)}}]),
    ("response_format", schema(nested(6)), schema(nested(7))),
    ("response_format", schema({"pattern": "a" * 10}), schema({"a": {"pattern": "a" * 11}})),
    ("text", {"format": {"description": "a" * 200}}, {"format": {"description": "a" * 300}}),
]


@pytest.mark.parametrize(("field", "within", "over"), SIDES)
def test_up_to_the_limit_it_passes_and_over_it_is_named(field: str, within: Any, over: Any) -> None:
    refuse_excess({field: within}, LIMITS)
    with pytest.raises(TooMuch, match=field) as caught:
        refuse_excess({field: over}, LIMITS)
    assert caught.value.field.startswith(field)


@pytest.mark.parametrize("value", [None, "", "x", -1, 0.5, [], {}, [None], {"": None}, True, "1e"])
def test_of_the_wrong_type_it_is_left_to_vllm(value: Any) -> None:
    for field in {name for name, _, _ in SIDES}:
        refuse_excess({field: value}, LIMITS)


@pytest.mark.parametrize(
    ("path", "value", "status"),
    [
        ("/v1/responses", True, 400),
        ("/v1/responses", "true", 400),  # vLLM takes it
        ("/v1/responses", False, 200),
        ("/v1/responses", None, 200),
        ("/v1/completions", True, 200),  # has no meaning there
    ],
)
def test_nothing_goes_on_in_the_background(path: str, value: Any, status: int) -> None:
    """Whatever vLLM behind it would do."""

    async def vllm(request: Request) -> Response:
        return Response()

    node = SimpleNamespace(
        host=SimpleNamespace(is_base=lambda name: True), settings=SimpleNamespace(limits=LIMITS)
    )
    app = Starlette(routes=[Route(path, vllm, methods=["POST"])], middleware=[Middleware(Hold)])
    app.state.r3mes = node

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://node") as client:
            return await client.post(path, json={"model": "base", "background": value})

    answer = asyncio.run(ask())
    assert answer.status_code == status
    if status == 400:
        assert answer.json()["error"]["param"] == "background"
