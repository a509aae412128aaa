"""What answers when no holder of an adapter does."""

import asyncio
import gzip
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx
import openai
import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from r3mes_vllm.backend import elsewhere
from r3mes_vllm.backend.dial import Timeouts
from r3mes_vllm.backend.events import read_events
from r3mes_vllm.backend.lately import Lately
from r3mes_vllm.backend.refusals import NodeFailed
from r3mes_vllm.backend.server import warnings
from r3mes_vllm.carry import FRAMES, HEADER, Frame, Step
from r3mes_vllm.errors import ConfigError
from r3mes_vllm.settings import load
from tests.backend.conftest import StartBackend, StartNode
from tests.backend.elsewhere import DONE, EVENTS, STREAM, TEXT, USAGE, Elsewhere, chunk, completion
from tests.backend.framing import TEXT as FRAMED_TEXT
from tests.backend.framing import Framing
from tests.backend.stand_ins import (
    LEGAL_CID,
    LEGAL_CID_V0,
    OTHER_CID,
    PATIENCE_S,
    Behaviour,
    DiesAfter,
    Network,
    StandIn,
    answers,
    streams,
    unused_port,
    wallet,
)
from tests.backend.test_moving import Falls, ask
from tests.backend.test_openai import client_of

CHAT = {"message": "hi", "lora_name": "legal"}
V1 = {"model": "legal", "messages": [{"role": "user", "content": "hi"}], "stream": True}
OURS: dict[str, Any] = {"version": "0.2.0"}
BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"


async def with_url(
    start_backend: StartBackend, start_node: StartNode, server: Any, **settings: Any
) -> Network:
    """A backend that falls back on `server`, and has an adapter `legal` that no node holds."""
    url = await start_node(server)
    network = await start_backend(fallback_url=url, **settings)
    await network.register_lora("legal")
    return network


async def count(network: Network, metric: str) -> float:
    lines = (await network.http.get("/metrics")).text.splitlines()
    found = [it for it in lines if it.startswith(f"r3mes_backend_{metric} ")]
    return float(found[0].rpartition(" ")[2]) if found else 0.0


