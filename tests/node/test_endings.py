"""How a stream ends that failed: over real sockets, on both HTTP implementations of uvicorn."""

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator, Iterator
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp
from vllm.entrypoints.generate.base.protocol import RequestResponseMetadata
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.v1.engine.exceptions import EngineDeadError

from r3mes_vllm.engine.ending import no_tracebacks, refuse_aborted
from r3mes_vllm.errors import EngineError
from r3mes_vllm.node.endings import Endings
from tests.programs import free_port

DONE = "data: [DONE]\n\n"
TEXT = 'data: {"choices": [{"text": "data: {\\"error\\": \\"abort\\"} [DONE]"}]}\n\n'


class Engine:
    """Generates one token, and then what `how` says."""

    def __init__(self, how: str) -> None:
        self._how = how

    async def generate(self, *_: Any, **__: Any) -> AsyncIterator[RequestOutput]:
        yield self._output("go", None)
        if self._how == "dies":
            raise EngineDeadError
        yield self._output(" on", "abort" if self._how == "aborts" else "length")

    def _output(self, text: str, reason: str | None) -> RequestOutput:
        part = CompletionOutput(0, text, [5], None, None, finish_reason=reason)
        return RequestOutput("x", "say", [1], None, [part], finished=reason is not None)


async def of_vllm(engine: Engine) -> AsyncIterator[str]:
    """vLLM's own stream of a completion by that engine."""
    serving = OpenAIServingCompletion.__new__(OpenAIServingCompletion)
    vars(serving).update(
        enable_force_include_usage=False,
        enable_prompt_tokens_details=False,
        enable_per_request_metrics=False,
        system_fingerprint=None,
        models=SimpleNamespace(),
    )

    async def numbered() -> AsyncIterator[tuple[int, RequestOutput]]:
        async for output in engine.generate():
            yield 0, output

    request = CompletionRequest(model="m", prompt="say", stream=True, max_tokens=2)
    stream = serving.completion_stream_generator(
        request,
        [{"type": "token", "prompt_token_ids": [1]}],
        numbered(),
        "x",
        0,
        "m",
        1,
        None,
        RequestResponseMetadata(request_id="x"),
    )
    async for event in stream:
        yield event


async def scripted(*parts: str | Exception) -> AsyncIterator[str]:
    for part in parts:
        if isinstance(part, Exception):
            raise part
        yield part
        await asyncio.sleep(0.01)


ERROR = 'data: {"error": {"message": "the engine died", "code": 500}}\n\n'
SCRIPTS: dict[str, tuple[str | Exception, ...]] = {
    "failed": (TEXT, ERROR, DONE),
    "failed-in-one": (TEXT, ERROR + DONE),
    "chat": (TEXT, f"event: error\n{ERROR}", EngineError("the engine died")),
    "broke-off": (TEXT, EngineDeadError()),
    "well": (TEXT, DONE),
}


async def stream(request: Request) -> Response:
    how = request.path_params["how"]
    if how in SCRIPTS:
        return StreamingResponse(scripted(*SCRIPTS[how]), media_type="text/event-stream")
    engine = Engine(how.removeprefix("vllm-"))
    if request.app.state.protected:
        refuse_aborted(engine)
    return StreamingResponse(of_vllm(engine), media_type="text/event-stream")


async def refused(request: Request) -> Response:
    return JSONResponse({"error": {"message": "no"}}, 400)


def application(*, protected: bool) -> ASGIApp:
    app = Starlette(routes=[Route("/v1/refused", refused), Route("/v1/{how}", stream)])
    app.state.protected = protected
    if protected:
        app.add_middleware(Endings)
    return app


@contextlib.asynccontextmanager
async def serving(app: ASGIApp, http: str) -> AsyncIterator[str]:
    port = free_port()
    config = uvicorn.Config(app, port=port, http=http, log_level="warning", lifespan="off")
    server = uvicorn.Server(config)
    server.capture_signals = contextlib.nullcontext  # type: ignore[assignment, method-assign]
    task = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        await task


async def get(http: str, how: str, *, protected: bool = True) -> tuple[str, bool]:
    """What a client reads, and whether the connection broke before the end."""
    text = ""
    async with (
        serving(application(protected=protected), http) as url,
        httpx.AsyncClient() as client,
        client.stream("GET", f"{url}/v1/{how}") as answer,
    ):
        try:
            async for part in answer.aiter_text():
                text += part
        except httpx.RemoteProtocolError:
            return text, True
    return text, False


@pytest.fixture(params=["h11", "httptools"])
def http(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def quiet() -> Iterator[None]:
    loggers = [logging.getLogger("uvicorn.error"), *logging.getLogger("vllm").handlers]
    before = [list(it.filters) for it in loggers]
    no_tracebacks()
    yield
    for it, filters in zip(loggers, before, strict=True):
        it.filters[:] = filters


@pytest.mark.parametrize(
    "how", ["failed", "failed-in-one", "chat", "broke-off", "vllm-dies", "vllm-aborts"]
)
@pytest.mark.usefixtures("quiet")
async def test_a_failed_stream_ends_with_its_error_and_a_broken_connection(
    http: str, how: str, capfd: pytest.CaptureFixture[str]
) -> None:
    text, broken = await get(http, how)
    first, *_, last = text.rstrip().split("\n\n")
    assert json.loads(first.removeprefix("data: "))["choices"]
    assert json.loads(last.partition("data: ")[2])["error"]["message"]
    assert DONE not in text
    assert '"finish_reason":"abort"' not in text
    assert text.count('{"error": {') == 1
    assert broken
    assert "Traceback" not in "".join(capfd.readouterr())


@pytest.mark.parametrize("how", ["failed", "vllm-dies"])
async def test_without_it_an_error_ends_as_a_whole_answer(http: str, how: str) -> None:
    text, broken = await get(http, how, protected=False)
    assert '"error"' in text
    assert text.endswith(DONE)
    assert not broken


async def test_without_it_an_aborted_answer_is_a_whole_one(http: str) -> None:
    text, broken = await get(http, "vllm-aborts", protected=False)
    assert '"finish_reason":"abort"' in text
    assert '"error"' not in text
    assert text.endswith(DONE)
    assert not broken


async def test_without_the_filter_a_traceback_is_printed(
    http: str, capfd: pytest.CaptureFixture[str]
) -> None:
    await get(http, "failed")
    assert "Traceback" in "".join(capfd.readouterr())


@pytest.mark.parametrize("how", ["well", "vllm-ends"])
async def test_a_whole_answer_is_left_alone(http: str, how: str) -> None:
    text, broken = await get(http, how)
    assert (text, broken) == await get(http, how, protected=False)
    assert text.endswith(DONE)
    assert not broken


async def test_what_was_refused_before_it_began_is_left_alone(http: str) -> None:
    assert await get(http, "refused") == ('{"error":{"message":"no"}}', False)
