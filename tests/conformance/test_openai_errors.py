"""OpenAI's own Python client, unmodified: what it raises, and how it leaves."""

import asyncio
import time
from typing import Any

import httpx
import openai
import pytest
from openai import BadRequestError, NotFoundError

from tests.conformance.asked import MESSAGES
from tests.conformance.document import application
from tests.conftest import Network
from tests.programs import free_port, program, wait_until


class TestErrors:
    """Each is the exception that a program for api.openai.com catches."""

    MISTAKES: list[tuple[str, Any]] = [
        ("temperature", -1),
        ("temperature", "warm"),
        ("top_p", 2),
        ("n", 9),
        ("n", 0),
        ("max_tokens", -1),
        ("max_tokens", "many"),
        ("messages", None),
        ("messages", "hello"),
        ("messages", [{"content": "no role"}]),
        ("messages", [{"role": "user", "content": 5}]),
        ("stop", 5),
        ("seed", 2**70),
        ("tools", [{}]),
        ("tools", []),
        ("tool_choice", "perhaps"),
        ("response_format", "json"),
        ("response_format", {"type": "xml"}),
        ("response_format", {"type": "json_schema"}),
        ("stream_options", {"include_usage": True}),
        ("logit_bias", {"x": 1}),
        ("top_logprobs", 99),
        ("structured_outputs", "json"),
    ]

    @pytest.mark.parametrize(("field", "value"), MISTAKES)
    def test_a_bad_field_is_named(self, client: openai.OpenAI, field: str, value: Any) -> None:
        asked: dict[str, Any] = {"model": "legal", "messages": MESSAGES, "max_tokens": 2}
        with pytest.raises(BadRequestError) as caught:
            client.post("/chat/completions", body=asked | {field: value}, cast_to=object)
        error = caught.value
        assert error.type == "invalid_request_error"
        assert (error.param or "").partition(".")[0] == field
        assert isinstance(error.code, str)
        assert field in error.message

    @pytest.mark.parametrize(
        "field",
        [
            {"logit_bias": {"99999": 1}},
            {"stop_token_ids": [99999]},
            {"structured_outputs": {"regex": "("}},
            {"structured_outputs": {"grammar": "root ::= nothing"}},
            {"structured_outputs": {"grammar": "root ::= "}},
            {"structured_outputs": {"json": {"$ref": "#"}}},
            {"stream_interval": 2**64},
            {"vllm_xargs": {"kv_transfer_params": "x"}},
            {"messages": [{"role": "user", "content": "word " * 2000}]},
        ],
        ids=str,
    )
    def test_a_stream_that_can_t_begin_has_a_status(
        self, client: openai.OpenAI, field: dict[str, Any]
    ) -> None:
        """vLLM answers 200 and sends the error as an event."""
        asked: dict[str, Any] = {"model": "legal", "messages": MESSAGES, "max_tokens": 2}
        for stream in (True, False):
            with pytest.raises(BadRequestError):
                client.post(
                    "/chat/completions", body=asked | field | {"stream": stream}, cast_to=object
                )

    def test_an_unknown_model(self, client: openai.OpenAI) -> None:
        for ask in (
            lambda: client.chat.completions.create(model="nobody", messages=MESSAGES),
            lambda: client.completions.create(model="nobody", prompt="x"),
            lambda: client.responses.create(model="nobody", input="x"),
            lambda: client.embeddings.create(model="nobody", input="x"),
        ):
            with pytest.raises(NotFoundError) as caught:
                ask()
            assert (caught.value.param, caught.value.code) == ("model", "model_not_found")

    def test_embeddings_of_a_model_that_has_none(self, client: openai.OpenAI) -> None:
        with pytest.raises(NotFoundError, match="embeddings"):
            client.embeddings.create(model="legal", input="x")

    def test_what_is_not_served(self, client: openai.OpenAI) -> None:
        for ask in (
            lambda: client.files.list(),
            lambda: client.moderations.create(input="x"),
            lambda: client.images.generate(prompt="x"),
            lambda: client.batches.list(),
        ):
            with pytest.raises(NotFoundError) as caught:
                ask()
            assert caught.value.type == "invalid_request_error"

    def test_a_timeout(self, client: openai.OpenAI) -> None:
        with pytest.raises(openai.APITimeoutError):
            client.with_options(timeout=0.001).chat.completions.create(
                model="legal", messages=MESSAGES
            )

    def test_nobody_there(self) -> None:
        client = openai.OpenAI(
            base_url=f"http://127.0.0.1:{free_port()}/v1", api_key="none", max_retries=0
        )
        with pytest.raises(openai.APIConnectionError):
            client.models.list()

    async def test_a_cancelled_request_is_ended_on_the_engine(
        self, async_client: openai.AsyncOpenAI, network: Network
    ) -> None:
        async with httpx.AsyncClient(base_url=network.node.url) as http:

            async def running() -> bool:
                lines = (await http.get("/metrics")).text.splitlines()
                [line] = [it for it in lines if it.startswith("vllm:num_requests_running{")]
                return not line.endswith(" 0.0")

            async with asyncio.timeout(30):
                while await running():
                    await asyncio.sleep(0.01)
                long = async_client.chat.completions.create(
                    model="legal",
                    messages=MESSAGES,
                    n=8,
                    temperature=1,
                    max_tokens=8000,
                    extra_body={"ignore_eos": True},
                )
                task = asyncio.create_task(long)
                while not await running():
                    assert not task.done()
                    await asyncio.sleep(0.01)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                cancelled = time.monotonic()
                while await running():
                    await asyncio.sleep(0.01)
        assert time.monotonic() - cancelled < 10  # of the minutes that it would run

    def test_a_stream_that_is_closed(self, client: openai.OpenAI, network: Network) -> None:
        with client.chat.completions.create(
            model="legal",
            messages=MESSAGES,
            max_tokens=8000,
            stream=True,
            extra_body={"ignore_eos": True},
        ) as stream:
            next(iter(stream))

        def ended() -> bool:
            text = httpx.get(f"{network.node.url}/metrics").text
            return any(
                line.startswith("vllm:num_requests_running{") and line.endswith(" 0.0")
                for line in text.splitlines()
            )

        wait_until(ended, 5, "the request to end")


