"""What a real node tells its operator: metrics, one id for each request, lines, and nothing of what
was said."""

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests import tiny
from tests.conftest import NODE_STARTS_S, Network
from tests.programs import Program, free_port, program, wait_until

DOC = (Path(__file__).parents[2] / "docs" / "node.md").read_text()

PROMPT, SYSTEM, ANSWER, KEY, WRONG_KEY, ADMIN = (
    f"planted-{what}-{number}"
    for number, what in enumerate(
        ("prompt", "system", "answer", "key", "wrong-key", "admin"), start=6817
    )
)
WALLET = "remes1" + "planted" + "a" * 31
PLANTED = (PROMPT, SYSTEM, ANSWER, KEY, WRONG_KEY, ADMIN, WALLET)
FORCED: dict[str, Any] = {"structured_outputs": {"choice": [ANSWER]}, "max_tokens": 60}
"""The model answers with what is planted, and nothing else."""
BROKEN_CALL = "<tool_call>{" + ANSWER
SAMPLED = {"temperature": 2, "seed": 6824, "ignore_eos": True}


def metrics(url: str, **headers: str) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
    """Ours, by family and labels."""
    text = httpx.get(f"{url}/metrics", headers=headers).text
    return {
        family.name: {
            (("", it.name), *sorted(it.labels.items())): it.value for it in family.samples
        }
        for family in text_string_to_metric_families(text)
        if family.name.startswith("r3mes_")
    }


def value(url: str, name: str, **labels: str) -> float:
    family = re.sub("_(total|sum|count)$", "", name)
    found = metrics(url)[family]
    return found.get((("", name), *sorted(labels.items())), 0.0)


def test_the_documented_metrics_are_the_nodes(network: Network) -> None:
    body = {"message": "What is a contract?", "lora_name": "legal", "max_tokens": 4}
    assert httpx.post(f"{network.node.url}/chat", json=body).status_code == 200
    table = DOC.split("## Metrics")[1].split("\n## ")[0]
    documented = {
        name: set(re.findall(r"`([a-z]+)`", labels))
        for name, labels in re.findall(r"^\| `(r3mes_[a-z_]+)` \|([^|]*)\|", table, re.MULTILINE)
    }
    shown = metrics(network.node.url)
    assert documented.keys() == shown.keys()
    for name, samples in shown.items():
        for labels in samples:
            assert {label for label, _ in labels} - {"", "le"} == documented[name], name


def test_what_the_node_does_by_itself_is_counted(network: Network) -> None:
    shown = metrics(network.node.url)
    phases = {dict(labels)["phase"] for labels in shown["r3mes_adapter_load_seconds"]}
    assert {"stage", "place"} <= phases
    url = network.node.url
    assert value(url, "r3mes_adapter_loads_total", outcome="done") >= 2
    assert value(url, "r3mes_canary_checks_total", kind="token", outcome="well") >= 1
    wait_until(lambda: value(url, "r3mes_heartbeats_total", outcome="accepted") > 1, 10, "a beat")
    assert 0 <= value(url, "r3mes_heartbeat_age_seconds") < 60


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("through", ["node", "backend"])
def test_tokens_and_times_are_counted(network: Network, stream: bool, through: str) -> None:
    url = network.node.url
    names = [f"r3mes_adapter_{it}" for it in ("prompt_tokens_total", "generated_tokens_total")]
    names += [f"r3mes_adapter_{it}_seconds_count" for it in ("first_token", "queue")]
    before = [value(url, name, adapter="medical") for name in names]
    requests = value(url, "r3mes_adapter_requests_total", adapter="medical", outcome="complete")
    body: dict[str, Any] = {
        "model": "medical",
        "messages": [{"role": "user", "content": "What is a fever?"}],
        "max_tokens": 12,
        "n": 2,
        "temperature": 1,  # of two greedy answers vLLM makes none
        "ignore_eos": True,
        "stream": stream,
        **({"stream_options": {"include_usage": True}} if stream else {}),
    }
    program = network.node if through == "node" else network.backend
    answer = httpx.post(f"{program.url}/v1/chat/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    text = answer.text.rstrip().split("\n\n")[-2].removeprefix("data: ") if stream else answer.text
    usage = json.loads(text)["usage"]
    assert usage["completion_tokens"] == 24

    def ended() -> bool:
        now = value(url, "r3mes_adapter_requests_total", adapter="medical", outcome="complete")
        return now == requests + 1

    wait_until(ended, 10, "its end to be counted")
    grown = [
        value(url, name, adapter="medical") - was for name, was in zip(names, before, strict=True)
    ]
    assert grown == [usage["prompt_tokens"], 24, 1, 1]
    assert value(url, "r3mes_adapter_requests_running", adapter="medical") == 0


@pytest.mark.parametrize("through", ["node", "backend"])
@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "/chat", {"message": "hello", "max_tokens": 2}),
        ("POST", "/chat", {"message": 5}),
        ("POST", "/v1/completions", {"model": "legal", "prompt": "hello", "max_tokens": 2}),
        ("POST", "/v1/completions", {"model": "nobody", "prompt": "hello"}),
        ("POST", "/v1/completions", {"model": "legal", "prompt": "x " * 5000}),
        ("GET", "/nowhere", None),
        ("GET", "/health", None),
        ("GET", "/metrics", None),
    ],
)
def test_every_answer_carries_the_id_that_was_sent(
    network: Network, through: str, method: str, path: str, body: Any
) -> None:
    program = network.node if through == "node" else network.backend
    answer = httpx.request(
        method, program.url + path, json=body, headers={"X-Request-Id": "mine-1"}
    )
    assert answer.headers.get_list("x-request-id") == ["mine-1"]