class TestUrl:
    """An OpenAI-compatible server."""

    async def test_openais_client(self, start_backend: StartBackend, start_node: StartNode) -> None:
        server = Elsewhere()
        network = await with_url(
            start_backend, start_node, server, fallback_key="secret", api_keys=["ours"]
        )
        messages: Any = [{"role": "user", "content": "contract?"}]
        async with client_of(network, "ours") as client:
            raw = await client.chat.completions.with_raw_response.create(
                model="legal", messages=messages
            )
            parsed = raw.parse()
            stream = await client.chat.completions.create(
                model="legal", messages=messages, stream=True
            )
            text = [it.choices[0].delta.content or "" async for it in stream if it.choices]
        assert parsed.choices[0].message.content == "".join(text) == TEXT
        assert parsed.model == "big"
        assert raw.headers["x-r3mes-fallback"] == "url"
        assert raw.headers["x-r3mes-fallback-model"] == "big"
        assert server.fields["model"] == "big"
        assert server.fields["messages"] == messages
        for seen in (*server.seen, *server.listed):
            assert seen.header("authorization") == ["Bearer secret"]

    async def test_what_crosses(self, start_backend: StartBackend, start_node: StartNode) -> None:
        async def chatty(request: Request) -> Response:
            headers = {
                "Set-Cookie": "a=b",
                "X-R3MES-CID": LEGAL_CID,
                "X-R3MES-Node": wallet(1),
                "OpenAI-Organization": "the operator's",
                "X-RateLimit-Remaining": "1",
            }
            return JSONResponse(completion(), headers=headers)

        server = Elsewhere(chatty)
        network = await with_url(start_backend, start_node, server)
        sent = {
            "Authorization": "Bearer a-clients",
            "Cookie": "a=b",
            "X-Wallet-Address": wallet(1),
            "X-Adapter": "legal",
            "X-Request-Id": "abc-1",
        }
        body = CHAT | {"stream": False, "wallet_address": wallet(1)}
        answer = await network.http.post("/chat", json=body, headers=sent)
        assert answer.status_code == 200
        crossed = {name for name in answer.headers if name.startswith(("x-r", "openai", "set-"))}
        assert crossed == {"x-r3mes-fallback", "x-r3mes-fallback-model", "x-request-id"}
        assert answer.headers["content-security-policy"]
        (seen,) = server.seen
        assert seen.header("x-request-id") == ["abc-1"]
        for name in ("authorization", "cookie", "x-wallet-address", "x-adapter", "x-r3mes-carry"):
            assert not seen.header(name)
        assert wallet(1).encode() not in seen.body

    @pytest.mark.parametrize(
        ("models", "given", "used"),
        [
            (["big", "legal"], None, "legal"),
            (["big", "small"], None, "big"),
            (["big", "small"], "small", "small"),
            ([], "unlisted", "unlisted"),
        ],
    )
    async def test_which_model(
        self,
        start_backend: StartBackend,
        start_node: StartNode,
        models: list[str],
        given: str | None,
        used: str,
    ) -> None:
        server = Elsewhere(models=models)
        network = await with_url(start_backend, start_node, server, fallback_model=given)
        for path, body in (("/chat", CHAT), ("/v1/chat/completions", V1)):
            answer = await network.http.post(path, json=body)
            assert answer.status_code == 200
            assert answer.headers["x-r3mes-fallback-model"] == used
            assert server.fields["model"] == used
        assert len(server.listed) == (0 if given else 1)

    async def test_chat_as_text(self, start_backend: StartBackend, start_node: StartNode) -> None:
        network = await with_url(start_backend, start_node, Elsewhere())
        answer = await network.http.post("/chat", json=CHAT)
        assert (answer.status_code, answer.text) == (200, TEXT)
        assert answer.headers["content-type"] == "text/plain; charset=utf-8"
        assert await count(network, 'fallback_answers_total{kind="url"}') == 1

    async def test_text_that_is_none(
        self, start_backend: StartBackend, start_node: StartNode
    ) -> None:
        server = Elsewhere(streams(chunk("a\ud800"), DONE, media_type=EVENTS), ["b\r\nü"])
        network = await with_url(start_backend, start_node, server)
        answer = await network.http.post("/chat", json=CHAT)
        assert (answer.status_code, answer.text) == (200, "a?")
        assert answer.headers["x-r3mes-fallback-model"] == "b???"

    async def test_chat_as_events(self, start_backend: StartBackend, start_node: StartNode) -> None:
        server = Elsewhere()
        network = await with_url(start_backend, start_node, server)
        answer = await network.http.post("/chat", json=CHAT, headers={"Accept": EVENTS})
        data = [it.removeprefix("data: ") for it in answer.text.split("\n\n") if it]
        texts = [json.loads(it)["text"] for it in data[:-2]]
        assert "".join(texts) == TEXT
        assert json.loads(data[-2]) == {"finish_reason": "stop", "usage": USAGE}
        assert data[-1] == "[DONE]"
        assert server.fields["stream_options"] == {"include_usage": True}

    async def test_chat_as_json(self, start_backend: StartBackend, start_node: StartNode) -> None:
        network = await with_url(start_backend, start_node, Elsewhere())
        answer = await network.http.post("/chat", json=CHAT | {"stream": False})
        assert answer.json() == {
            "response": TEXT,
            "lora_name": None,
            "cid": None,
            "usage": USAGE,
            "finish_reason": "stop",
        }

    async def test_a_chat_in_openais_words(
        self, start_backend: StartBackend, start_node: StartNode
    ) -> None:
        server = Elsewhere()
        network = await with_url(start_backend, start_node, server)
        await network.register_lora("legal", system_prompt="Be brief.")
        history = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        asked = {"messages": history, "temperature": 0.5, "stop": ["x"], "seed": 3, "top_p": 0.9}
        await network.http.post("/chat", json=CHAT | asked)
        assert server.seen[-1].path == "/v1/chat/completions"
        assert server.fields == {
            "model": "big",
            "messages": [
                {"role": "system", "content": "Be brief."},
                *history,
                {"role": "user", "content": "hi"},
            ],
            "max_tokens": 512,
            "stream": True,
        } | {name: it for name, it in asked.items() if name != "messages"}

    @pytest.mark.parametrize(
        ("path", "body"),
        [
            ("/v1/completions", {"prompt": "x"}),
            ("/v1/embeddings", {"input": "x"}),
            ("/v1/responses", {"input": "x"}),
        ],
    )
    async def test_other_routes(
        self, start_backend: StartBackend, start_node: StartNode, path: str, body: dict[str, Any]
    ) -> None:
        server = Elsewhere(answers(200, {"object": "x", "error": None, "data": [1.5]}))
        network = await with_url(start_backend, start_node, server)
        answer = await network.http.post(path, json=body | {"model": "legal", "user": "x"})
        assert answer.json() == {"object": "x", "error": None, "data": [1.5]}
        assert (server.seen[0].path, server.fields) == (path, body | {"model": "big", "user": "x"})

    async def test_responses_as_events(
        self, start_backend: StartBackend, start_node: StartNode
    ) -> None:
        events = [b'event: a\ndata: {"type":"response.output_text.delta","delta":"x"}\n\n']
        last = b'event: b\ndata: {"type":"response.completed","response":{"error":null}}\n\n'
        server = Elsewhere(streams(*events, last, media_type=EVENTS))
        network = await with_url(start_backend, start_node, server)
        asked = {"model": "legal", "input": "x", "stream": True}
        answer = await network.http.post("/v1/responses", json=asked)
        assert answer.content == events[0] + last
        server.behaviour = streams(*events, media_type=EVENTS)
        with pytest.raises(httpx.RemoteProtocolError):
            await network.http.post("/v1/responses", json=asked)

    async def test_whatever_the_pieces(
        self, start_backend: StartBackend, start_node: StartNode
    ) -> None:
        whole = b"".join(STREAM).replace(b"\n", b"\r\n")
        behaviour = streams(*(whole[n : n + 3] for n in range(0, len(whole), 3)), media_type=EVENTS)
        network = await with_url(start_backend, start_node, Elsewhere(behaviour))
        answer = await network.http.post("/v1/chat/completions", json=V1)
        assert answer.content == whole.removeprefix(b": processing\r\n\r\n")

    async def test_each_piece_arrives_before_the_next_is_sent(
        self, start_backend: StartBackend, start_node: StartNode
    ) -> None:
        may_go_on, left = asyncio.Semaphore(0), asyncio.Event()

        async def behaviour(request: Request) -> Response:
            async def body() -> AsyncIterator[bytes]:
                try:
                    for piece in STREAM[1:]:
                        yield piece
                        await may_go_on.acquire()
                except asyncio.CancelledError:
                    left.set()
                    raise

            return StreamingResponse(body(), media_type=EVENTS)

        network = await with_url(start_backend, start_node, Elsewhere(behaviour))
        async with network.http.stream("POST", "/chat", json=CHAT) as answer:
            pieces = answer.aiter_text()
            assert await asyncio.wait_for(anext(pieces), PATIENCE_S) == "An "
            may_go_on.release()
            assert await asyncio.wait_for(anext(pieces), PATIENCE_S) == "agree"
        await asyncio.wait_for(left.wait(), PATIENCE_S)

    async def test_a_packed_answer_is_unpacked(
        self, start_backend: StartBackend, start_node: StartNode
    ) -> None:
        async def packs(request: Request) -> Response:
            packed = gzip.compress(json.dumps(completion()).encode())
            return Response(packed, 200, {"content-encoding": "gzip"}, "application/json")

        server = Elsewhere(packs)
        network = await with_url(start_backend, start_node, server)
        answer = await network.http.post("/chat", json=CHAT | {"stream": False})
        assert answer.json()["response"] == TEXT
        assert server.seen[0].header("accept-encoding") == ["identity"]

    @pytest.mark.parametrize("status", [400, 413, 422])
    async def test_a_clients_mistake_is_passed_on(
        self, start_backend: StartBackend, start_node: StartNode, status: int
    ) -> None:
        wrong: dict[str, object] = {"error": {"message": "temperature: too hot", "code": 1}}
        network = await with_url(start_backend, start_node, Elsewhere(answers(status, wrong)))
        openais = await network.http.post("/v1/chat/completions", json=V1)
        assert (openais.status_code, openais.json()) == (status, wrong)
        ours = await network.http.post("/chat", json=CHAT)
        told = {"code": "bad_request", "message": "temperature: too hot", "hint": ""}
        assert (ours.status_code, ours.json()) == (status, {"error": told})
        assert ours.headers["x-r3mes-fallback"] == "url"

    async def test_it_may_be_on_a_private_address(
        self, start_backend: StartBackend, start_node: StartNode
    ) -> None:
        network = await with_url(start_backend, start_node, Elsewhere(), allow_private_nodes=False)
        assert (await network.http.post("/chat", json=CHAT)).text == TEXT

    async def test_a_chat_for_nobody_in_particular(
        self, start_backend: StartBackend, start_node: StartNode
    ) -> None:
        network = await with_url(start_backend, start_node, Elsewhere())
        assert (await network.http.post("/chat", json={"message": "hi"})).text == TEXT

    async def test_a_base_model_that_was_here(
        self, start_backend: StartBackend, start_node: StartNode
    ) -> None:
        network = await with_url(start_backend, start_node, Elsewhere())
        await network.register("http://127.0.0.1:9", "listed-once", base_model=BASE)
        network.clock.forward(61)
        for model in (BASE, "listed-once"):
            answer = await network.http.post("/v1/chat/completions", json=V1 | {"model": model})
            assert answer.headers["x-r3mes-fallback"] == "url"

    async def test_a_name_that_nobody_knows(
        self, start_backend: StartBackend, start_node: StartNode
    ) -> None:
        server = Elsewhere(models=["nonsense"])
        network = await with_url(start_backend, start_node, server)
        for path, name in (("/chat", "lora_name"), ("/v1/chat/completions", "model")):
            answer = await network.http.post(path, json=CHAT | V1 | {name: "nonsense"})
            assert answer.status_code == 404
        assert not server.seen

    async def test_it_is_no_node(self, start_backend: StartBackend, start_node: StartNode) -> None:
        network = await with_url(start_backend, start_node, Elsewhere())
        await network.http.post("/chat", json=CHAT)
        assert await network.wallets() == []
        assert (await network.http.get("/v1/models")).json()["data"] == []
        assert (await network.http.get("/health")).json()["nodes"] == 0
        assert await count(network, "live_nodes") == 0


