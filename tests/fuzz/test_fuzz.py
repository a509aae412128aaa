"""A little fuzzing; `make fuzz SECONDS=3600` goes on for longer."""

import subprocess
import sys
from pathlib import Path


def fuzz(target: str, seconds: int, corpus: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.fuzz", target, "--corpus", str(corpus)]
    return subprocess.run(
        [*command, "--seconds", str(seconds)], capture_output=True, text=True, timeout=600
    )


def test_a_little_fuzzing_finds_nothing(tmp_path: Path) -> None:
    found = fuzz("all", 20, tmp_path)
    assert found.returncode == 0, found.stdout[-6000:] + found.stderr[-2000:]


def test_a_planted_fault_is_found(tmp_path: Path) -> None:
    found = fuzz("planted", 30, tmp_path)
    assert found.returncode != 0
    assert list((tmp_path / "planted").glob("crash-*"))