class TestKeys:
    def at_a_node(self, key: str) -> openai.AsyncOpenAI:
        """One without an engine."""
        transport = httpx.ASGITransport(application(), raise_app_exceptions=False)
        # the client's own kind of client is a younger httpx
        http: Any = httpx.AsyncClient(transport=transport)
        return openai.AsyncOpenAI(
            base_url="http://node/v1", api_key=key, http_client=http, max_retries=0
        )

    async def test_at_the_node(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("R3MES_API_KEYS", "right")
        async with self.at_a_node("wrong") as client:
            with pytest.raises(openai.AuthenticationError) as caught:
                await client.models.list()
        assert caught.value.type == "authentication_error"

    async def test_one_that_has_asked_too_often(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("R3MES_API_KEYS", "right")
        monkeypatch.setenv("R3MES_RATES", '{"requests": 1}')
        async with self.at_a_node("right") as client:
            with pytest.raises(openai.InternalServerError):  # there is no engine
                await client.completions.create(model="legal", prompt="x")
            with pytest.raises(openai.RateLimitError) as caught:
                await client.completions.create(model="legal", prompt="x")
        assert int(caught.value.response.headers["retry-after"]) > 0

    def test_at_the_backend(self, tmp_path: Any) -> None:
        url = f"http://127.0.0.1:{(port := free_port())}"
        arguments = ("backend", "--port", str(port), "--database-url", "sqlite://")
        with program(tmp_path, *arguments, url=url, env={"R3MES_API_KEYS": "right"}) as backend:
            backend.wait_for("/health", 30)
            with openai.OpenAI(base_url=f"{url}/v1", api_key="right") as client:
                assert client.models.list().data == []
            with (
                openai.OpenAI(base_url=f"{url}/v1", api_key="wrong") as client,
                pytest.raises(openai.AuthenticationError) as caught,
            ):
                client.models.list()
        assert caught.value.type == "authentication_error"