async def dies_at_once(request: Request) -> Response:
    return DiesAfter(headers={"content-type": EVENTS})


async def is_slow(request: Request) -> Response:
    await asyncio.sleep(60)
    return Response()


async def is_badly_packed(request: Request) -> Response:
    return Response(b"hello", headers={"content-encoding": "gzip"}, media_type=EVENTS)


async def refuses_with_a_page(request: Request) -> Response:
    return Response("<html>", 400, media_type="text/html")


PAGE = streams(b"<html>", media_type="text/html")
NO_ANSWERS: dict[str, Behaviour] = {
    "dies": dies_at_once,
    "slow": is_slow,
    "page": PAGE,
    "page that refuses": refuses_with_a_page,
    "badly packed": is_badly_packed,
    "not streamed": answers(200, completion()),
    "nothing": streams(chunk(), chunk("", "stop"), DONE, media_type=EVENTS),
    "empty": streams(media_type=EVENTS),
    "error": streams(b'data: {"error": {"message": "x"}}\n\n', DONE, media_type=EVENTS),
    "no json": streams(b"data: hello\n\n", DONE, media_type=EVENTS),
    "no object": streams(b"data: [1]\n\n", DONE, media_type=EVENTS),
    "deep": streams(b"data: " + b"[" * 100_000 + b"\n\n", DONE, media_type=EVENTS),
} | {str(status): answers(status, {"error": "x"}) for status in (401, 402, 403, 404, 429, 500, 503)}


