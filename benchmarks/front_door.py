"""What half-open connections and malformed requests cost everybody else.

    r3mes-vllm bench half-open [--rounds 6] [--seconds 15] [--only malformed]

One node with the embedded base model answers four clients, 8 tokens a time, in turn alone and
beside connections that send half a request and then nothing; each that the node cuts off is opened
again. And beside requests that the fuzzer of `make conformance` draws and this node refuses. The
ratio of the 99th percentiles is of a pair.
"""

import asyncio
import json
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from itertools import cycle
from pathlib import Path
from urllib.parse import urlsplit

import httpx
from aiohttp import ClientSession

from benchmarks.client import at, session
from benchmarks.harness import Plan, Record, alone, in_turn
from benchmarks.programs import running, until_well
from benchmarks.results import Target
from benchmarks.shapes import SHAPES, made
from tests import tiny
from tests.backend.stand_ins import StandIn, serving
from tests.conformance.document import document
from tests.conformance.schema import fuzz
from tests.programs import free_port

CLIENTS, TOKENS = 4, 8
HALF_OPEN, MALFORMED = "half-open connections", "malformed requests"
_HALF = b"POST /chat HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Le"


def run(plan: Plan, record: Record) -> None:
    asyncio.run(_run(plan, record))


async def _run(plan: Plan, record: Record) -> None:
    seconds, connections, a_second = plan.lasts(15, 2), plan.pick(1000, 50), 100
    record.describe(
        "greedy",
        clients=CLIENTS,
        tokens=TOKENS,
        connections=connections,
        malformed_per_s=a_second,
        seconds=seconds,
    )
    with ExitStack() as until_end:
        folder = Path(until_end.enter_context(tempfile.TemporaryDirectory()))
        url = _start(plan, until_end, folder)
        await until_well(f"{url}/health")
        others = {}
        if plan.wants(HALF_OPEN):
            others[HALF_OPEN] = ["--half-open", url, str(connections)]
        if plan.wants(MALFORMED):
            file = folder / "malformed.json"
            try:
                drawn = await _refused(url, plan.pick(2000, 60), plan.seed)
            except (RuntimeError, subprocess.SubprocessError) as error:  # the fuzzer is installed
                record.leave_out(MALFORMED, f"there is no fuzzer: {error}")
            else:
                file.write_text(json.dumps(drawn))
                others[MALFORMED] = ["--malformed", url, str(a_second), str(file)]
        for turn in range(plan.rounds):
            for what, arguments in others.items():
                await _compare(record, turn, url, seconds, what, arguments)


async def _compare(
    record: Record, turn: int, url: str, seconds: float, what: str, arguments: list[str]
) -> None:
    found = {}
    for kind in in_turn(turn, ("alone", "beside")):
        with ExitStack() as until_measured:
            if kind == "beside":
                process = until_measured.enter_context(running("benchmarks.front_door", *arguments))
                await asyncio.sleep(3)
            found[kind] = await _asked(url, seconds)
            if kind == "beside" and process.poll() is not None:
                raise RuntimeError(f"there were no {what} until the end")
        await asyncio.sleep(1)
    for part, target in (("p50", None), ("p99", Target(at_most=1.2))):
        record.pair(
            f"answer of {TOKENS} tokens, {part}",
            "s",
            ours=found["beside"][part],
            peer=found["alone"][part],
            sides=(f"beside {what}", "alone"),
            better="lower",
            target=target,
            chart=what.capitalize(),
        )


async def _asked(url: str, seconds: float) -> dict[str, float]:
    """Seconds that answers took, of all that began within `seconds`."""
    took: list[float] = []
    ends = time.monotonic() + seconds

    async def client() -> None:
        async with httpx.AsyncClient(base_url=url, timeout=60) as http:
            while (began := time.monotonic()) < ends:
                body = {"message": "What is a contract?", "max_tokens": TOKENS}
                answer = await http.post("/chat", json=body)
                if answer.status_code != 200:
                    raise RuntimeError(answer.text)
                took.append(time.monotonic() - began)

    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    took.sort()
    return {"p50": at(took, 0.5), "p99": at(took, 0.99), "count": len(took)}


async def _half_open(url: str, count: int) -> None:
    host = urlsplit(url)

    async def one() -> None:
        while True:
            with suppress(OSError):
                reader, writer = await asyncio.open_connection(host.hostname, host.port)
                writer.write(_HALF)
                while await reader.read(1024):
                    pass
                writer.close()
            await asyncio.sleep(0.1)

    await asyncio.gather(*(one() for _ in range(count)))


async def _refused(url: str, count: int, seed: int) -> list[tuple[str, str, str]]:
    """Path, content type and body of those among `count` fuzzed requests that the node refuses."""
    async with serving(drawn := StandIn()) as other, session() as http:
        await asyncio.to_thread(fuzz, other, count, seed, document())
        found = []
        for it in drawn.seen:
            asked = it.path, *it.header("content-type"), it.body.decode("latin-1")
            if len(asked) == 3 and 400 <= await _status(http, url, *asked) < 500:
                found.append(asked)
        return found


async def _malformed(url: str, a_second: int, file: Path) -> None:
    """Raises RuntimeError once one is not refused."""
    began = time.monotonic()

    async def one(asked: tuple[str, str, str]) -> None:
        if not 400 <= (status := await _status(http, url, *asked)) < 500:
            raise RuntimeError(f"{status}: {asked}")

    async with session() as http, asyncio.TaskGroup() as under_way:
        for number, asked in enumerate(cycle(json.loads(file.read_text()))):
            under_way.create_task(one(asked))
            await asyncio.sleep(began + number / a_second - time.monotonic())


async def _status(http: ClientSession, url: str, path: str, kind: str, body: str) -> int:
    data, headers = body.encode("latin-1"), {"Content-Type": kind}
    async with http.post(url + path, data=data, headers=headers) as answer:
        await answer.read()
        return answer.status


def _start(plan: Plan, until_end: ExitStack, folder: Path) -> str:
    port = str(free_port())
    serve = ["serve", "--host", "127.0.0.1", "--port", port, "--backend-url", "http://127.0.0.1:9"]
    if plan.quick:
        legal = tiny.make_adapter(folder / "legal", seed=0)
        serve += ["--model", str(made(SHAPES["tiny"], folder)), "--loras", f"legal={legal}"]
    until_end.enter_context(running("r3mes_vllm", *serve, R3MES_STATE_DIR=str(folder)))
    return f"http://127.0.0.1:{port}"


if __name__ == "__main__":
    if "--half-open" in sys.argv:
        asyncio.run(_half_open(sys.argv[-2], int(sys.argv[-1])))
    elif "--malformed" in sys.argv:
        asyncio.run(_malformed(sys.argv[-3], int(sys.argv[-2]), Path(sys.argv[-1])))
    else:
        alone("half-open")