@pytest.mark.parametrize("through", ["node", "backend"])
def test_vllm_names_its_request_by_the_same_id(network: Network, through: str) -> None:
    program = network.node if through == "node" else network.backend
    body = {"model": "legal", "prompt": "hello", "max_tokens": 2}
    answer = httpx.post(
        f"{program.url}/v1/completions", json=body, headers={"X-Request-Id": "mine-2"}
    )
    assert "mine-2" in answer.json()["id"]


@dataclass
class Asked:
    """A node with every log on, and what it answered to requests with planted texts."""

    node: Program
    statuses: dict[str, int]
    bodies: dict[str, str]
    lines: list[dict[str, Any]]

    @property
    def answers(self) -> list[str]:
        """That nobody could foresee."""
        return [said(text) for id_, text in self.bodies.items() if id_.startswith("sampled")]

    @property
    def planted(self) -> list[str]:
        return [*PLANTED, *(piece for text in self.answers for piece in pieces(text))]


@pytest.fixture(scope="module")
def asked(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Asked]:
    folder = tmp_path_factory.mktemp("observed")
    url = f"http://127.0.0.1:{(port := free_port())}"
    adapter = tiny.make_adapter(folder / "legal", seed=0)
    with program(
        folder,
        *("--debug", "serve", "--loras", f"legal={adapter}", "--model", str(tiny_model)),
        *("--backend-url", f"http://127.0.0.1:{free_port()}"),
        *("--host", "127.0.0.1", "--port", str(port), "--log-json"),
        *("--", "--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
        url=url,
        env={
            "VLLM_LOGGING_LEVEL": "DEBUG",
            "R3MES_API_KEYS": KEY,
            "R3MES_ADMIN_KEY": ADMIN,
        },
    ) as node:
        node.wait_for("/ready", NODE_STARTS_S)
        statuses, bodies = plant(url)
        wanted = len(statuses)
        wait_until(lambda: len(lines_of(node)) >= wanted, 10, "a line for each request")
        yield Asked(node, statuses, bodies, lines_of(node))


def lines_of(node: Program) -> list[dict[str, Any]]:
    return [json.loads(it) for it in node.output().splitlines() if it.startswith('{"time"')]


def chat(**more: Any) -> dict[str, Any]:
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": PROMPT}]
    return {"model": "legal", "messages": messages, "max_tokens": 3} | more


def said(body: str) -> str:
    """The text of an answer, whole or in events."""
    parts = [it.removeprefix("data: ") for it in body.split("\n") if '"choices":' in it]
    if not parts:
        return body
    choices = [choice for it in parts for choice in json.loads(it)["choices"]]
    texts = [it.get("delta") or it.get("message") or {"content": it.get("text")} for it in choices]
    return "".join(it.get("content") or "" for it in texts)


def pieces(text: str) -> list[str]:
    """Each so long that nobody else says it."""
    found = [text[start : start + 16] for start in range(0, len(text) - 15, 8)]
    return [it for it in found if len(set(it)) > 5]


def plant(url: str) -> tuple[dict[str, int], dict[str, str]]:
    """Ask in every way that may be logged; status and body of each answer by the request's id."""
    v1, completions = "/v1/chat/completions", "/v1/completions"
    tools = {"tools": [{"type": "function", "function": {"name": "x", "parameters": {}}}]}
    broken_call = FORCED | tools | {"structured_outputs": {"choice": [BROKEN_CALL]}}
    bodies: list[tuple[str, Any]] = [
        ("/chat", {"message": PROMPT, "lora_name": "legal", "max_tokens": 3}),
        ("/chat", {"message": PROMPT, "wallet_address": WALLET, "stream": False, "max_tokens": 3}),
        ("/chat", {"message": {"text": PROMPT}}),
        ("/chat", {"message": PROMPT, "lora_name": PROMPT}),
        ("/chat", {"message": PROMPT * 500}),
        (v1, chat()),
        (v1, chat(stream=True)),
        (v1, chat(model=PROMPT)),
        (v1, chat(temperature=PROMPT)),
        (v1, chat(messages=PROMPT)),
        (v1, chat(messages=[{"role": "user", "content": {"a": PROMPT}}])),
        (v1, chat(messages=[{"role": PROMPT, "content": PROMPT}])),
        (v1, chat(messages=[{"role": "user", "content": [{"type": PROMPT, "text": PROMPT}]}])),
        (v1, chat(messages=[{"role": "user", "content": PROMPT * 500}])),
        (v1, chat(max_tokens=-1)),
        (v1, chat(tools=[{"type": "function", "function": {"name": PROMPT}}], tool_choice=PROMPT)),
        (v1, chat(response_format={"type": "json_schema", "json_schema": {"name": PROMPT}})),
        (v1, chat(structured_outputs={"regex": f"[{PROMPT}"})),
        (v1, chat(structured_outputs={"grammar": PROMPT})),
        (v1, chat(structured_outputs={"json": {"type": PROMPT}})),
        (v1, chat(**{PROMPT: PROMPT})),
        (v1, chat(logit_bias={PROMPT: 1})),
        (v1, chat(chat_template="{{ raise_exception('" + PROMPT + "') }}")),
        (v1, chat(continue_final_message=True, add_generation_prompt=True)),
        (completions, {"model": "legal", "prompt": PROMPT, "max_tokens": 3, "stop": [PROMPT]}),
        (completions, {"model": "legal", "prompt": {"a": PROMPT}}),
        (completions, {"model": "legal", "prompt": [[PROMPT]]}),
        *((v1, chat(**FORCED, stream=stream)) for stream in (False, True)),
        *((v1, chat(**broken_call, stream=stream)) for stream in (False, True)),
        (v1, chat(**FORCED, logprobs=True, top_logprobs=2)),
        (v1, chat(**FORCED, stop=[ANSWER[-3:]])),
        (completions, {"model": "legal", "prompt": PROMPT, "echo": True, **FORCED}),
        (completions, {"model": "legal", "prompt": PROMPT, "stream": True, **FORCED}),
        ("/v1/responses", {"model": "legal", "input": PROMPT, "max_output_tokens": 3}),
        ("/v1/responses", {"model": "legal", "input": [{"type": PROMPT, "role": SYSTEM}]}),
        ("/v1/responses", {"model": "legal", "input": PROMPT, "instructions": {"a": SYSTEM}}),
        ("/v1/embeddings", {"model": "legal", "input": PROMPT}),
        ("/adapters", {"name": PROMPT, "cid": PROMPT}),
        (f"/{PROMPT}", {}),
    ]
    raw = [b"{" + PROMPT.encode(), b'{"prompt": "' + PROMPT.encode(), b'"' + PROMPT.encode() + b'"']
    statuses: dict[str, int] = {}
    answers: dict[str, str] = {}
    with httpx.Client(base_url=url, timeout=60) as client:

        def post(path: str, key: str, content: bytes, name: str = "r") -> None:
            headers = {
                "Authorization": f"Bearer {key}",
                "X-Request-Id": (id_ := f"{name}{len(statuses)}"),
                "Content-Type": "application/json",
                "X-Wallet-Address": WALLET,
            }
            answer = client.post(path, content=content, headers=headers)
            statuses[id_], answers[id_] = answer.status_code, answer.text

        for path, body in bodies:
            post(path, ADMIN if path == "/adapters" else KEY, json.dumps(body).encode())
            post(path, WRONG_KEY, json.dumps(body).encode())
        for path in ("/chat", v1, completions, "/v1/responses", "/adapters"):
            for content in raw:
                post(path, ADMIN if path == "/adapters" else KEY, content)
        more = SAMPLED | {"max_tokens": 60}
        for path, body in (
            ("/chat", more | {"message": PROMPT, "lora_name": "legal"}),
            (v1, chat(**more)),
            (v1, chat(**more, stream=True)),
            (completions, more | {"model": "legal", "prompt": PROMPT}),
            (completions, more | {"model": "legal", "prompt": PROMPT, "stream": True}),
        ):
            post(path, KEY, json.dumps(body).encode(), "sampled")
    return statuses, answers


def quoted(text: str, planted: list[str]) -> list[str]:
    """What of that is in the text, in whatever way it is written."""
    return [
        it
        for it in planted
        for written in {it, repr(it)[1:-1], json.dumps(it)[1:-1]}
        if written in text
    ]


def test_what_is_looked_for_was_answered(asked: Asked) -> None:
    told = [said(it) for it in asked.bodies.values() if '"choices":' in it]
    assert sum(it.endswith(ANSWER) for it in told) >= 5
    assert BROKEN_CALL in told
    assert len(asked.answers) == 5
    assert sum(bool(pieces(it)) for it in asked.answers) >= 4, asked.answers


def test_nothing_that_was_said_is_in_any_log(asked: Asked) -> None:
    log = asked.node.output()
    assert "DEBUG" in log  # vLLM is at its most talkative
    assert "create_error_response called with" in log
    assert not quoted(log, asked.planted)


@pytest.mark.parametrize("path", ["/metrics", "/health", "/adapters", "/ready", "/v1/models"])
def test_nothing_that_was_said_is_shown(asked: Asked, path: str) -> None:
    answer = httpx.get(asked.node.url + path, headers={"X-API-Key": ADMIN})
    assert answer.status_code == 200
    assert not quoted(answer.text, asked.planted)


def test_no_answer_tells_a_key(asked: Asked) -> None:
    assert not [it for it in asked.bodies.values() if quoted(it, [KEY, WRONG_KEY, ADMIN])]


def test_each_request_has_its_line(asked: Asked) -> None:
    by_id = {it["request_id"]: it for it in asked.lines}
    assert by_id.keys() == asked.statuses.keys()
    for id_, status in asked.statuses.items():
        line = by_id[id_]
        assert line["status"] == status
        if status == 200:
            assert (line["outcome"], line["adapter"]) == ("complete", "legal")
            assert line["cid"].startswith("baf")
            assert line["prompt_tokens"] > 0
            assert 0 < line["generated_tokens"] <= 60
            assert 0 < line["first_token_s"] <= line["seconds"] < 60
        elif status < 500:
            assert line["outcome"].startswith("refused:")
    assert set(asked.statuses.values()) >= {200, 400, 401, 404}
    assert max(asked.statuses.values()) < 500


def test_a_client_that_leaves_is_told(asked: Asked) -> None:
    """On a busy machine a small model may be ready before the node hears of it."""
    for number in range(10):
        line = leave(asked, f"leaves-{number}")
        if line["outcome"] == "left":
            break
    assert line["outcome"] == "left"
    assert 0 < line["generated_tokens"] < 8000


def leave(asked: Asked, id_: str) -> dict[str, Any]:
    headers = {"X-API-Key": KEY, "X-Request-Id": id_}
    body = chat(stream=True, max_tokens=8000, ignore_eos=True)
    url = f"{asked.node.url}/v1/chat/completions"
    with httpx.stream("POST", url, json=body, headers=headers) as answer:
        next(answer.iter_bytes())

    def told() -> list[dict[str, Any]]:
        return [it for it in lines_of(asked.node) if it["request_id"] == id_]

    wait_until(lambda: bool(told()), 20, "its line")
    return told()[0]


def test_an_engine_that_dies_says_nothing_of_its_answers(asked: Asked) -> None:
    """The last one: the node starts again, and nobody waits for it."""
    running = psutil.Process(asked.node.process.pid).children(recursive=True)
    engine = next(it for it in running if "EngineCore" in " ".join(it.cmdline()))
    body = SAMPLED | {"model": "legal", "prompt": PROMPT, "max_tokens": 8000, "stream": True}
    url, told = f"{asked.node.url}/v1/completions", ""
    with (
        suppress(httpx.RemoteProtocolError),
        httpx.stream("POST", url, json=body, headers={"X-API-Key": KEY}, timeout=60) as answer,
    ):
        parts = answer.iter_text()
        while told.count("\n\n") < 100:
            told += next(parts)
        engine.kill()
        for part in parts:
            told += part
    wait_until(lambda: "starting again" in asked.node.output(), 30, "the engine's end to be seen")
    *whole, end = told.rstrip().split("\n\n")
    assert '"error"' in end
    found = pieces(said("\n".join(whole)))
    assert len(found) > 3
    assert not quoted(end, [KEY, *found])
    assert not quoted(asked.node.output(), [*PLANTED, *found])
