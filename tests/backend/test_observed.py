"""Nothing that was said through the backend is told to anybody else, however a node breaks off."""

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from r3mes_vllm.carry import FRAMES, HEADER, Frame, Step
from tests.backend.stand_ins import LEGAL_CID, PATIENCE_S, wallet
from tests.programs import free_port, program

MARK = "planted"
PROMPT, SYSTEM, ANSWER, FAILURE = (
    f"{MARK}-{it} " * 8 for it in ("prompt", "system", "answer", "x")
)
KEY, WRONG_KEY, ADMIN, NODE_KEY, FALLBACK_KEY = KEYS = [
    f"{MARK}-{it}-key-6817" for it in ("client", "wrong", "admin", "node", "fallback")
]
WALLET = "remes1" + MARK + "a" * 31

_SAID = ANSWER.encode()
_REFUSAL = json.dumps({"error": {"message": FAILURE, "code": FAILURE}}).encode()
_EVENT = b'data: {"choices": [{"delta": {"content": "%b"}}]}\n\n' % _SAID
_ERROR = b"event: error\ndata: " + _REFUSAL + b"\n\n"
_TEXT, _EVENTS = ("Content-Type", "text/plain"), ("Content-Type", "text/event-stream")
_FRAMED = (HEADER, FRAMES)


def head(status: int, *headers: tuple[str, str]) -> bytes:
    lines = [f"HTTP/1.1 {status} x", *(f"{name}: {value}" for name, value in headers)]
    return "\r\n".join([*lines, "Transfer-Encoding: chunked", "", ""]).encode()


def chunks(*pieces: bytes) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(it), it) for it in pieces)


END = b"0\r\n\r\n"
BEGUN = head(200, _TEXT) + chunks(_SAID)
ANSWERS = {
    "whole": BEGUN + END,
    "whole-events": head(200, _EVENTS) + chunks(_EVENT, b"data: [DONE]\n\n") + END,
    "refused": head(400) + chunks(_REFUSAL) + END,
    "failed": head(500) + chunks(_REFUSAL) + END,
    "busy": head(503, ("Retry-After", FAILURE)) + chunks(_REFUSAL) + END,
    "redirected": head(302, ("Location", f"http://127.0.0.1/{FAILURE}")) + END,
    "error-event": head(200, _EVENTS) + chunks(_EVENT, _ERROR) + END,
    "breaks-off": BEGUN,
    "breaks-off-in-a-frame": head(200, _TEXT, _FRAMED)
    + chunks(Frame([Step([1])], _SAID).pack()[:-3])
    + END,
    "no-frames": head(200, _TEXT, _FRAMED) + chunks(_SAID) + END,
    "no-chunk": BEGUN + _SAID + b"\r\n",
    "no-chunks-end": BEGUN + b"2\r\n" + _SAID,
    "no-status": _SAID + b"\r\n\r\n",
    "odd-reason": b"HTTP/1.1 500 " + _SAID + b"\r\nContent-Length: 0\r\n\r\n",
    "no-header": b"HTTP/1.1 200 x\r\n" + _SAID + b"\r\n\r\n",
    "no-length": b"HTTP/1.1 200 x\r\nContent-Length: " + _SAID + b"\r\n\r\n",
    "packed-badly": head(200, _TEXT, ("Content-Encoding", "gzip")) + chunks(_SAID) + END,
    "another-adapter": head(200, _TEXT, ("X-R3MES-Adapter", ANSWER)) + chunks(_SAID) + END,
    "another-kind": head(200, ("Content-Type", ANSWER)) + chunks(_SAID) + END,
    "another-version": head(200, _TEXT, ("X-R3MES-CID", ANSWER)) + chunks(b"x" + _SAID) + END,
}
MOVED, NOWHERE = "moved", "nowhere"
"""An adapter of which one node goes on with what another began, and one that none holds."""
MOVERS = ["breaks-off", "no-chunk", "another-adapter", "another-kind", "another-version"]
SHOWN = ["/health", "/ready", "/metrics", "/", "/dashboard/data", "/v1/models"]
SHOWN += ["/api/lora/list", "/api/serving-node/list"]


@dataclass
class Raw:
    """Answers whatever it is asked with these bytes, in turn, and hangs up."""

    answers: list[bytes]
    asked: int = 0

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        length = head.partition(b"content-length: ")[2].partition(b"\r\n")[0]
        await reader.readexactly(int(length))
        writer.write(self.answers[self.asked % len(self.answers)])
        self.asked += 1
        writer.close()


@asynccontextmanager
async def listening(*nodes: Raw) -> AsyncIterator[list[str]]:
    """Their URLs."""
    async with AsyncExitStack() as until_end:
        servers = [await asyncio.start_server(it, "127.0.0.1", 0) for it in nodes]
        for server in servers:
            await until_end.enter_async_context(server)
        yield [f"http://127.0.0.1:{it.sockets[0].getsockname()[1]}" for it in servers]


def asked(name: str, turn: int) -> list[tuple[str, dict[str, Any], dict[str, str]]]:
    """Path, body and headers of each way to ask for an adapter."""
    prompt = f"{PROMPT}{turn}"  # who answers a conversation goes on with it
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": prompt}]
    chat = {"message": prompt, "lora_name": name, "wallet_address": WALLET}
    v1 = {"model": name, "messages": messages}
    return [
        ("/chat", chat, {"X-Wallet-Address": WALLET}),
        ("/chat", chat, {"Accept": "text/event-stream"}),
        ("/chat", chat | {"stream": False}, {}),
        ("/v1/chat/completions", v1, {}),
        ("/v1/chat/completions", v1 | {"stream": True}, {}),
        ("/v1/completions", {"model": name, "prompt": prompt, "stream": True}, {}),
    ]


