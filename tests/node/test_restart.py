"""One real node whose engine is killed, stopped and poisoned: each time all that ran ends as an
error, the network hears it, and the same process is back with the same adapters."""

import asyncio
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

from tests import tiny
from tests.engine.poisoned import POISON, poisonous_model
from tests.in_store import put_in_store
from tests.programs import Program, free_port, program, wait_until

DETECTED_S = 15.0
"""What is promised, from the fault until no request comes any more."""
GIVEN_UP_S = 60.0
DRAIN_S, ENDS_S = 3.0, 12.0
"""For what runs when the node is told to end, and for the end itself, at which vLLM would wait 15 s
for a request that it goes on with."""
STARTS_S = 180.0
QUESTION = "What is a contract?"
ADDED = "added-later"


@dataclass
class Network:
    backend: Program
    node: Program
    nameless: str
    """CID of an adapter that has no name at this node."""

    def listed(self) -> bool:
        answer = httpx.get(f"{self.backend.url}/api/serving-node/list", params={"lora": "legal"})
        return bool(answer.json()["count"])

    def is_ready(self) -> bool:
        """Also as long as it says nothing."""
        try:
            return httpx.get(f"{self.node.url}/ready").is_success
        except httpx.TransportError as error:
            return isinstance(error, httpx.TimeoutException)

    def engine(self) -> psutil.Process:
        processes = psutil.Process(self.node.process.pid).children(recursive=True)
        return next(it for it in processes if "EngineCore" in _title(it))

    def cids(self) -> dict[str, str]:
        """By name, of those that have one beside it."""
        models = httpx.get(f"{self.node.url}/v1/models").json()["data"]
        named = [it for it in models if "cid" in it and it["id"] != f"ipfs://{it['cid']}"]
        return {model["id"]: model["cid"] for model in named}

    def answers(self) -> dict[str, str]:
        """Of the base model and all adapters."""
        result = {}
        for model in (tiny.NAME, *self.cids(), f"ipfs://{self.nameless}"):
            body = {"model": model, "prompt": QUESTION, "temperature": 0, "max_tokens": 12}
            answer = httpx.post(f"{self.node.url}/v1/completions", json=body, timeout=60)
            result[model] = answer.json()["choices"][0]["text"]
        return result


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Network]:
    folder = tmp_path_factory.mktemp("restart")
    backend_url = f"http://127.0.0.1:{(backend_port := free_port())}"
    node_url = f"http://127.0.0.1:{(node_port := free_port())}"
    adapters = ",".join(
        f"{name}={tiny.make_adapter(folder / name, seed=seed)}"
        for seed, name in enumerate(("legal", "medical"))
    )
    model = poisonous_model(folder / tiny.NAME)
    with ExitStack() as running:
        backend = running.enter_context(
            program(
                folder,
                *("backend", "--port", str(backend_port), "--allow-private-nodes"),
                *("--database-url", f"sqlite:///{folder / 'backend.sqlite3'}"),
                url=backend_url,
            )
        )
        node = running.enter_context(
            program(
                folder,
                *("serve", "--loras", adapters, "--model", str(model), "--allow-cid"),
                *("--drain-timeout", str(DRAIN_S)),
                *("--backend-url", backend_url, "--host", "127.0.0.1", "--port", str(node_port)),
                url=node_url,
                env={"R3MES_HEARTBEAT_INTERVAL": "1"},
            )
        )
        backend.wait_for("/health", 30)
        node.wait_for("/ready", STARTS_S)
        nameless = tiny.make_adapter(folder / "nameless", seed=9)
        cid = asyncio.run(put_in_store(folder / "cache", nameless))
        network = Network(backend, node, cid)
        wait_until(network.listed, 20, "the node to be listed")
        body = {"name": ADDED, "cid": network.cids()["medical"]}
        httpx.post(f"{node_url}/adapters", json=body, timeout=60).raise_for_status()
        yield network


@dataclass
class Ending:
    status: int = 0
    text: str = ""
    broken: bool = False
    """The connection, before the terminating chunk."""


async def read(
    client: httpx.AsyncClient, path: str, body: dict[str, Any], begun: asyncio.Event
) -> Ending:
    ending = Ending()
    headers = {"Accept": "text/event-stream"} if body.pop("events", False) else {}
    try:
        async with client.stream("POST", path, json=body, headers=headers) as answer:
            ending.status = answer.status_code
            async for part in answer.aiter_text():
                ending.text += part
                begun.set()
                await asyncio.sleep(0)  # or one stream of a fast engine would keep out the others
    except httpx.RemoteProtocolError:
        ending.broken = True
    return ending


async def read_with_openai(
    client: openai.AsyncOpenAI, body: dict[str, Any], begun: asyncio.Event
) -> None:
    async for _ in await client.chat.completions.create(**body, stream=True):
        begun.set()
        await asyncio.sleep(0)


@dataclass
class Endings:
    chat: Ending
    chat_events: Ending
    completion: Ending
    response: Ending
    whole: Ending
    openai: BaseException | None


