"""An answer of a real node that breaks off anywhere, and whose rest another gives: the client gets
what it would have got without."""

import asyncio
import json
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from r3mes_vllm.backend.app import create_app
from r3mes_vllm.carry import FRAMES, HEADER, RESUME, Past, Step, Unpacker
from r3mes_vllm.settings import load
from tests.backend.stand_ins import serving, wallet
from tests.conftest import Network

RESUMING = {HEADER: RESUME, "content-type": "application/json"}
CUTS = 4
"""Places at which each kind of answer breaks off."""
CHAT = "/v1/chat/completions"
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 20}, "n": {"type": "integer"}},
    "required": ["name", "n"],
}


def v1(**more: Any) -> dict[str, Any]:
    base = {
        "model": "legal",
        "messages": [{"role": "user", "content": "What is a contract?"}],
        "max_tokens": 60,
        "temperature": 0,
        "stream": True,
        "ignore_eos": True,
    }
    return base | more


def completion(**more: Any) -> dict[str, Any]:
    return {k: v for k, v in v1(prompt="say it", **more).items() if k != "messages"}


KINDS: dict[str, tuple[str, dict[str, Any], dict[str, str]]] = {
    "text": ("/chat", {"message": "hi", "lora_name": "legal", "max_tokens": 60}, {}),
    "chat events": (
        *("/chat", {"message": "hi", "lora_name": "medical", "max_tokens": 60}),
        {"accept": "text/event-stream"},
    ),
    "chat completion": (CHAT, v1(), {}),
    "base": (CHAT, v1(model="tiny-llama"), {}),
    "usage": (CHAT, v1(stream_options={"include_usage": True, "continuous_usage_stats": True}), {}),
    "token ids": (CHAT, v1(return_token_ids=True), {}),
    "tools": (CHAT, v1(tools=[WEATHER]), {}),
    "completion": ("/v1/completions", completion(), {}),
    "echo": ("/v1/completions", completion(echo=True), {}),
    "responses": (
        "/v1/responses",
        {"model": "legal", "input": "hi", "stream": True, "max_output_tokens": 40},
        {},
    ),
    # of these the engine must generate everything again
    "penalties": (CHAT, v1(presence_penalty=1.5, frequency_penalty=1.0), {}),
    "seed": (CHAT, v1(temperature=1.0, seed=7), {}),
    "schema": (
        CHAT,
        v1(
            max_tokens=200,
            response_format={
                "type": "json_schema",
                "json_schema": {"name": "it", "schema": SCHEMA},
            },
        ),
        {},
    ),
}

LOOSE: dict[str, tuple[str, dict[str, Any], dict[str, str]]] = {
    # a probability computed with the rest of the prompt differs in its last digits
    "logprobs": (CHAT, v1(logprobs=True, top_logprobs=2), {}),
}
STOPS = ("e", "ab", "xyz", " q")


@dataclass
class Breaking:
    """Passes a node's answers on, and breaks each off after so many of its bytes."""

    node_url: str
    asked: Callable[[], Awaitable[None]]
    """Called before a request goes on."""
    after: int = 0
    cuts: int = 0
    _left: int = 0

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        url = urlsplit(self.node_url)
        there, to_node = await asyncio.open_connection(url.hostname, url.port)
        asking = asyncio.create_task(self._ask(reader, to_node))
        try:
            while piece := await there.read(1 << 16):
                writer.write(piece[: self._left])
                await writer.drain()
                self._left -= min(len(piece), self._left)
                if not self._left:
                    self.cuts += 1
                    break
        except OSError:
            pass
        finally:
            asking.cancel()
            for each in (writer, to_node):
                each.close()

    async def _ask(self, reader: asyncio.StreamReader, to_node: asyncio.StreamWriter) -> None:
        """All requests of a connection: it is kept where an answer did not break off."""
        try:
            while piece := await reader.read(1 << 16):
                self._left = self.after
                await self.asked()
                to_node.write(piece)
        except OSError:
            return


