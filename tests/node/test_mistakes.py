"""Requests that vLLM stumbles over, at vLLM's own application: with `Mistakes` and without."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp
from vllm.exceptions import GenerationError, VLLMValidationError
from vllm.v1.engine.exceptions import EngineDeadError

from r3mes_vllm.node.mistakes import Mistakes

CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
MESSAGES = [{"role": "user", "content": "hi"}]

STUMBLES: list[tuple[str, dict[str, Any], str]] = [
    (CHAT, {"messages": MESSAGES, "structured_outputs": "json"}, "structured_outputs"),
    (CHAT, {"messages": MESSAGES, "structured_outputs": [1]}, "structured_outputs"),
    (
        CHAT,
        {"messages": MESSAGES, "tools": [{}], "tool_choice": {"function": {"name": "x"}}},
        "tools",
    ),
    (COMPLETIONS, {"prompt": "hi", "structured_outputs": "json"}, "structured_outputs"),
]
"""Of each, the field to blame."""


@pytest.fixture(scope="module")
def vllm() -> Any:
    from vllm.entrypoints.launchers.app import build_app
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_PLUGINS", "none")
        args = make_arg_parser(FlexibleArgumentParser()).parse_args([])
        return build_app(args, ("generate",), None)


async def post(app: ASGIApp, path: str, body: object) -> httpx.Response:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://node") as client:
        return await client.post(path, json=body)


@pytest.mark.parametrize(("path", "body", "field"), STUMBLES)
async def test_what_vllm_stumbles_over_names_its_field(
    vllm: Any, path: str, body: dict[str, Any], field: str
) -> None:
    answer = await post(Mistakes(vllm), path, body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["param"].partition(".")[0] == field
    assert error["message"].startswith(field)


@pytest.mark.parametrize(("path", "body", "field"), STUMBLES)
async def test_without_it_that_is_500(
    vllm: Any, path: str, body: dict[str, Any], field: str
) -> None:
    assert (await post(vllm, path, body)).status_code == 500


async def test_what_vllm_refuses_gets_openais_shape(vllm: Any) -> None:
    asked = {"messages": MESSAGES, "temperature": "warm"}
    theirs = (await post(vllm, CHAT, asked)).json()["error"]
    ours = (await post(Mistakes(vllm), CHAT, asked)).json()["error"]
    assert (theirs["param"], theirs["code"]) == ("body.temperature", 400)
    assert ours == {
        "message": ours["message"],
        "type": "invalid_request_error",
        "param": "temperature",
        "code": "bad_request",
    }
    assert ours["message"].startswith("temperature: ")


TOKEN = 'data: {"choices": [{"text": "data: {\\"error\\": 1}"}]}\n\n'
ERROR = 'data: {"error": {"message": "no such token", "type": "BadRequestError", "code": 400}}\n\n'
CREATED = 'event: response.created\ndata: {"type": "response.created"}\n\n'
STARTED = 'event: response.in_progress\ndata: {"type": "response.in_progress"}\n\n'
DELTA = 'event: response.output_text.delta\ndata: {"delta": "x"}\n\n'
DONE = "data: [DONE]\n\n"


def streaming(*parts: str | Exception) -> ASGIApp:
    async def body() -> AsyncIterator[str]:
        for part in parts:
            if isinstance(part, Exception):
                raise part
            yield part
            await asyncio.sleep(0)

    async def answer(request: Request) -> Response:
        await request.body()
        return StreamingResponse(body(), media_type="text/event-stream")

    async def handled(request: Request, error: Exception) -> Response:
        return JSONResponse({}, 500)

    kinds = (VLLMValidationError, GenerationError, EngineDeadError, ValueError)
    routes = [Route(path, answer, methods=["POST"]) for path in (COMPLETIONS, RESPONSES)]
    return Starlette(routes=routes, exception_handlers=dict.fromkeys(kinds, handled))


@pytest.mark.parametrize(
    ("path", "parts", "status"),
    [
        (COMPLETIONS, (ERROR, DONE), 400),
        (COMPLETIONS, (VLLMValidationError("no such token"),), 400),
        (RESPONSES, (CREATED, STARTED, VLLMValidationError("no such token")), 400),
        (RESPONSES, (CREATED, STARTED, ERROR), 400),
        (RESPONSES, (CREATED, STARTED, GenerationError()), 500),
        (RESPONSES, (CREATED, STARTED, EngineDeadError()), 500),
    ],
)
async def test_a_stream_that_can_t_begin_has_the_status_that_it_should(
    path: str, parts: tuple[str | Exception, ...], status: int
) -> None:
    app = streaming(*parts)
    answer = await post(Mistakes(app), path, {})
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/json"
    assert answer.json()["error"]["message"]
    if not isinstance(parts[-1], Exception):
        assert (await post(app, path, {})).status_code == 200


@pytest.mark.parametrize(
    ("path", "parts"),
    [
        (COMPLETIONS, (TOKEN, DONE)),
        (COMPLETIONS, (TOKEN, ERROR, DONE)),
        (COMPLETIONS, ()),
        (COMPLETIONS, (": keep-alive\n\n", ERROR)),
        (RESPONSES, (CREATED, STARTED, DELTA)),
        (RESPONSES, (CREATED, STARTED)),
    ],
)
async def test_a_stream_that_began_is_left_alone(path: str, parts: tuple[str, ...]) -> None:
    app = streaming(*parts)
    answer = await post(Mistakes(app), path, {})
    assert answer.text == (await post(app, path, {})).text == "".join(parts)
    assert answer.status_code == 200


async def test_a_first_token_does_not_wait_for_the_second() -> None:
    gate = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": EVENTS})
        await send({"type": "http.response.body", "body": TOKEN.encode(), "more_body": True})
        await asyncio.wait_for(gate.wait(), 5)
        await send({"type": "http.response.body", "body": DONE.encode(), "more_body": False})

    seen: list[Any] = []

    async def send(message: Any) -> None:
        seen.append(message)
        if TOKEN.encode() == message.get("body"):
            gate.set()

    async def receive() -> Any:
        return {"type": "http.request", "body": b"{}", "more_body": False}

    await Mistakes(app)({"type": "http", "path": COMPLETIONS}, receive, send)
    assert seen[0]["type"] == "http.response.start"
    assert len(seen) == 3


EVENTS = [(b"content-type", b"text/event-stream; charset=utf-8")]


async def test_a_mistake_of_the_servers_own_stays_one() -> None:
    async def broken(request: Request) -> Response:
        raise KeyError("of ours")

    app = Mistakes(Starlette(routes=[Route(COMPLETIONS, broken, methods=["POST"])]))
    assert (await post(app, COMPLETIONS, json.loads("{}"))).status_code == 500