async def interrupted(network: Network, act: Callable[[], object]) -> Endings:
    """How answers of all kinds end that are under way while `act` is called."""
    url = network.node.url
    begun = [asyncio.Event() for _ in range(5)]
    most = {"temperature": 0, "max_tokens": tiny.LONGEST - 1000}
    async with (
        httpx.AsyncClient(base_url=url, timeout=90) as client,
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as with_openai,
    ):
        running = asyncio.gather(
            read(client, "/chat", most | {"message": "go on"}, begun[0]),
            read(client, "/chat", most | {"message": "go on", "events": True}, begun[1]),
            read(client, "/v1/completions", most | {"prompt": "go on", "stream": True}, begun[2]),
            read(
                client,
                "/v1/responses",
                {"input": "go on", "stream": True, "max_output_tokens": tiny.LONGEST - 1000},
                begun[3],
            ),
            read(client, "/v1/completions", most | {"prompt": "go on"}, asyncio.Event()),
            read_with_openai(
                with_openai,
                most | {"model": tiny.NAME, "messages": [{"role": "user", "content": "go on"}]},
                begun[4],
            ),
            return_exceptions=True,
        )
        await asyncio.wait_for(asyncio.gather(*(it.wait() for it in begun)), 30)
        act()
        return Endings(*await running)  # type: ignore[arg-type]


def assert_honest(endings: Endings) -> None:
    streams = (endings.chat, endings.chat_events, endings.completion, endings.response)
    for stream in streams:
        assert stream.status == 200
        assert stream.text
        assert stream.broken, stream.text[-300:]
        assert "[DONE]" not in stream.text
        assert "abort" not in stream.text
        assert "response.completed" not in stream.text
    for stream in (endings.chat_events, endings.completion, endings.response):
        assert '"error"' in stream.text.rstrip().rpartition("\n\n")[2]
    assert '"error"' not in endings.chat.text
    assert endings.whole.status >= 500
    assert '"error"' in endings.whole.text
    assert isinstance(endings.openai, openai.APIError)


def assert_back(network: Network, before: dict[str, str], cids: dict[str, str]) -> None:
    network.node.wait_for("/ready", STARTS_S)  # and it is the process that was started
    assert network.cids() == cids
    assert network.answers() == before
    wait_until(network.listed, 20, "the node to be listed again")


class Watch:
    """A fault, looked at from outside: how long the node is taken for well."""

    def __init__(self, network: Network, act: Callable[[], object]) -> None:
        self.slowest = 0.0
        """Answer of the node meanwhile, in seconds."""
        self._network = network
        self._act = act
        self._seen: asyncio.Future[tuple[float, float]]

    def __call__(self) -> None:
        began = time.monotonic()
        self._seen = asyncio.get_running_loop().run_in_executor(None, self._look, began)
        self._act()

    async def assert_in_time(self) -> None:
        """The node has said so, and the backend sends it nothing more."""
        noticed, unlisted = await self._seen
        print(f"not ready after {noticed:.1f} s, off the network after {unlisted:.1f} s")
        assert unlisted <= DETECTED_S

    def _look(self, began: float) -> tuple[float, float]:
        wait_until(lambda: not self._is_ready(), GIVEN_UP_S, "the node to see what is wrong")
        noticed = time.monotonic() - began
        wait_until(lambda: not self._network.listed(), GIVEN_UP_S, "the node to be unlisted")
        return noticed, time.monotonic() - began

    def _is_ready(self) -> bool:
        asked = time.monotonic()
        ready = self._network.is_ready()
        self.slowest = max(self.slowest, time.monotonic() - asked)
        return ready


async def test_a_killed_engine(network: Network) -> None:
    before, cids = network.answers(), network.cids()
    assert set(cids) == {"legal", "medical", ADDED}
    watch = Watch(network, network.engine().kill)
    assert_honest(await interrupted(network, watch))
    await watch.assert_in_time()
    assert_back(network, before, cids)
    assert "the engine's process died; " in network.node.output()
    assert "starting again, number 1" in network.node.output()
    assert "Traceback" not in network.node.output()


async def test_a_stopped_engine(network: Network) -> None:
    before, cids = network.answers(), network.cids()
    watch = Watch(network, network.engine().suspend)
    assert_honest(await interrupted(network, watch))
    await watch.assert_in_time()
    assert watch.slowest < 3
    assert_back(network, before, cids)
    assert "the engine hangs" in network.node.output()


async def test_a_poisoned_engine(network: Network) -> None:
    """One prompt leaves NaN in the KV cache, and every later answer would be made of it."""
    before, cids = network.answers(), network.cids()
    body = {"model": tiny.NAME, "prompt": POISON * 40, "max_tokens": 4}
    watch = Watch(network, lambda: httpx.post(f"{network.node.url}/v1/completions", json=body))
    assert_honest(await interrupted(network, watch))
    await watch.assert_in_time()
    assert_back(network, before, cids)
    assert "not finite" in network.node.output()


async def test_it_still_ends_in_order(network: Network) -> None:
    """Ending on purpose is not taken for a failure; what runs has its time, and not more."""
    said, began = network.node.output().count("starting again"), 0.0

    def end() -> None:
        nonlocal began
        began = time.monotonic()
        network.node.process.send_signal(signal.SIGTERM)

    endings = await interrupted(network, end)
    aborted = time.monotonic() - began
    assert await asyncio.to_thread(network.node.process.wait, 60) == 0
    took = time.monotonic() - began
    print(f"streams ended after {aborted:.1f} s, the node after {took:.1f} s")
    assert DRAIN_S <= aborted <= took < DRAIN_S + ENDS_S
    assert_honest(endings)
    assert "requests are aborted" in network.node.output()
    assert network.node.output().count("starting again") == said
    assert "Traceback" not in network.node.output()


@pytest.mark.control
def test_without_a_restart_one_prompt_makes_all_later_answers_worthless(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.engine.poisoned", str(tmp_path / "model")]
    said = subprocess.run(command, capture_output=True, text=True, timeout=STARTS_S, check=True)
    assert said.stdout.splitlines()[-1] == "50 of 50 later answers have NaN probabilities"
