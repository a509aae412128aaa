"""A real node behind a real backend: real vLLM on the CPU, adapters of random weights."""

import asyncio
import json
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests import tiny
from tests.conftest import HEARTBEAT_S, Network
from tests.programs import program, wait_until

QUESTION = "What is a contract?"
MESSAGES = [{"role": "user", "content": QUESTION}]


@pytest.fixture(params=["node", "backend"])
def url(request: pytest.FixtureRequest, network: Network) -> str:
    """Each test that takes this runs against the node and through the backend."""
    program = network.node if request.param == "node" else network.backend
    return program.url


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


def ask(client: openai.OpenAI, model: str, *, tokens: int = 16) -> str:
    answer = client.chat.completions.create(
        model=model,
        messages=MESSAGES,  # type: ignore[arg-type]
        temperature=0,
        max_tokens=tokens,
    )
    assert answer.model == model.partition("@")[0]
    return answer.choices[0].message.content or ""


def cids(network: Network) -> dict[str, str]:
    models = httpx.get(f"{network.node.url}/v1/models").json()["data"]
    return {model["id"]: model["cid"] for model in models if "cid" in model}


def test_startup_says_what_a_person_wants_to_know(network: Network) -> None:
    said = network.node.output()
    assert "LoRA adapters initialized: legal (baf" in said
    assert f"Inference server listening on {network.node.url}" in said
    assert f"registered with {network.backend.url} as {network.node.url}" in said
    for phase in ("base model: ", "adapters: 2 verified", "engine: started"):
        line = next(line for line in said.splitlines() if line.startswith(phase))
        assert line.endswith(" s)")


def test_models_are_listed_with_parent_and_cid_and_no_path(
    client: openai.OpenAI, network: Network
) -> None:
    listed = {model.id: model for model in client.models.list()}
    assert set(listed) == {tiny.NAME, "legal", "medical"}
    assert (listed["legal"].model_extra or {})["parent"] == tiny.NAME
    assert (listed["legal"].model_extra or {})["cid"] == cids(network)["legal"]
    assert str(network.folder) not in str(listed)


def test_each_model_answers_for_itself(client: openai.OpenAI) -> None:
    answers = {ask(client, model) for model in (tiny.NAME, "legal", "medical")}
    assert len(answers) == 3


def test_a_stream_is_the_whole_answer(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="legal",
        messages=MESSAGES,  # type: ignore[arg-type]
        temperature=0,
        max_tokens=16,
        stream=True,
    )
    parts = [chunk.choices[0].delta.content or "" for chunk in stream]  # type: ignore[union-attr]
    assert "".join(parts) == ask(client, "legal")
    assert len(parts) > 4


def test_a_name_with_its_cid_is_that_version_and_no_other(
    client: openai.OpenAI, network: Network
) -> None:
    cid = cids(network)["legal"]
    assert ask(client, f"legal@{cid}") == ask(client, "legal")
    # 404 at the node; the backend's 503 says that no live node has that version
    with pytest.raises((openai.NotFoundError, openai.InternalServerError)):
        ask(client, f"legal@{cids(network)['medical']}")


def test_mistakes_are_typed_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="nobody"):
        ask(client, "nobody")
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.chat.completions.create(
            model="legal",
            messages=MESSAGES,  # type: ignore[arg-type]
            temperature=-1,
        )
    with pytest.raises(openai.BadRequestError, match="over the limit") as caught:
        client.chat.completions.create(
            model="legal",
            messages=MESSAGES,  # type: ignore[arg-type]
            n=9,
        )
    assert caught.value.param == "n"


async def test_in_a_mixed_batch_each_gets_what_it_gets_alone(network: Network) -> None:
    """Both adapter slots are taken: stock vLLM gives the base's rows the last slot's adapter."""

    async with httpx.AsyncClient(base_url=network.node.url, timeout=120) as client:

        async def answer(model: str, number: int) -> str:
            body = {
                "model": model,
                "prompt": f"{number} is",
                "temperature": 0,
                "max_tokens": 12,
                "ignore_eos": True,
            }
            response = await client.post("/v1/completions", json=body)
            return str(response.json()["choices"][0]["text"])

        asked = [(model, n) for n in range(6) for model in (tiny.NAME, "legal", "medical")]
        alone = [await answer(*one) for one in asked]
        together = await asyncio.gather(*(answer(*one) for one in asked))
    wrong = [one for one, a, b in zip(asked, alone, together, strict=True) if a != b]
    assert not wrong