@dataclass
class Moving:
    """A backend with two ways to one node, of which one is `breaking`."""

    http: httpx.AsyncClient
    node: dict[str, Any]
    """What both ways register."""
    breaking: Breaking = field(init=False)

    async def register(self, number: int, url: str) -> None:
        it = self.node | {"wallet_address": wallet(number), "endpoint_url": url}
        (await self.http.post("/api/serving-node/register", json=it)).raise_for_status()

    async def ask(
        self, path: str, asked: dict[str, Any], headers: dict[str, str], after: int
    ) -> tuple[bytes, bool]:
        """An answer that broke off after so many bytes from the node, and whether the client takes
        it for complete."""
        # until it is asked, the breaking way is the only one
        leaving = {"wallet_address": wallet(2)}
        await self.http.post("/api/serving-node/deregister", json=leaving)
        self.breaking.after, self.breaking.cuts = after, 0
        body, complete = b"", True
        try:
            async with self.http.stream("POST", path, json=asked, headers=headers) as answer:
                if answer.status_code == 502:  # it had not begun, and there was no other way
                    return await self.ask(path, asked, headers, after + 500)
                assert answer.status_code == 200, await answer.aread()
                async for piece in answer.aiter_raw():
                    body += piece
        except httpx.RemoteProtocolError:
            complete = False
        if not self.breaking.cuts and after > 1:  # it came in fewer events
            return await self.ask(path, asked, headers, after // 2)
        assert self.breaking.cuts
        return body, complete


@pytest.fixture
async def moving(network: Network, tmp_path: Path) -> AsyncIterator[Moving]:
    listed = httpx.get(f"{network.backend.url}/api/serving-node/list").json()["nodes"][0]
    node = {name: listed[name] for name in ("available_lora_list", "adapters", "base_model")}
    given = {
        "allow_private_nodes": True,
        "database_url": f"sqlite:///{tmp_path}/backend.sqlite3",
    }
    async with (
        serving(create_app(load(given))) as url,
        httpx.AsyncClient(base_url=url, timeout=60) as http,
    ):
        moving = Moving(http, node | {"version": "0"})
        moving.breaking = Breaking(network.node.url, lambda: moving.register(2, network.node.url))
        async with await asyncio.start_server(moving.breaking, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            await moving.register(1, f"http://127.0.0.1:{port}")
            yield moving


async def whole(network: Network, path: str, asked: Any, headers: dict[str, str]) -> bytes:
    """What the node says by itself."""
    async with httpx.AsyncClient(base_url=network.node.url, timeout=60) as http:
        return (await http.post(path, json=asked, headers=headers)).raise_for_status().content


async def framed_size(network: Network, path: str, asked: Any, headers: dict[str, str]) -> int:
    """Bytes of the answer that the node gives a backend."""
    return len(await whole(network, path, asked, headers | {HEADER: FRAMES}))


def told(answer: bytes) -> list[Any]:
    """What a client makes of it: the text, how it ended, the usage. How many tokens come in one
    event differs from time to time."""
    text = answer.decode()
    if "data: " not in text:
        return [text]
    said, usage = "", None
    ends: list[Any] = [text.count("data: [DONE]")]
    for line in text.splitlines():
        if not line.startswith("data: {"):
            continue
        event = json.loads(line.removeprefix("data: "))
        if isinstance(event.get("delta"), str):  # of /v1/responses
            said += event["delta"]
        said += event.get("text") or ""
        for choice in event.get("choices") or ():
            said += choice.get("text") or (choice.get("delta") or {}).get("content") or ""
            if choice.get("finish_reason"):
                ends += [choice["finish_reason"], choice.get("stop_reason")]
        if event.get("usage"):
            usage = {k: v for k, v in event["usage"].items() if k.endswith("tokens")}
        if "response" in event:
            whole = event["response"]
            parts = [it["content"][0]["text"] for it in whole.get("output") or ()]
            ends += [whole["status"], parts, whole["usage"] and whole["usage"]["total_tokens"]]
    return [said, ends, usage]


@pytest.mark.parametrize("kind", KINDS)
async def test_the_rest_is_the_same(network: Network, moving: Moving, kind: str) -> None:
    path, asked, headers = KINDS[kind]
    expected = told(await whole(network, path, asked, headers))
    size = await framed_size(network, path, asked, headers)
    chance = random.Random(kind)
    for _ in range(CUTS):
        after = chance.randrange(size)
        body, complete = await moving.ask(path, asked, headers, after)
        assert (told(body), complete) == (expected, True), f"cut after {after} bytes"


@pytest.mark.parametrize("stop", STOPS)
async def test_a_stop_string_across_the_break(network: Network, moving: Moving, stop: str) -> None:
    """Half of it may have come from the node that broke."""
    asked = v1(stop=[stop, "\x00\x00\x00"], max_tokens=120)
    expected = told(await whole(network, CHAT, asked, {}))
    size = await framed_size(network, CHAT, asked, {})
    for after in random.Random(stop).sample(range(size), CUTS):
        body, complete = await moving.ask(CHAT, asked, {}, after)
        assert (told(body), complete) == (expected, True), f"cut after {after} bytes"


async def test_logprobs_go_on(network: Network, moving: Moving) -> None:
    path, asked, headers = LOOSE["logprobs"]

    def tokens(answer: bytes) -> list[str]:
        lines = [it for it in answer.decode().splitlines() if it.startswith("data: {")]
        choices = [json.loads(it.removeprefix("data: "))["choices"] for it in lines]
        told = [it[0]["logprobs"]["content"] for it in choices if it and it[0].get("logprobs")]
        return [each["token"] for content in told for each in content]

    expected = tokens(await whole(network, path, asked, headers))
    assert len(expected) == asked["max_tokens"]
    size = await framed_size(network, path, asked, headers)
    for after in random.Random(1).sample(range(size), CUTS):
        body, complete = await moving.ask(path, asked, headers, after)
        assert (tokens(body), complete) == (expected, True)


async def test_several_answers_at_once_end_as_an_error(network: Network, moving: Moving) -> None:
    asked = v1(n=2, temperature=1)
    body, complete = await moving.ask(CHAT, asked, {}, 3000)
    assert not complete
    assert b"[DONE]" not in body
    assert body.endswith(b"\n\n")
    assert b"event: error\ndata: " in body


async def test_it_is_not_generated_again(network: Network) -> None:
    """What a node has is a part of the prompt: of 60 tokens the second generates the last 10."""

    def generated() -> float:
        text = httpx.get(f"{network.node.url}/metrics").text
        lines = [it for it in text.splitlines() if it.startswith("vllm:generation_tokens_total{")]
        return float(lines[0].rpartition(" ")[2])

    frames = Unpacker().feed(await whole(network, CHAT, v1(), {HEADER: FRAMES}))
    steps = [step for frame in frames for step in frame.steps or ()]
    tokens = [token for step in steps for token in step.tokens]
    assert len(tokens) == 60
    past = Past([Step(tokens[:50])])
    before = generated()
    async with httpx.AsyncClient(base_url=network.node.url, timeout=60) as http:
        content = past.pack(json.dumps(v1()).encode())
        again = await http.post(CHAT, content=content, headers=RESUMING)
    assert again.status_code == 200
    assert generated() - before == 10


@pytest.mark.parametrize(
    "past",
    [
        b"",
        b"{}\n",
        b"[]\n",
        b"nonsense\n",
        b'{"steps":[[[1000000]]],"text":""}\n',
        b'{"steps":[[[-1]]],"text":""}\n',
        b'{"steps":[[["a"]]],"text":""}\n',
        b'{"steps":{"a":1},"text":""}\n',
        b'{"steps":null,"text":5}\n',
        b'{"steps":null,"text":"' + b"word " * 1_000_000 + b'"}\n',
        b"[" * 100_000 + b"\n",
        b'{"steps":[[' + json.dumps([5] * 20_000).encode() + b']],"text":""}\n',
    ],
    ids=range(12),
)
@pytest.mark.parametrize("path", ["/chat", CHAT])
async def test_a_past_that_is_none(network: Network, path: str, past: bytes) -> None:
    asked = {"message": "hi", "lora_name": "legal"} if path == "/chat" else v1()
    async with httpx.AsyncClient(base_url=network.node.url, timeout=60) as http:
        content = past + json.dumps(asked).encode()
        answer = await http.post(path, content=content, headers=RESUMING)
    assert answer.status_code == 400
    message = answer.json()["error"]["message"]
    assert any(it in message for it in ("x-r3mes-carry", "vocabulary", "longer than"))