class TestUrlFails:
    @pytest.mark.parametrize("way", NO_ANSWERS)
    async def test_before_it_has_begun(
        self, start_backend: StartBackend, start_node: StartNode, way: str
    ) -> None:
        server = Elsewhere(NO_ANSWERS[way])
        patience = Timeouts(first_byte=0.5 if way == "slow" else PATIENCE_S)
        network = await with_url(start_backend, start_node, server, timeouts=patience)
        answer = await network.http.post("/chat", json=CHAT)
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "adapter_not_ready"
        assert "no node that holds it is alive" in answer.json()["error"]["message"]
        assert answer.headers["retry-after"]
        assert server.seen
        assert await count(network, 'fallback_failures_total{kind="url"}') == 1

    @pytest.mark.parametrize("twin", [False, True])
    async def test_with_a_redirect(
        self, start_backend: StartBackend, start_node: StartNode, twin: bool
    ) -> None:
        secret = Elsewhere()
        url = f"{await start_node(secret)}/v1/chat/completions"

        async def redirects(request: Request) -> Response:
            return Response(status_code=307, headers={"location": url})

        server = Elsewhere(redirects)
        network = await with_url(start_backend, start_node, server)
        if twin:  # a client that follows it is led there
            async with httpx.AsyncClient(trust_env=False, follow_redirects=True) as following:
                await following.post(await start_node(server), json=V1)
        else:
            assert (await network.http.post("/chat", json=CHAT)).status_code == 503
        assert bool(secret.seen) is twin

    @pytest.mark.parametrize(
        "body",
        [
            b"hello",
            b"[1]",
            b"{}",
            b'{"choices": [{}]}',
            json.dumps(completion(error={"message": "x"})).encode(),
            json.dumps(completion()).replace('"stop"', '"abort"').encode(),
        ],
    )
    async def test_with_json_that_says_nothing(
        self, start_backend: StartBackend, start_node: StartNode, body: bytes
    ) -> None:
        server = Elsewhere(streams(body, media_type="application/json"))
        network = await with_url(start_backend, start_node, server)
        answer = await network.http.post("/chat", json=CHAT | {"stream": False})
        assert answer.status_code == 503

    async def test_with_too_long_an_answer(
        self,
        start_backend: StartBackend,
        start_node: StartNode,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        network = await with_url(start_backend, start_node, Elsewhere())
        asked = CHAT | {"stream": False}
        assert (await network.http.post("/chat", json=asked)).status_code == 200
        monkeypatch.setattr(elsewhere, "_LONGEST", 100)
        assert (await network.http.post("/chat", json=asked)).status_code == 503

    async def test_with_an_endless_event(self) -> None:
        sent = 0

        async def pieces() -> AsyncIterator[bytes]:
            nonlocal sent
            while sent < 100:
                sent += 1
                yield b"x" * (1 << 20)

        with pytest.raises(NodeFailed, match="over"):
            await anext(read_events(pieces()))
        assert sent < 10

    async def test_without_models(self, start_backend: StartBackend, start_node: StartNode) -> None:
        network = await with_url(start_backend, start_node, Elsewhere(models=[]))
        assert (await network.http.post("/chat", json=CHAT)).status_code == 503

    async def test_nowhere(self, start_backend: StartBackend) -> None:
        network = await start_backend(fallback_url=f"http://127.0.0.1:{unused_port()}")
        await network.register_lora("legal")
        assert (await network.http.post("/chat", json=CHAT)).status_code == 503

    async def test_by_leading_back_here(
        self, start_backend: StartBackend, start_node: StartNode
    ) -> None:
        async def leads_back(request: Request) -> Response:
            headers = {
                k: v for k, v in request.headers.items() if k.startswith(("x-", "content-t"))
            }
            path, body = request.url.path, await request.body()
            answer = await network.http.post(path, content=body, headers=headers)
            return Response(answer.content, answer.status_code)

        server = Elsewhere(leads_back)
        network = await with_url(start_backend, start_node, server, fallback_model="legal")
        assert (await network.http.post("/chat", json=CHAT)).status_code == 503
        assert len(server.seen) == 1


WORD = chunk("An ")
HALVES: dict[str, Behaviour] = {
    "dies": lambda request: _dying(WORD, chunk("agree")),
    "dies within an event": lambda request: _dying(WORD, chunk("agree")[:-5]),
    "ends as if whole": streams(WORD, chunk("agree"), media_type=EVENTS),
    "error": streams(WORD, b'data: {"error": {"message": "x"}}\n\n' + DONE, media_type=EVENTS),
    "named error": streams(WORD, b"event: error\ndata: {}\n\n" + DONE, media_type=EVENTS),
    "abort": streams(WORD, chunk("", "abort"), DONE, media_type=EVENTS),
    "garbage": streams(WORD, b"data: {]\n\n", DONE, media_type=EVENTS),
    "silent": lambda request: _silent(WORD),
}


async def _dying(*pieces: bytes) -> Response:
    return DiesAfter(*pieces, headers={"content-type": EVENTS})


async def _silent(*pieces: bytes) -> Response:
    return Falls(DiesAfter(*pieces, headers={"content-type": EVENTS}))


@pytest.mark.parametrize("way", HALVES)
@pytest.mark.parametrize("form", ["text", "events", "openai"])
async def test_half_an_answer_is_never_whole(
    start_backend: StartBackend, start_node: StartNode, way: str, form: str
) -> None:
    patience = Timeouts(between_bytes=0.5 if way == "silent" else PATIENCE_S)
    server = Elsewhere(HALVES[way])
    order = {"timeouts": patience, "fallback": "url,on-demand"}
    network = await with_url(start_backend, start_node, server, **order)
    node = StandIn(Framing())  # it must not go on with what another model began
    await network.register(await start_node(node), "medical", **OURS)
    path, body = ("/v1/chat/completions", V1) if form == "openai" else ("/chat", CHAT)
    headers = {"Accept": EVENTS} if form == "events" else {}
    answer = await ask(network, path, body, **headers)
    assert (answer.status, answer.complete) == (200, False)
    assert b"An " in answer.body
    assert b"[DONE]" not in answer.body
    if form != "text":
        assert answer.body.endswith(b"\n\n")
        assert answer.body.split(b"\n\n")[-2].startswith(b"event: error\ndata: ")
    assert await count(network, 'fallback_failures_total{kind="url"}') == 1
    assert not node.seen


class TestAfterHolders:
    async def test_a_holder_comes_first(
        self, start_backend: StartBackend, start_node: StartNode
    ) -> None:
        server = Elsewhere()
        network = await with_url(start_backend, start_node, server)
        await network.register(await start_node(StandIn()), "legal")
        answer = await network.http.post("/chat", json=CHAT)
        assert (answer.text, "x-r3mes-fallback" in answer.headers) == ("hello", False)
        assert not server.seen

    @pytest.mark.parametrize(
        "behaviour",
        [answers(503, {"error": "full"}), answers(404, {"error": "lost"}), dies_at_once],
        ids=["full", "lost it", "dies"],
    )
    async def test_it_fails(
        self, start_backend: StartBackend, start_node: StartNode, behaviour: Behaviour
    ) -> None:
        network = await with_url(start_backend, start_node, Elsewhere())
        for number in (1, 2):
            url = await start_node(StandIn(behaviour))
            await network.register(url, "legal", number=number)
        answer = await network.http.post("/chat", json=CHAT)
        assert (answer.text, answer.headers["x-r3mes-fallback"]) == (TEXT, "url")

    async def test_it_is_slow(self, start_backend: StartBackend, start_node: StartNode) -> None:
        patience = Timeouts(first_byte=0.5)
        network = await with_url(start_backend, start_node, Elsewhere(), timeouts=patience)
        await network.register(await start_node(StandIn(is_slow)), "legal")
        assert (await network.http.post("/chat", json=CHAT)).text == TEXT

    async def test_one_breaks_off_and_the_other_is_full(
        self, start_backend: StartBackend, start_node: StartNode
    ) -> None:
        async def half(request: Request) -> Response:
            headers = {HEADER: FRAMES, "content-type": "text/plain"}
            return DiesAfter(Frame([Step([0])], b"To").pack()[:-1], headers=headers)

        network = await with_url(start_backend, start_node, Elsewhere())
        for number, behaviour in enumerate((half, answers(503, {}))):
            url = await start_node(StandIn(behaviour))
            await network.register(url, "legal", number=number)
        for _ in range(12):  # either may be the first
            assert (await network.http.post("/chat", json=CHAT)).text == TEXT

    async def test_what_it_said_is_passed_on_if_nobody_answers(
        self, start_backend: StartBackend, start_node: StartNode
    ) -> None:
        server = Elsewhere(answers(500, {}))
        network = await with_url(start_backend, start_node, server)
        full = answers(503, {"error": "full"}, retry_after="3")
        await network.register(await start_node(StandIn(full)), "legal")
        answer = await network.http.post("/chat", json=CHAT)
        assert (answer.status_code, answer.json()) == (503, {"error": "full"})
        assert answer.headers["retry-after"] == "3"
        assert "x-r3mes-fallback" not in answer.headers
        assert server.seen

    async def test_a_clients_mistake_is_no_reason(
        self, start_backend: StartBackend, start_node: StartNode
    ) -> None:
        server = Elsewhere()
        network = await with_url(start_backend, start_node, server)
        await network.register(await start_node(StandIn(answers(400, {"error": "x"}))), "legal")
        assert (await network.http.post("/chat", json=CHAT)).status_code == 400
        assert not server.seen

    async def test_a_node_can_not_say_that_it_is_none(
        self, network: Network, start_node: StartNode
    ) -> None:
        marked = {"x_r3mes_fallback": "local", "x_r3mes_fallback_model": "x"}
        await network.register(await start_node(StandIn(answers(200, {}, **marked))), "legal")
        answer = await network.http.post("/chat", json=CHAT)
        assert not [name for name in answer.headers if name.startswith("x-r3mes-fallback")]


def loads(cid: str = LEGAL_CID) -> Behaviour:
    """As a node that has loaded the adapter."""
    return answers(200, {"response": "loaded"}, x_r3mes_cid=cid, x_r3mes_adapter="legal")


class TestOnDemand:
    async def test_a_node_of_ours_is_asked_to_load_it(
        self, network: Network, start_node: StartNode
    ) -> None:
        node = StandIn(loads())
        await network.register_lora("legal", LEGAL_CID_V0)  # the other spelling
        await network.register(await start_node(node), "medical", **OURS)
        for path, body in (("/chat", CHAT), ("/v1/completions", {"model": "legal"})):
            answer = await network.http.post(path, json=body)
            assert (answer.status_code, answer.json()) == (200, {"response": "loaded"})
            assert answer.headers["x-r3mes-node"] == wallet(1)
            assert "x-r3mes-fallback" not in answer.headers
        assert json.loads(node.seen[0].body) == CHAT
        assert node.seen[0].header("x-adapter") == ["legal"]
        assert await count(network, 'fallback_answers_total{kind="on-demand"}') == 2

    @pytest.mark.parametrize(
        ("registered", "lora"),
        [
            ({}, {}),
            (OURS | {"base_model": "Other"}, {"base_model": BASE}),
            (OURS | {"available_lora_list": ["legal"], "adapters": {"legal": OTHER_CID}}, {}),
            (OURS | {"status": "draining"}, {}),
        ],
        ids=["an old node", "another base model", "another version", "draining"],
    )
    async def test_others_are_not(
        self,
        network: Network,
        start_node: StartNode,
        registered: dict[str, Any],
        lora: dict[str, Any],
    ) -> None:
        node = StandIn(loads())
        await network.register_lora("legal", **lora)
        status = registered.get("status", "active")
        await network.register(await start_node(node), **registered)
        if status != "active":
            await network.beat(status=status)
        assert (await network.http.post("/chat", json=CHAT)).status_code == 503
        assert not node.seen

    @pytest.mark.parametrize("base_model", [None, BASE, BASE.rpartition("/")[2].upper()])
    async def test_the_same_base_model_under_another_name(
        self, network: Network, start_node: StartNode, base_model: str | None
    ) -> None:
        await network.register_lora("legal", base_model=BASE)
        url = await start_node(StandIn(loads()))
        await network.register(url, base_model=base_model, **OURS)
        assert (await network.http.post("/chat", json=CHAT)).status_code == 200

    async def test_only_in_the_registrys_version(
        self, network: Network, start_node: StartNode
    ) -> None:
        node = StandIn(loads())
        await network.register_lora("legal", OTHER_CID)
        await network.register_lora("legal", LEGAL_CID)
        await network.register(await start_node(node), "listed-once", number=1)
        await network.beat(status="offline")
        await network.register(await start_node(node), number=2, **OURS)
        for name, status in (
            (f"legal@{LEGAL_CID}", 200),
            (f"legal@{OTHER_CID}", 503),
            ("listed-once", 503),
            ("nonsense", 404),
        ):
            answer = await network.http.post("/v1/completions", json={"model": name})
            assert answer.status_code == status
        assert len(node.seen) == 1

    @pytest.mark.parametrize(
        "behaviour",
        [
            answers(404, {"error": "it does not load on demand"}),
            answers(422, {"error": "refused"}),
            answers(503, {"error": "it is being loaded"}),
            answers(500, {}),
            loads(OTHER_CID),
            answers(200, {"response": "by the base model"}),
            dies_at_once,
        ],
        ids=["404", "422", "503", "500", "another version", "no version", "dies"],
    )
    async def test_no_other_answer_will_do(
        self, network: Network, start_node: StartNode, behaviour: Behaviour
    ) -> None:
        await network.register_lora("legal")
        node = StandIn(behaviour)
        await network.register(await start_node(node), number=1, **OURS)
        answer = await network.http.post("/chat", json=CHAT)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "adapter_not_ready")
        assert node.seen
        for number in range(2, 4):
            await network.register(await start_node(StandIn(loads())), number=number, **OURS)
        assert (await network.http.post("/chat", json=CHAT)).json() == {"response": "loaded"}

    async def test_a_clients_mistake_is_passed_on(
        self, network: Network, start_node: StartNode
    ) -> None:
        await network.register_lora("legal")
        await network.register(await start_node(StandIn(answers(400, {"error": "x"}))), **OURS)
        assert (await network.http.post("/chat", json=CHAT)).status_code == 400

    async def test_a_few_are_asked_and_always_the_same(
        self, network: Network, start_node: StartNode
    ) -> None:
        await network.register_lora("legal")
        nodes = [StandIn(loads()) for _ in range(6)]
        for number, node in enumerate(nodes):
            await network.register(await start_node(node), number=number, **OURS)
        for _ in range(6):
            await network.http.post("/chat", json=CHAT)
        assert sorted(len(node.seen) for node in nodes) == [0] * 5 + [6]
        for node in nodes:
            node.behaviour = answers(404, {})
            node.seen.clear()
        for asked in (3, 6, 6):  # who would not is left alone for a while
            assert (await network.http.post("/chat", json=CHAT)).status_code == 503
            assert sum(len(node.seen) for node in nodes) == asked

    @pytest.mark.parametrize("order", ["on-demand", "url"])
    async def test_one_goes_on_with_a_stream(
        self, start_backend: StartBackend, start_node: StartNode, order: str
    ) -> None:
        network = await start_backend(fallback=order)
        await network.register_lora("legal")
        dying, other = Framing(dies_after=3), Framing()
        held = {"adapters": {"legal": LEGAL_CID}}
        await network.register(await start_node(StandIn(dying)), "legal", number=1, **held, **OURS)
        await network.register(await start_node(StandIn(other)), number=2, **OURS)
        answer = await ask(network, "/chat", CHAT)
        assert answer.first == wallet(1)
        assert answer.complete is (order == "on-demand")
        assert (answer.body.decode() == FRAMED_TEXT) is answer.complete
        assert len(other.past) == answer.complete

    async def test_one_that_began_is_followed_by_another(
        self, network: Network, start_node: StartNode
    ) -> None:
        await network.register_lora("legal")
        nodes = [Framing(dies_after=3), Framing(dies_after=6), Framing()]
        for number, node in enumerate(nodes):
            await network.register(await start_node(StandIn(node)), number=number, **OURS)
        answer = await ask(network, "/chat", CHAT)
        assert (answer.body.decode(), answer.complete) == (FRAMED_TEXT, True)

    def test_lately(self) -> None:
        now = 0.0
        lately = Lately(10, lambda: now)
        lately.note("x")
        assert "x" in lately
        assert "y" not in lately
        now = 10.0
        assert "x" not in lately


