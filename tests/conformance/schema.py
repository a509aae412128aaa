"""Fuzzed requests by the OpenAPI document: no client's mistake may be a failure of the server.

    python -m tests.conformance.schema [URL] [--requests 10000] [--seed N]

Without a URL it starts a node on the tests' small model. Prints the seed, the counts by status and
what was found; the status is 1 if anything was.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from tests import tiny
from tests.conformance.document import document
from tests.peers import installed
from tests.programs import free_port, program

HERE = Path(__file__).parent
_STARTS_S = 300
_QUESTION = {"model": "legal", "prompt": "One is", "max_tokens": 16, "temperature": 0}


@dataclass(frozen=True)
class Found:
    requests: int
    statuses: dict[str, int]
    findings: list[dict[str, Any]]


def fuzz(url: str, requests: int, seed: int, document: dict[str, Any]) -> Found:
    python = installed.environment("clients", HERE / "requirements.txt")
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(document, file)
        file.flush()
        script = HERE / "clients" / "with_schemathesis.py"
        done = subprocess.run(
            [str(python), str(script), file.name, url, str(requests), str(seed)],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    return Found(**json.loads(done.stdout))


def answer(url: str) -> str:
    """The same every time, of a node that is well."""
    told = httpx.post(f"{url}/v1/completions", json=_QUESTION, timeout=60).raise_for_status()
    return str(told.json()["choices"][0]["text"])


@contextmanager
def node() -> Iterator[tuple[str, Path]]:
    """Its URL and its log."""
    url = f"http://127.0.0.1:{(port := free_port())}"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = tiny.make_model(folder / tiny.NAME)
        adapters = ",".join(
            f"{name}={tiny.make_adapter(folder / name, seed=seed)}"
            for seed, name in enumerate(("legal", "medical"))
        )
        arguments = ("serve", "--loras", adapters, "--model", str(model), "--port", str(port))
        away = ("--host", "127.0.0.1", "--backend-url", "http://127.0.0.1:9")
        tools = ("--", "--enable-auto-tool-choice", "--tool-call-parser", "hermes")
        with program(folder, *arguments, *away, *tools, url=url) as running:
            running.wait_for("/ready", _STARTS_S)
            yield url, running.log


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url", nargs="?")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 30))
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    if options.url:
        return _report(options.url, options.requests, options.seed)
    with node() as (url, log):
        status = _report(url, options.requests, options.seed)
        said = log.read_text(errors="replace")
        if status or "Traceback" in said:
            print(f"the node's log ends with:\n{said[-20_000:]}")
            return 1
        return 0


def _report(url: str, requests: int, seed: int) -> int:
    before = answer(url)
    found = fuzz(url, requests, seed, document())
    print(f"{found.requests} requests")
    for name, count in found.statuses.items():
        print(f"  {count:6} {name}")
    for it in found.findings:
        print(json.dumps(it, indent=2, ensure_ascii=False))
    well = answer(url) == before and httpx.get(f"{url}/health").status_code == 200
    print("the node answers as before" if well else "the node does not answer as before")
    return int(bool(found.findings) or not well)


if __name__ == "__main__":
    sys.exit(main())
