"""The blocks of README and docs, and the commands in them."""

import re
import shlex
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])

OURS = {"r3mes-vllm"}
OUTSIDE = {
    *("apt-get", "docker", "git", "helm", "ipfs", "journalctl", "kubectl", "nvidia-smi", "sudo"),
    *("nohup", "sqlite3", "systemctl", "systemd-analyze"),
}
"""Of other machines than a test's: these want a GPU, root, a cluster, another repository."""
CHECKED = {"make", "python"}
"""`make` would install and test, `python -m vllm...` is a server."""
RUN = {
    *(".", "cat", "cd", "chmod", "cp", "curl", "export", "mkdir", "openssl", "printf", "sha256sum")
}
RUN |= {"tar", "umask"}
"""Whatever else a page may want of a shell; one that is not here is added, or its page is wrong."""

_ASSIGNMENT = re.compile(r"[A-Za-z_][A-Za-z0-9_]*=")
_DATA = re.compile(r"(GET|POST) |[\[{]|r3mes-[a-z]+-v1(\n|$)|engine: ")
"""What an indented block is that has no command: an HTTP message, JSON, a text that is signed."""
_SHELL = {"sh", "bash", "shell", "console"}


@dataclass(frozen=True)
class Block:
    page: Path
    line: int
    kind: str
    """`sh`, or the fence's word, or `data`, or `` for a picture."""
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


@cache
def blocks(page: Path) -> tuple[Block, ...]:
    return tuple(_blocks(page, page.read_text().splitlines()))


def _blocks(page: Path, lines: list[str]) -> Iterator[Block]:
    kind, fenced, began = "", False, 0
    held: list[str] = []
    for number, line in enumerate([*lines, "end"], 1):
        if fenced:
            if line.strip() == "```":
                yield Block(page, began, kind, "\n".join(held))
                fenced, held = False, []
            else:
                held.append(line)
        elif line.startswith("    ") and (held or not lines[number - 2].strip()):
            began = began if held else number
            held.append(line[4:])
        elif held and not line.strip():
            held.append("")
        else:
            if held:
                text = "\n".join(held).rstrip()
                yield Block(page, began, "data" if _DATA.match(text) else "sh", text)
                held = []
            if line.startswith("```"):
                kind, fenced, began = line[3:].strip(), True, number
                kind = "sh" if kind in _SHELL else kind


@dataclass(frozen=True)
class Command:
    block: Block
    text: str

    @property
    def words(self) -> list[str]:
        """Without assignments before them. Words of a text that only a shell can split are left
        whole."""
        try:
            words = shlex.split(self.text.replace("\\\n", " "), comments=True)
        except ValueError:
            words = self.text.split()
        while words and _ASSIGNMENT.match(words[0]):
            words.pop(0)
        return words

    @property
    def first(self) -> str:
        return self.words[0].removeprefix(".venv/bin/") if self.words else ""

    def of_ours(self) -> Iterator[list[str]]:
        """Each `r3mes-vllm ...` in it, to where it ends."""
        words = self.words
        for at, word in enumerate(words):
            if word.rpartition("/")[2] in OURS:
                rest = words[at + 1 :]
                end = next(
                    (i for i, it in enumerate(rest) if it in ("|", "&&", ";", ">", "&")), None
                )
                yield rest[:end]


def commands(block: Block) -> Iterator[Command]:
    """One after the other; a line goes on while it is no whole command."""
    held = ""
    for line in block.text.splitlines():
        if not held and (not line.strip() or line.lstrip().startswith("#")):
            continue
        held = f"{held}\n{line}" if held else line
        if not held.endswith("\\") and _is_whole(held):
            yield Command(block, held)
            held = ""
    if held:
        raise AssertionError(f"{block}: no shell takes {held!r}")


def _is_whole(text: str) -> bool:
    done = subprocess.run(["bash", "-n", "-c", text], capture_output=True, text=True)
    return done.returncode == 0 and "here-document" not in done.stderr
