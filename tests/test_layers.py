"""Imports go down only: docs and reviews rely on it that the backend knows nothing of vLLM."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import r3mes_vllm

ROOT = Path(r3mes_vllm.__file__).parent
MAY_IMPORT = {
    "ipfs": {"ipfs"},
    "adapters": {"adapters", "ipfs"},
    "engine": {"engine", "adapters", "ipfs"},
    "node": {"node", "engine", "adapters", "ipfs"},
    "backend": {"backend"},
}
"""From a room to the rooms it may know; what lies beside them is for all."""


def imported(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (it.name for it in node.names)


def breaches(room: str, source: str) -> list[str]:
    found = []
    for name in imported(source):
        package, _, inner = name.partition(".")
        other = inner.partition(".")[0]
        if package == "r3mes_vllm" and other in MAY_IMPORT and other not in MAY_IMPORT[room]:
            found.append(name)
        if package in ("vllm", "torch") and room != "engine":
            found.append(name)
    return found


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_room_imports_what_it_may(room: str) -> None:
    files = list((ROOT / room).rglob("*.py"))
    assert files
    found = {str(it.relative_to(ROOT)): breaches(room, it.read_text()) for it in files}
    assert not {file: names for file, names in found.items() if names}


def test_a_breach_is_seen() -> None:
    source = "import vllm.outputs\nfrom r3mes_vllm.engine.host import Host\n"
    assert breaches("backend", source) == ["vllm.outputs", "r3mes_vllm.engine.host"]


@pytest.mark.parametrize("module", ["node.startup", "backend.server", "cli.main"])
def test_vllm_is_imported_after_a_mistake_could_be_said(module: str) -> None:
    """It takes seconds, which a misspelt option is not worth."""
    program = f"import sys, r3mes_vllm.{module}; sys.exit('vllm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
