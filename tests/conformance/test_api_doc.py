"""Every row of the tables in docs/api.md, tried at a node and through a backend."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import pytest

from r3mes_vllm.tables import RequestLimits
from tests.conftest import Network

PAGE = (Path(__file__).parents[2] / "docs" / "api.md").read_text()
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {
        "model": "legal",
        "messages": [{"role": "user", "content": "hi"}],
        "max_tokens": 2,
    },
    "/v1/completions": {"model": "legal", "prompt": "hi", "max_tokens": 2},
    "/v1/responses": {"model": "legal", "input": "hi", "max_output_tokens": 2},
    "/v1/embeddings": {"model": "legal", "input": "hi"},
    "/chat": {"message": "hi", "max_tokens": 2},
}


def section(heading: str) -> str:
    [found] = re.findall(rf"^## {heading}\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE)
    return str(found)


def rows(text: str) -> list[list[str]]:
    """Of all tables in it, the cells without their backquotes."""
    tables = re.findall(r"^\|[-|]+\|\n((?:\|.*\|\n)+)", text, re.MULTILINE)
    lines = [line for table in tables for line in table.splitlines()]
    return [[cell.strip().strip("`") for cell in line[1:-1].split("|")] for line in lines]


def refused() -> list[tuple[str, str, int, str]]:
    """Path, field, status and `param`."""
    return [
        (part.partition("`")[0], field, int(status), param)
        for part in section("Refused").split("ith `POST ")[1:]
        for field, status, param in rows(part)
    ]


@pytest.fixture(params=["node", "backend"])
def base(request: pytest.FixtureRequest, network: Network) -> str:
    return (network.node if request.param == "node" else network.backend).url


def ask(base: str, method: str, path: str, body: Any = None) -> httpx.Response:
    given = BODIES.get(path, {}) if body is None else body
    return httpx.request(method, base + path, json=None if method == "GET" else given, timeout=60)


@pytest.mark.parametrize("row", rows(section("Served")), ids=lambda it: it[0])
def test_what_is_served(base: str, row: list[str]) -> None:
    method, path = row[0].split()
    assert ask(base, method, path).status_code == int(row[1])


@pytest.mark.parametrize("row", rows(section("Not served")), ids=lambda it: it[0])
def test_what_is_not_served(base: str, row: list[str]) -> None:
    method, path = row[0].split()
    answer = ask(base, method, path)
    assert answer.status_code == int(row[1])
    assert answer.json()["error"]["code"] == row[2]


@pytest.mark.parametrize(("path", "field", "status", "param"), refused())
def test_what_is_refused(base: str, path: str, field: str, status: int, param: str) -> None:
    answer = ask(base, "POST", path, BODIES[path] | json.loads(field))
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert (error["param"] or "").partition(".")[0] == param


@pytest.mark.parametrize("row", rows(section("`/chat`")), ids=lambda it: it[0])
def test_chat(base: str, network: Network, row: list[str]) -> None:
    is_backend = base == network.backend.url
    answer = ask(base, "POST", "/chat", {"max_tokens": 8} | json.loads(row[0]))
    at_node, *at_backend = map(int, re.findall(r"\d+", row[1]))
    assert answer.status_code in (at_backend if is_backend and at_backend else [at_node])
    assert answer.headers["content-type"] == row[2]


def test_what_has_no_meaning_is_ignored(base: str) -> None:
    [named] = re.findall(r"no meaning here, such\s+as (.*?) are taken and ignored", PAGE, re.DOTALL)
    values = {"user": "me", "store": True, "metadata": {"a": "b"}, "service_tier": "auto"}
    assert set(re.findall(r"`(\w+)`", named)) == set(values)
    answer = ask(base, "POST", "/v1/chat/completions", BODIES["/v1/chat/completions"] | values)
    assert answer.status_code == 200


def test_the_fields_of_chat_completions_are_taken(base: str) -> None:
    [named] = re.findall(r"Of chat completions: (.*?)Of completions", PAGE, re.DOTALL)
    values: dict[str, Any] = {
        "n": 2,
        "stop": ["x"],
        "seed": 1,
        "temperature": 0.5,
        "top_p": 0.9,
        "frequency_penalty": 0.1,
        "presence_penalty": 0.1,
        "logit_bias": {"65": 1},
        "logprobs": True,
        "top_logprobs": 1,
        "max_completion_tokens": 2,
        "response_format": {"type": "json_object"},
        "top_k": 5,
        "min_tokens": 1,
        "ignore_eos": True,
    }
    assert set(values) <= set(re.findall(r"`(\w+)`", named))
    answer = ask(base, "POST", "/v1/chat/completions", BODIES["/v1/chat/completions"] | values)
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
    ("choice", "refused"), [("required", True), ("auto", True), ("none", False)]
)
async def test_tools_need_a_parser(choice: str, refused: bool) -> None:
    """In vLLM's own code: the tests' node has one."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.renderers.online_renderer import OnlineRenderer

    assert "`tool_choice` is not `none` is 400" in " ".join(PAGE.split())
    without = OnlineRenderer.__new__(OnlineRenderer)
    vars(without).update(
        renderer=SimpleNamespace(tokenizer=None),
        parser=None,
        use_harmony=False,
        enable_auto_tools=False,
        exclude_tools_when_tool_choice_none=True,
        trust_request_chat_template=False,
    )
    tools = [{"type": "function", "function": {"name": "weather"}}]
    asked = ChatCompletionRequest(messages=[], tools=tools, tool_choice=choice, chat_template="x")
    answer = await without.render_chat(asked)
    assert answer.error.code == 400
    assert ("--tool-call-parser" in answer.error.message) == refused


def test_the_limits_are_the_settings_defaults() -> None:
    told = {row[0]: int(row[1]) for row in rows(section("Limits"))}
    defaults = RequestLimits().model_dump()
    assert told == {name: most for name, most in defaults.items() if name != "tokens"}


def test_the_exceptions_are_the_clients() -> None:
    for status, _, name in rows(section("Errors")):
        request = httpx.Request("POST", "http://node")
        response: Any = httpx.Response(int(status), request=request)
        with openai.OpenAI(api_key="none") as client:
            error = client._make_status_error_from_response(response)
        assert type(error).__name__ == name