class TestChat:
    def test_text(self, url: str, network: Network) -> None:
        body = {"message": QUESTION, "lora_name": "medical", "temperature": 0, "max_tokens": 8}
        answer = httpx.post(f"{url}/chat", json=body)
        assert answer.headers["content-type"] == "text/plain; charset=utf-8"
        assert answer.headers["transfer-encoding"] == "chunked"
        assert answer.headers["x-r3mes-adapter"] == "medical"
        assert answer.headers["x-r3mes-cid"] == cids(network)["medical"]
        assert answer.headers["x-request-id"]
        whole = httpx.post(f"{url}/chat", json=body | {"stream": False})
        assert whole.json()["response"] == answer.text

    def test_json(self, url: str, network: Network) -> None:
        body = {"message": QUESTION, "adapter_name": "legal", "max_tokens": 8, "stream": False}
        answer = httpx.post(f"{url}/chat", json=body).json()
        assert answer["lora_name"] == "legal"
        assert answer["cid"] == cids(network)["legal"]
        assert answer["finish_reason"] in ("length", "stop")
        assert answer["usage"]["completion_tokens"] <= 8

    def test_events(self, url: str) -> None:
        body = {"message": QUESTION, "lora_name": "legal", "temperature": 0, "max_tokens": 8}
        answer = httpx.post(f"{url}/chat", json=body, headers={"Accept": "text/event-stream"})
        assert answer.headers["content-type"].startswith("text/event-stream")
        events = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
        assert events[-1] == "[DONE]"
        assert json.loads(events[-2])["usage"]["completion_tokens"] <= 8
        text = "".join(json.loads(event)["text"] for event in events[:-2])
        assert text == httpx.post(f"{url}/chat", json=body).text

    @pytest.mark.parametrize(
        ("message", "adapter"),
        [
            ("Is my CONTRACT valid?", "legal"),
            ("Shall I see a doctor?", "medical"),
            ("a medical contract", "legal"),
            ("debug my doctor", "medical"),
            ("hello", "legal"),
        ],
    )
    def test_without_a_name_the_words_choose(self, url: str, message: str, adapter: str) -> None:
        # exactly what the existing backend sends
        body = {"message": message, "wallet_address": "remes1" + "a" * 38}
        with httpx.stream("POST", f"{url}/chat", json=body) as answer:
            assert answer.headers["x-r3mes-adapter"] == adapter

    def test_a_double_slash_is_the_same_route(self, network: Network) -> None:
        body = {"message": QUESTION, "max_tokens": 4}
        assert httpx.post(f"{network.node.url}//chat", json=body).status_code == 200

    def test_history_is_part_of_the_prompt(self, url: str) -> None:
        body = {
            "messages": [*MESSAGES, {"role": "assistant", "content": "An agreement."}],
            "message": "And a tort?",
            "max_tokens": 8,
            "temperature": 0,
            "stream": False,
        }
        with_history = httpx.post(f"{url}/chat", json=body).json()["usage"]["prompt_tokens"]
        del body["messages"]
        without = httpx.post(f"{url}/chat", json=body).json()["usage"]["prompt_tokens"]
        assert with_history > without

    def test_an_unknown_name_is_404(self, url: str) -> None:
        answer = httpx.post(f"{url}/chat", json={"message": QUESTION, "lora_name": "nobody"})
        assert answer.status_code == 404
        assert "nobody" in answer.json()["error"]["message"]

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("message", ""),
            ("message", 5),
            ("temperature", -1),
            ("temperature", "warm"),
            ("max_tokens", 0),
            ("max_tokens", 10**9),
            ("top_p", 2),
            ("seed", 10**30),
            ("stop", {"a": 1}),
            ("stop", ["x"] * 17),
            ("messages", [5]),
            ("message", "word " * 5000),
        ],
    )
    def test_a_bad_field_is_400(self, network: Network, field: str, value: object) -> None:
        body = {"message": QUESTION, "lora_name": "legal"} | {field: value}
        answer = httpx.post(f"{network.node.url}/chat", json=body)
        assert answer.status_code == 400
        assert answer.json()["error"]["message"]

    @pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff", b'{"message": "\\ud800"}'])
    def test_a_body_that_is_no_json_object_is_400(self, network: Network, body: bytes) -> None:
        assert httpx.post(f"{network.node.url}/chat", content=body).status_code == 400

    def test_a_body_over_the_limit_is_413(self, network: Network) -> None:
        answer = httpx.post(f"{network.node.url}/chat", content=bytes(9 << 20))
        assert answer.status_code == 413

    def endless(self, network: Network) -> dict[str, Any]:
        """A request whose answer, text all the way, ends at its limit of tokens: one that repeats
        itself goes on doing so."""
        for number in range(50):
            body: dict[str, Any] = {
                "message": f"say {number}",
                "temperature": 0,
                "max_tokens": 900,
            }
            answer = httpx.post(
                f"{network.node.url}/chat", json=body | {"stream": False}, timeout=60
            )
            if not answer.is_success or answer.json()["finish_reason"] != "length":
                continue
            if len(answer.json()["response"]) > 400:
                return body | {"max_tokens": 8000}
        raise AssertionError("every answer ended early")

    def test_a_client_that_leaves_frees_the_engine(self, network: Network) -> None:
        def metric(name: str) -> float:
            lines = httpx.get(f"{network.node.url}/metrics").text.splitlines()
            line = next(it for it in lines if it.startswith(f"vllm:{name}{{"))
            return float(line.rpartition(" ")[2])

        asked = self.endless(network)
        body = json.dumps(asked)
        before = metric("generation_tokens_total")
        host = httpx.URL(network.node.url)
        head = f"POST /chat HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        with ExitStack() as leaving:  # several: one may be answered before it is looked at
            for _ in range(8):
                connection = socket.create_connection((host.host, host.port or 0))
                leaving.enter_context(connection).sendall((head + body).encode())
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
        wait_until(lambda: metric("num_requests_running") == 0, 1, "the requests to end")
        assert 0 < metric("generation_tokens_total") - before < 8 * asked["max_tokens"]


