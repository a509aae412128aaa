"""The real js-ipfs daemon: another implementation to publish to and fetch from.

Installed once by npm into the user's cache; started on loopback without any peers.
"""

import contextlib
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

_CLI = "node_modules/ipfs/src/cli.js"


@dataclass
class JsIpfs:
    api: str
    """URL of its RPC."""

    blocks: Path
    """Its folder of blocks."""

    def add(self, directory: Path) -> str:
        """The CID (base32) of `directory`, added as `ipfs add -r --cid-version=1` does."""
        files = [
            ("file", (str(path.relative_to(directory.parent)), path.read_bytes()))
            for path in sorted(directory.rglob("*"))
            if path.is_file()
        ]
        answer = httpx.post(
            f"{self.api}/api/v0/add",
            params={
                "cid-version": "1",
                "raw-leaves": "true",
                "chunker": "size-262144",
                "cid-base": "base32",
                "pin": "false",
            },
            files=files,
            timeout=120,
        )
        answer.raise_for_status()
        added = [json.loads(line) for line in answer.text.splitlines()]
        return next(str(it["Hash"]) for it in added if it["Name"] == directory.name)

    def import_car(self, path: Path) -> None:
        with path.open("rb") as file:
            httpx.post(
                f"{self.api}/api/v0/dag/import", files={"file": file}, timeout=120
            ).raise_for_status()

    def connect(self, address: str) -> None:
        httpx.post(
            f"{self.api}/api/v0/swarm/connect", params={"arg": address}, timeout=60
        ).raise_for_status()

    def pins(self) -> list[str]:
        """CIDs (base32) pinned as roots."""
        answer = httpx.post(
            f"{self.api}/api/v0/pin/ls",
            params={"type": "recursive", "cid-base": "base32"},
            timeout=60,
        )
        answer.raise_for_status()
        return list(json.loads(answer.text.splitlines()[0])["Keys"]) if answer.text else []


@pytest.fixture(scope="session")
def js_ipfs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[JsIpfs]:
    package = installed.npm("js-ipfs")
    repository = tmp_path_factory.mktemp("js-ipfs")
    environment = {**os.environ, "IPFS_PATH": str(repository)}
    command = ["node", str(package / _CLI)]
    subprocess.run(
        [*command, "init", "--profile", "test", "--empty-repo"],
        env=environment,
        check=True,
        capture_output=True,
        timeout=120,
    )
    api = f"http://127.0.0.1:{_configure(repository / 'config')}"
    log = repository / "daemon.log"
    with log.open("wb") as file:
        daemon = subprocess.Popen(
            [*command, "daemon"],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        wait_until(
            lambda: httpx.post(f"{api}/api/v0/version").is_success, 60, f"js-ipfs, see {log}"
        )
        yield JsIpfs(api, repository / "blocks")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(daemon.pid, signal.SIGTERM)
        try:
            daemon.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(daemon.pid, signal.SIGKILL)
            daemon.wait()


def _configure(path: Path) -> int:
    """Loopback only, no discovery, no other peers; the port of the RPC."""
    config = json.loads(path.read_text())
    api = free_port()
    config["Addresses"].update(
        Swarm=[f"/ip4/127.0.0.1/tcp/{free_port()}"],
        API=f"/ip4/127.0.0.1/tcp/{api}",
        Gateway=f"/ip4/127.0.0.1/tcp/{free_port()}",
        RPC="/ip4/127.0.0.1/tcp/0",
        Delegates=[],
    )
    config["Bootstrap"] = []
    config["Discovery"] = {
        "MDNS": {"Enabled": False, "Interval": 10},
        "webRTCStar": {"Enabled": False},
    }
    config["Routing"] = {"Type": "none"}
    config["Swarm"]["DisableNatPortMap"] = True
    config["Pubsub"] = {"Enabled": False}
    path.write_text(json.dumps(config))
    return api
