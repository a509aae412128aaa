"""One real node, asked from before its engine is there, with certificates of its own at a backend
with such a one, and the system prompts that this backend has for its adapters."""

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from r3mes_vllm.wire import SYSTEM_PROMPT_CHARACTERS
from tests import tiny
from tests.certificates import Authority, served_serial
from tests.conftest import NODE_STARTS_S
from tests.in_store import put_in_store
from tests.probing import Probe, probed
from tests.programs import Program, free_port, program, wait_until

PROMPT = "You are a notary."
QUESTION = "What is a contract?"


@dataclass
class Backend:
    """Its registry, and who registered."""

    authority: Authority
    files: tuple[Path, Path]
    loras: dict[str, dict[str, Any]] = field(default_factory=dict)
    heard: list[dict[str, Any]] = field(default_factory=list)

    async def list(self, _: Request) -> JSONResponse:
        return JSONResponse(list(self.loras.values()))

    async def register(self, request: Request) -> JSONResponse:
        self.heard.append(await request.json())
        return JSONResponse({"success": True, "action": "created", "node_id": 1})

    async def take(self, _: Request) -> JSONResponse:
        return JSONResponse({"success": True})

    @contextmanager
    def running(self) -> Iterator[str]:
        routes = [
            Route("/api/lora/list", self.list),
            Route("/api/serving-node/register", self.register, methods=["POST"]),
            Route("/{path:path}", self.take, methods=["POST"]),
        ]
        certificate, key = self.files
        config = uvicorn.Config(
            Starlette(routes=routes),
            port=(port := free_port()),
            log_level="error",
            lifespan="off",
            ssl_certfile=certificate,
            ssl_keyfile=key,
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run)
        thread.start()
        try:
            wait_until(lambda: server.started, 10, "the backend")
            yield f"https://localhost:{port}"
        finally:
            server.should_exit = True
            thread.join()


@dataclass
class Node:
    backend: Backend
    program: Program
    port: int
    client: httpx.Client
    files: tuple[Path, Path]
    start: Probe
    """From the first moment until it answered 200 for a while."""

    def prompt_tokens(self, **body: Any) -> int:
        """Of a chat: the tiny model has a token for each byte."""
        answer = self.client.post("/chat", json={"max_tokens": 40, "stream": False, **body})
        assert answer.status_code == 200, answer.text
        return int(answer.json()["usage"]["prompt_tokens"])

    def prompt_is(self, name: str, system: str | None) -> bool:
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": QUESTION})
        by_hand = self.client.post(
            "/v1/chat/completions", json={"model": name, "max_tokens": 1, "messages": messages}
        )
        expected = int(by_hand.json()["usage"]["prompt_tokens"])
        return self.prompt_tokens(message=QUESTION, lora_name=name) == expected


@pytest.fixture(scope="module")
def node(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    folder = tmp_path_factory.mktemp("https")
    authority = Authority(folder)
    backend = Backend(authority, (folder / "backend.pem", folder / "backend-key.pem"))
    authority.issue().write(*backend.files)
    files = folder / "node.pem", folder / "node-key.pem"
    authority.issue().write(*files)
    prompts = {"legal": PROMPT, "medical": "x" * (SYSTEM_PROMPT_CHARACTERS + 1)}
    for number, (name, prompt) in enumerate(prompts.items()):
        made = tiny.make_adapter(folder / name, seed=number)
        cid = asyncio.run(put_in_store(folder / "cache", made))
        backend.loras[name] = {"id": number, "name": name, "ipfs_hash": cid}
        backend.loras[name]["system_prompt"] = prompt
    port, trusting = free_port(), authority.trusting
    with (
        backend.running() as url,
        program(
            folder,
            *("serve", "--loras", "legal,medical", "--model", str(tiny_model)),
            *("--backend-url", url, "--backend-ca", str(authority.file)),
            *("--host", "127.0.0.1", "--port", str(port), "--max-loras", "2"),
            *("--", "--ssl-certfile", str(files[0]), "--ssl-keyfile", str(files[1])),
            env={"R3MES_REGISTRY_REFRESH": "1"},
        ) as running,
        httpx.Client(base_url=f"https://localhost:{port}", verify=trusting, timeout=60) as client,
    ):
        with probed(port, trusting) as probe:

            def well() -> bool:
                assert running.process.poll() is None, running.output()
                return probe.statuses[-50:].count(200) == 50

            wait_until(well, NODE_STARTS_S, "the node")
        yield Node(backend, running, port, client, files, probe)


def test_from_the_first_answer_on_nobody_is_refused(node: Node) -> None:
    assert not node.start.failures
    assert node.start.changes == [503, 200]
    assert node.start.statuses.count(503) > 200
    assert node.start.slowest_s < 10


def test_it_is_known_by_its_encrypted_address(node: Node) -> None:
    wait_until(lambda: bool(node.backend.heard), 10, "the registration")
    assert node.backend.heard[0]["endpoint_url"] == f"https://127.0.0.1:{node.port}"
    said = node.program.output()
    assert f"Inference server listening on https://127.0.0.1:{node.port}" in said
    assert node.client.get("/ready").json() == {"ready": True}


def test_a_renewed_certificate_is_used_without_a_restart(node: Node) -> None:
    renewed = node.backend.authority.issue().write(*node.files)
    trusting = node.backend.authority.trusting
    wait_until(lambda: served_serial(node.port, trusting) == renewed.serial, 10, "the renewal")
    assert node.client.get("/health").status_code == 200


class TestSystemPrompts:
    def set(self, node: Node, name: str, prompt: str | None) -> None:
        node.backend.loras[name]["system_prompt"] = prompt

    def test_an_adapters_goes_before_what_the_user_says(self, node: Node) -> None:
        assert node.prompt_is("legal", PROMPT)
        assert not node.prompt_is("legal", None)
        cid = node.backend.loras["legal"]["ipfs_hash"]
        assert node.prompt_tokens(message=QUESTION, lora_name="legal") == node.prompt_tokens(
            message=QUESTION, lora_name=f"legal@{cid}"
        )

    def test_the_callers_own_stands_alone(self, node: Node) -> None:
        own = [{"role": "system", "content": "Be brief."}]
        with_own = node.prompt_tokens(message=QUESTION, messages=own, lora_name="legal")
        base = node.prompt_tokens(message=QUESTION, messages=own, lora_name=tiny.NAME)
        assert with_own == base

    def test_one_that_is_too_long_is_left_out_and_said_once(self, node: Node) -> None:
        assert node.prompt_is("medical", None)
        assert node.program.output().count("'medical' goes without: its system prompt has") == 1

    def test_it_follows_the_registry(self, node: Node) -> None:
        for prompt in ("You are a judge, and a kind one.", None, PROMPT):
            self.set(node, "legal", prompt)
            wait_until(
                lambda prompt=prompt: node.prompt_is("legal", prompt),  # type: ignore[misc]
                10,
                "the prompt",
            )

    def test_it_is_remembered(self, node: Node) -> None:
        self.set(node, "legal", "Remember me.")
        wait_until(lambda: node.prompt_is("legal", "Remember me."), 10, "the prompt")
        state = node.program.log.parent / "state" / "system-prompts.json"
        wait_until(
            lambda: json.loads(state.read_text()) == {"legal": "Remember me."}, 5, "the memory"
        )
