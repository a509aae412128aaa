"""A person who goes through a page: a folder, a shell, and a network that answers.

The commands are the page's own. What stands in them for the reader's world is replaced by the
test's: addresses, the base model, a CID, paths under `/var/lib`.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from tests.docs.blocks import CHECKED, OURS, OUTSIDE, ROOT, RUN, Block, Command, commands
from tests.docs.checks import check
from tests.embedded import Embedded
from tests.programs import free_port, program

_COMMAND_S = 300.0
_LONG_LIVED = {"serve", "backend"}
_VERIFIED_S, _STARTS_S = 300.0, 180.0


@dataclass
class Reader:
    folder: Path
    """Looks like the checkout that the page is read in."""
    embedded: Embedded
    ipfs_api: str
    node_modules: Path
    cid: str
    done: list[str] = field(default_factory=list)
    """How each command was tried: `ran`, `started`, `checked`."""

    def __post_init__(self) -> None:
        (self.folder / "home").mkdir(parents=True)
        for name in (".venv", "configs", "Makefile", "requirements"):
            (self.folder / name).symlink_to(ROOT / name)
        (self.folder / "r3mes-vllm").symlink_to(self.folder)
        (self.folder / "node_modules").symlink_to(self.node_modules)
        shutil.copytree(self.embedded.folder / "mine", self.folder / "my-adapter")
        self._environment = {
            name: it for name, it in os.environ.items() if not name.startswith("R3MES_")
        } | {
            "HOME": str(self.folder / "home"),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "KEY": "0" * 32,
            "ADMIN_KEY": "1" * 32,
            "COLUMNS": "200",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "R3MES_BACKEND_URL": self.embedded.backend.url,
            "R3MES_CACHE_DIR": str(self.embedded.folder / "cache"),
            "R3MES_STATE_DIR": str(self.embedded.folder / "reader"),
            "R3MES_MODEL": str(self.embedded.model),
            "R3MES_IPFS_API_URL": self.ipfs_api,
            "R3MES_SERVING_NODE_PORT": str(free_port()),
        }
        # an answer that is an error ends the command
        (self.folder / "home" / ".curlrc").write_text("fail-with-body\n")

    def read(self, block: Block) -> None:
        """Raises AssertionError for what does not work."""
        if block.kind == "sh":
            for command in commands(block):
                self.type(command)
        elif block.kind == "python":
            self._program(block, sys.executable, ".py")
        elif block.kind in ("js", "javascript"):
            self._program(block, "node", ".mjs")

    def type(self, command: Command) -> None:
        first = command.first
        known = OURS | OUTSIDE | CHECKED | RUN
        assert first in known, f"{command.block}: {first!r} is no command that a test knows"
        check(command)
        if first in OUTSIDE | CHECKED:
            self.done.append("checked")
        elif first in OURS and (started := self._long_lived(command)):
            self._start(command, started)
            self.done.append("started")
        else:
            self._shell(command)
            self.done.append("ran")

    def replaced(self, text: str) -> str:
        backend, node = self.embedded.backend.url, self.embedded.settings.url_of("127.0.0.1")
        text = re.sub(r"http://(127\.0\.0\.1|localhost):8000\b", backend, text)
        text = re.sub(r"http://(127\.0\.0\.1|localhost):80(80|81)\b", node, text)
        for name, value in {
            "https://backend.example": backend,
            "https://trustless-gateway.link": "http://127.0.0.1:9",
            "HuggingFaceTB/SmolLM2-135M-Instruct": str(self.embedded.model),
            "/var/lib/": f"{self.folder}/",
            ".venv/bin/r3mes-vllm": "r3mes-vllm",
            "ADMIN_KEY=$(openssl rand -hex 32)": f"ADMIN_KEY={'1' * 32}",
        }.items():
            text = text.replace(name, value)
        return re.sub(r'(?<=")CID(?=")|(?<==)CID\b', self.cid, text)

    def _shell(self, command: Command) -> None:
        """What it exports, and where it goes, holds for the commands after it."""
        script = "\n".join(
            (
                "set -euo pipefail",
                f"cd {self.folder}; [ ! -e .there ] || cd $(cat .there)",
                f"[ ! -e {self.folder}/.exported ] || . {self.folder}/.exported",
                self.replaced(command.text),
                f"export -p > {self.folder}/.exported; pwd > {self.folder}/.there",
            )
        )
        self._run(command.block, ["bash", "-c", script], f"{command.text}\n")

    def _program(self, block: Block, interpreter: str, suffix: str) -> None:
        file = self.folder / f"example-{block.line}{suffix}"
        file.write_text(self.replaced(block.text))
        self._run(block, [interpreter, str(file)], "")
        self.done.append("ran")

    def _run(self, block: Block, command: list[str], said: str) -> None:
        done = subprocess.run(
            command,
            cwd=self.folder,
            env=self._environment,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_COMMAND_S,
        )
        output = f"{said}{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        assert done.returncode == 0, f"{block}: status {done.returncode}\n{output}"

    def _long_lived(self, command: Command) -> list[str] | None:
        """The words after `r3mes-vllm`, if it serves until a signal comes."""
        words = next(command.of_ours(), [])
        return words if words and words[0] in _LONG_LIVED and "--help" not in words else None

    def _start(self, command: Command, words: list[str]) -> None:
        """A backend until it answers; a node until its adapters are verified."""
        port = str(free_port())
        words = [self.replaced(it) for it in words]
        words = [
            port if before == "--port" else it
            for before, it in zip(["", *words], words, strict=False)
        ]
        environment = dict(self._environment) | self._exported()
        environment |= {"BACKEND_PORT": port, "R3MES_SERVING_NODE_PORT": port}
        ready = "adapters: " if words[0] == "serve" else None
        with program(
            self.folder, *words, url=f"http://127.0.0.1:{port}", env=environment, cwd=self.folder
        ) as started:
            deadline = time.monotonic() + (_VERIFIED_S if ready else _STARTS_S)
            while not (ready in started.output() if ready else _answers(started.url)):
                assert started.process.poll() is None, f"{command.block}: {started.output()}"
                assert time.monotonic() < deadline, f"{command.block}: {started.output()}"
                time.sleep(0.05)
            started.stop(seconds=90)

    def _exported(self) -> dict[str, str]:
        file = self.folder / ".exported"
        if not file.exists():
            return {}
        script = f". {file}; env -0"
        out = subprocess.run(
            ["bash", "-c", script], env={}, capture_output=True, text=True, check=True
        )
        pairs = (it.split("=", 1) for it in out.stdout.split("\0") if it)
        return {name: value for name, value in pairs if name != "_"}


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=5).is_success
    except httpx.TransportError:
        return False
