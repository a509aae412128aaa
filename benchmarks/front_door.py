"""What a thousand half-open connections cost everybody else.

    r3mes-vllm bench half-open [--rounds 6] [--seconds 15]

One node with the embedded base model answers four clients, 8 tokens a time, in turn alone and
beside connections that send half a request and then nothing; each that the node cuts off is opened
again. The ratio of the 99th percentiles is of a pair.
"""

import asyncio
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from urllib.parse import urlsplit

import httpx

from benchmarks.client import at
from benchmarks.harness import Plan, Record, alone, in_turn
from benchmarks.programs import running, until_well
from benchmarks.results import Target
from benchmarks.shapes import SHAPES, made
from tests.programs import free_port

CLIENTS, TOKENS = 4, 8
_HALF = b"POST /chat HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Le"


def run(plan: Plan, record: Record) -> None:
    asyncio.run(_run(plan, record))


async def _run(plan: Plan, record: Record) -> None:
    seconds, connections = plan.lasts(15, 2), plan.pick(1000, 50)
    record.describe(
        "greedy", clients=CLIENTS, tokens=TOKENS, connections=connections, seconds=seconds
    )
    with ExitStack() as until_end:
        folder = Path(until_end.enter_context(tempfile.TemporaryDirectory()))
        url = _start(plan, until_end, folder)
        await until_well(f"{url}/health")
        for turn in range(plan.rounds):
            found = {}
            for kind in in_turn(turn, ("alone", "beside")):
                with ExitStack() as until_measured:
                    if kind == "beside":
                        asked = ["--half-open", url, str(connections)]
                        until_measured.enter_context(running("benchmarks.front_door", *asked))
                        await asyncio.sleep(3)
                    found[kind] = await _asked(url, seconds)
                await asyncio.sleep(1)
            for part, target in (("p50", None), ("p99", Target(at_most=1.2))):
                record.pair(
                    f"answer of {TOKENS} tokens, {part}",
                    "s",
                    ours=found["beside"][part],
                    peer=found["alone"][part],
                    sides=("beside half-open connections", "alone"),
                    better="lower",
                    target=target,
                    chart="Half-open connections",
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


def _start(plan: Plan, until_end: ExitStack, folder: Path) -> str:
    port = str(free_port())
    serve = ["serve", "--host", "127.0.0.1", "--port", port, "--backend-url", "http://127.0.0.1:9"]
    serve += ["--model", str(made(SHAPES["tiny"], folder))] if plan.quick else []
    until_end.enter_context(running("r3mes_vllm", *serve, R3MES_STATE_DIR=str(folder)))
    return f"http://127.0.0.1:{port}"


if __name__ == "__main__":
    if "--half-open" in sys.argv:
        asyncio.run(_half_open(sys.argv[-2], int(sys.argv[-1])))
    else:
        alone("half-open")