class TestOrder:
    @pytest.mark.parametrize(
        ("order", "body"),
        [
            (None, "loaded"),
            ("on-demand,url", "loaded"),
            ("url,on-demand", TEXT),
            ("url", TEXT),
            ("on-demand", "loaded"),
            ("local", None),
            ([], None),
        ],
    )
    async def test_it_is_the_operators(
        self,
        start_backend: StartBackend,
        start_node: StartNode,
        order: str | list[str] | None,
        body: str | None,
    ) -> None:
        given = {} if order is None else {"fallback": order}
        network = await with_url(start_backend, start_node, Elsewhere(), **given)
        await network.register(await start_node(StandIn(loads())), **OURS)
        answer = await network.http.post("/chat", json=CHAT | {"stream": False})
        if body is None:
            assert answer.status_code == 503
        else:
            assert answer.json()["response"] == body

    async def test_the_next_one_is_tried(
        self, start_backend: StartBackend, start_node: StartNode
    ) -> None:
        server = Elsewhere(answers(500, {}))
        network = await with_url(start_backend, start_node, server, fallback="url,on-demand")
        await network.register(await start_node(StandIn(loads())), **OURS)
        assert (await network.http.post("/chat", json=CHAT)).json()["response"] == "loaded"
        assert server.seen


async def test_while_a_fallback_answers_nothing_of_the_refusal_is_under_way(
    start_backend: StartBackend, start_node: StartNode
) -> None:
    """Else a node that only says no would seem to give as many answers at once."""
    asked, go_on = asyncio.Semaphore(0), asyncio.Event()

    async def slowly(request: Request) -> Response:
        asked.release()
        await go_on.wait()
        return await streams(*STREAM, media_type=EVENTS)(request)

    network = await with_url(start_backend, start_node, Elsewhere(slowly))
    full = StandIn(answers(503, {"error": "full"}))
    await network.register(await start_node(full), "legal")
    assert network.app
    backend = network.app.state.backend
    asking = [asyncio.create_task(network.http.post("/chat", json=CHAT)) for _ in range(4)]
    for _ in asking:
        await asyncio.wait_for(asked.acquire(), PATIENCE_S)
    [node] = await backend.live_nodes()
    load = backend.balancer._load(node)
    assert (len(full.seen), load.in_flight, load.width(time.monotonic())) == (4, 0, 1)
    go_on.set()
    assert [it.text for it in await asyncio.gather(*asking)] == [TEXT] * 4