MISTAKES: list[tuple[str, bytes]] = [
    ("/chat", b"{" + PROMPT.encode()),
    ("/chat", json.dumps({"message": {"text": PROMPT}}).encode()),
    ("/chat", json.dumps({"message": PROMPT, "lora_name": PROMPT}).encode()),
    ("/chat", json.dumps({"message": PROMPT, "lora_name": "whole", "max_tokens": PROMPT}).encode()),
    ("/v1/chat/completions", json.dumps({"model": PROMPT, "messages": PROMPT}).encode()),
    ("/v1/completions", b'{"model": "whole", "prompt": "' + PROMPT.encode()),
    ("/v1/embeddings", json.dumps({"model": [PROMPT], "input": PROMPT}).encode()),
    ("/api/lora/register", json.dumps({"name": PROMPT, "ipfs_hash": PROMPT}).encode()),
    ("/api/serving-node/register", json.dumps({"wallet_address": PROMPT}).encode()),
    ("/api/serving-node/heartbeat", json.dumps({"wallet_address": WALLET}).encode()),
    (f"/{MARK}", b""),
]


@dataclass
class Told:
    """By a backend with every log on, after all that was asked of it."""

    log: str
    statuses: Counter[int]
    bodies: list[str]
    """With their headers."""
    shown: dict[str, str]
    """By path, to somebody else."""


async def tell(folder: Path, *, fallback: bool) -> Told:
    told = Told("", Counter(), [], {})
    nodes = {name: Raw([answer]) for name, answer in ANSWERS.items()}
    elsewhere = Raw(list(ANSWERS.values()))
    url = f"http://127.0.0.1:{(port := free_port())}"
    env = {
        "R3MES_API_KEYS": KEY,
        "R3MES_ADMIN_KEY": ADMIN,
        "R3MES_DATABASE_URL": f"sqlite:///{folder / 'backend.sqlite3'}",
    }
    arguments = ["backend", "--port", str(port), "--allow-private-nodes"]
    async with AsyncExitStack() as until_end:
        *urls, other = await until_end.enter_async_context(listening(*nodes.values(), elsewhere))
        if fallback:
            env |= {"R3MES_FALLBACK_URL": other, "R3MES_FALLBACK_KEY": FALLBACK_KEY}
            env |= {"R3MES_FALLBACK_MODEL": "big"}
        backend = until_end.enter_context(
            program(folder, *arguments, url=url, env=env, module="tests.backend.talkative")
        )
        await asyncio.to_thread(backend.wait_for, "/health", 60)
        http = httpx.AsyncClient(base_url=url, trust_env=False, timeout=PATIENCE_S)
        await until_end.enter_async_context(http)

        async def post(path: str, key: str, content: bytes, **headers: str) -> None:
            sent = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"} | headers
            async with http.stream("POST", path, content=content, headers=sent) as answer:
                told.statuses[answer.status_code] += 1
                body = str(answer.headers)
                with suppress(httpx.RemoteProtocolError, httpx.DecodingError):
                    async for piece in answer.aiter_text():
                        body += piece
                told.bodies.append(body)

        for number, (name, node_url) in enumerate(zip(nodes, urls, strict=True), 1):
            node = {"wallet_address": wallet(number), "endpoint_url": node_url}
            more = {
                "available_lora_list": [name, *[MOVED] * (name in MOVERS)],
                "access_key": NODE_KEY,
                "version": "0.2.0",
            }
            answer = await http.post("/api/serving-node/register", json=node | more)
            assert answer.status_code == 200, answer.text
        for name in ("whole", NOWHERE):
            lora = {"name": name, "ipfs_hash": LEGAL_CID}
            await post("/api/lora/register", ADMIN, json.dumps(lora).encode())
        for turn, name in enumerate([*[MOVED] * 10, *ANSWERS, *[NOWHERE] * 10]):
            for path, body, headers in asked(name, turn):
                await post(path, KEY, json.dumps(body).encode(), **headers)
        for path, content in MISTAKES:
            for key in (KEY, ADMIN, WRONG_KEY):
                await post(path, key, content)
        for path in SHOWN:
            answer = await http.get(path, headers={"X-API-Key": KEY})
            assert answer.status_code == 200
            told.shown[path] = answer.text
        assert all(it.asked for it in nodes.values())
        assert bool(elsewhere.asked) is fallback
    told.log = backend.output()
    return told


@pytest.fixture(scope="module", params=[False, True], ids=["nodes", "with-a-fallback"])
def told(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Told:
    return asyncio.run(tell(tmp_path_factory.mktemp("observed"), fallback=request.param))


def test_nothing_that_was_said_is_in_the_log(told: Told) -> None:
    assert "DEBUG:httpcore" in told.log  # at its most talkative
    assert "gave no answer" in told.log
    assert "broke off" in told.log
    assert not [it for it in told.log.splitlines() if MARK in it]


@pytest.mark.parametrize("path", SHOWN)
def test_nothing_that_was_said_is_shown_to_others(told: Told, path: str) -> None:
    assert MARK not in told.shown[path]


def test_no_answer_tells_a_key(told: Told) -> None:
    assert {200, 400, 401, 404, 502} <= told.statuses.keys()
    assert any(_SAID.decode() in it for it in told.bodies)  # what is asked for is told
    assert not [it for it in told.bodies for key in KEYS if key in it]
