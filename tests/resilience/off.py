"""Take each protection away, and see that its test fails.

    python -m tests.resilience.off [NUMBER ...]

Each in a copy of the tree, without a change here, where the test must first pass as it is. Prints a
line for each; exit status 1 if a test passed without its protection, failed with it, or did not
run.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tests.resilience.properties import PROPERTIES, Switch

ROOT = Path(__file__).parents[2]
_TIMEOUT_S = 900
_ENDS_S = 60


@dataclass(frozen=True)
class Ran:
    """A run of pytest."""

    code: int
    said: str

    @property
    def passed(self) -> bool:
        """At least one did, and none failed; what was only skipped has shown nothing."""
        return self.code == 0 and bool(re.search(r"\b[1-9]\d* passed", self.said))

    @property
    def failed(self) -> bool:
        """At least one did; one that could not begin, or be collected, is an error."""
        return self.code == 1 and bool(re.search(r"\b[1-9]\d* failed", self.said))


def problem(with_it: Ran, without: Ran | None) -> str:
    """What is wrong with a test of a protection; nothing if it fails for want of that alone."""
    if not with_it.passed:
        return "DOES NOT PASS AS IT IS"
    if without is None or not without.failed:
        return "DID NOT RUN" if without is None or not without.passed else "DOES NOT FAIL"
    return ""


def edited(switch: Switch, root: Path = ROOT) -> str:
    """The file's text without the protection. Raises ValueError unless it is there once, and
    SyntaxError if it would be no program."""
    text = (root / "r3mes_vllm" / switch.file).read_text()
    if text.count(switch.before) != 1:
        raise ValueError(f"{switch.file} has {text.count(switch.before)} times: {switch.before}")
    changed = text.replace(switch.before, switch.after)
    compile(changed, switch.file, "exec", dont_inherit=True)
    return changed


def tried(switch: Switch) -> tuple[str, str]:
    """What is wrong with its test, or nothing, and what pytest said."""
    with_it = _run_as_it_is(switch.test)
    without = _run(switch.test, switch) if with_it.passed else None
    return problem(with_it, without), (without or with_it).said


@cache
def _run_as_it_is(test: str) -> Ran:
    return _run(test)


def _run(test: str, without: Switch | None = None) -> Ran:
    """In a copy of the tree."""
    with tempfile.TemporaryDirectory(prefix="off-") as name:
        copy = Path(name)
        for part in ("r3mes_vllm", "tests", "configs", "benchmarks", "docs"):
            shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", copy)
        if without:
            (copy / "r3mes_vllm" / without.file).write_text(edited(without))
        running = subprocess.Popen(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", test],
            cwd=copy,
            env=os.environ | {"PYTHONPATH": str(copy)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            said, _ = running.communicate(timeout=_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            said = _ended(running) + f"\nit had not ended after {_TIMEOUT_S} s"
        return Ran(running.returncode, said)


def _ended(running: "subprocess.Popen[str]") -> str:
    """What it said; it may first end what it started."""
    running.send_signal(signal.SIGINT)
    try:
        return running.communicate(timeout=_ENDS_S)[0]
    except subprocess.TimeoutExpired:
        running.kill()
        return running.communicate()[0]


def main() -> int:
    wanted = set(map(int, sys.argv[1:])) or {it.number for it in PROPERTIES}
    if unknown := wanted - {it.number for it in PROPERTIES}:
        sys.exit(f"there is no property {min(unknown)}")
    bad = 0
    for it in PROPERTIES:
        for place, switch in enumerate(it.switches if it.number in wanted else (), 1):
            began = time.monotonic()
            wrong, said = tried(switch)
            which = f" ({place} of {len(it.switches)})" if len(it.switches) > 1 else ""
            word = wrong or "fails, as it must"
            took = time.monotonic() - began
            print(f"{it.number:2} {it.name}{which}: {word} ({took:.0f} s)", flush=True)
            if wrong:
                bad += 1
                print(said[-3000:])
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