@pytest.mark.parametrize("status", [503, 500])
async def test_a_refusal_without_end_is_none(
    start_backend: StartBackend, start_node: StartNode, status: int
) -> None:
    async def endless(request: Request) -> Response:
        async def body() -> AsyncIterator[bytes]:
            while True:
                yield b"no " * 1024
                await asyncio.sleep(0)

        return StreamingResponse(body(), status)

    network = await with_url(start_backend, start_node, Elsewhere())
    await network.register(await start_node(StandIn(endless)), "legal")
    assert (await network.http.post("/chat", json=CHAT)).text == TEXT


class TestSettings:
    @pytest.mark.parametrize(
        "url",
        ["http://", "http://u:secret@h", "http://h/v1?key=secret", "ftp://h", "http://h:x/v1"],
    )
    async def test_a_wrong_url(self, start_backend: StartBackend, url: str) -> None:
        with pytest.raises(ConfigError, match="fallback_url") as caught:
            await start_backend(fallback_url=url)
        assert "secret" not in f"{caught.value} {caught.value.hint}"

    @pytest.mark.parametrize(
        ("given", "path"),
        [("", "/v1"), ("/", "/v1"), ("/v1/", "/v1"), ("/openai/v1", "/openai/v1"), ("/x", "/x")],
    )
    async def test_the_path(
        self, start_backend: StartBackend, start_node: StartNode, given: str, path: str
    ) -> None:
        server = Elsewhere()
        network = await start_backend(fallback_url=f"{await start_node(server)}{given}")
        await network.register_lora("legal")
        assert (await network.http.post("/chat", json=CHAT)).text == TEXT
        assert server.seen[0].path == f"{path}/chat/completions"
        assert server.listed[0].path == f"{path}/models"

    def test_the_key_is_in_no_error(self) -> None:
        with pytest.raises(ConfigError, match="fallback_key") as caught:
            load({"fallback_key": ["secret"]})
        assert "secret" not in str(caught.value)

    def test_a_wrong_order(self) -> None:
        with pytest.raises(ConfigError, match="'elsewhere'"):
            load({"fallback": "url,elsewhere"})

    def test_what_does_nothing_is_said(self) -> None:
        assert warnings(load({"fallback_url": "https://h", "with_local_model": "x"})) == []
        said = warnings(load({"fallback": "", "fallback_url": "http://127.0.0.1"}))
        assert "fallback_url does nothing" in said[0]
        assert "without fallback_url" in warnings(load({"fallback_key": "secret"}))[0]
        (said_of_http,) = warnings(load({"fallback_url": "http://server.example"}))
        assert "not https" in said_of_http


@pytest.mark.parametrize("stream", [True, False])
async def test_openais_client_knows_a_broken_answer(
    start_backend: StartBackend, start_node: StartNode, stream: bool
) -> None:
    async def dying(request: Request) -> Response:
        kind = EVENTS if stream else "application/json"
        return DiesAfter(WORD if stream else b'{"choices', headers={"content-type": kind})

    network = await with_url(start_backend, start_node, Elsewhere(dying))
    async with client_of(network) as client:
        messages: Any = [{"role": "user", "content": "hi"}]
        create = client.chat.completions.create

        async def whole() -> None:
            answer: Any = await create(model="legal", messages=messages, stream=stream)
            _ = [it async for it in answer]

        with pytest.raises((openai.APIError, httpx.RemoteProtocolError)):
            await whole()