class TestDoors:
    @pytest.mark.parametrize(
        ("method", "path"),
        [
            ("POST", "/invocations"),
            ("POST", "/v1/load_lora_adapter"),
            ("POST", "/v1/unload_lora_adapter"),
            ("POST", "/tokenize"),
            ("POST", "/detokenize"),
            ("POST", "/inference/v1/generate"),
            ("GET", "/docs"),
            ("GET", "/openapi.json"),
            ("GET", "/version"),
            ("GET", "/load"),
            ("POST", "/ping"),
            ("POST", "/scale_elastic_ep"),
            ("GET", "/static/x"),
            ("GET", "/metrics/x"),
        ],
    )
    def test_what_vllm_mounts_is_closed(self, network: Network, method: str, path: str) -> None:
        answer = httpx.request(method, network.node.url + path, json={})
        assert answer.status_code == 404
        assert "there is no" in answer.json()["error"]["message"]

    def test_an_idle_connection_outlasts_the_clients_patience(self, network: Network) -> None:
        """Else a request may meet the node's closing of it: httpx keeps one for 5 s."""
        where = httpx.URL(network.node.url)
        with closing(HTTPConnection(where.host, where.port, timeout=20)) as connection:
            connection.connect()
            socket_at_first = connection.sock
            for pause in (5.5, 0):
                connection.request("GET", "/ready")
                answer = connection.getresponse()
                assert (answer.status, answer.read()) == (200, b'{"ready":true}')
                time.sleep(pause)
            assert connection.sock is socket_at_first, "it would connect again by itself"

    def test_health_and_readiness(self, network: Network) -> None:
        health = httpx.get(f"{network.node.url}/health").json()
        assert health["status"] == "ok"
        assert health["available_loras"] == ["legal", "medical"]
        assert httpx.get(f"{network.node.url}/ready").json() == {"ready": True}

    def test_the_adapters_are_shown_without_their_paths(self, network: Network) -> None:
        answer = httpx.get(f"{network.node.url}/adapters")
        served = [it["name"] for it in answer.json()["adapters"] if it["names"]]
        assert served == ["legal", "medical"]
        assert str(network.folder) not in answer.text


class TestBackendAway:
    """These restart the session's backend and leave it running."""

    def listed(self, network: Network) -> bool:
        answer = httpx.get(f"{network.backend.url}/api/serving-node/list", params={"lora": "legal"})
        return bool(answer.json()["count"])

    def restart(self, network: Network, arguments: tuple[str, ...]) -> float:
        network.backend.process.kill()
        network.backend.process.wait()
        answer = httpx.post(f"{network.node.url}/chat", json={"message": "x", "max_tokens": 2})
        assert answer.status_code == 200  # it serves meanwhile
        again = program(network.folder, *arguments, url=network.backend.url)
        network.backend = network.keep(again)
        network.backend.wait_for("/health", 30)
        return time.monotonic()

    def test_a_restarted_backend_has_the_node_back_within_two_beats(self, network: Network) -> None:
        up = self.restart(network, network.backend_arguments)
        wait_until(lambda: self.listed(network), 10, "the node to be listed")
        assert time.monotonic() - up < 2 * HEARTBEAT_S * 1.1 + 0.5

    def test_a_backend_that_forgot_the_node_has_it_back_within_two_beats(
        self, network: Network, tmp_path: Path
    ) -> None:
        *others, _ = network.backend_arguments
        up = self.restart(network, (*others, f"sqlite:///{tmp_path / 'empty.sqlite3'}"))
        wait_until(lambda: self.listed(network), 10, "the node to be listed")
        assert time.monotonic() - up < 2 * HEARTBEAT_S * 1.1 + 0.5
