"""Take each protection away, and see that its test fails.

    python -m tests.resilience.off [NUMBER ...]

Each in a copy of the tree, without a change here. Prints a line for each; exit status 1 if a test
passed without its protection, or did not run.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.resilience.properties import PROPERTIES, Property, Switch

ROOT = Path(__file__).parents[2]
_TIMEOUT_S = 900


def edited(switch: Switch, root: Path = ROOT) -> str:
    """The file's text without the protection. Raises ValueError unless it is there once."""
    text = (root / "r3mes_vllm" / switch.file).read_text()
    if text.count(switch.before) != 1:
        raise ValueError(f"{switch.file} has {text.count(switch.before)} times: {switch.before}")
    return text.replace(switch.before, switch.after)


def failed_without(it: Property) -> tuple[bool, str]:
    """Whether its test failed, as it must, and what pytest said."""
    with tempfile.TemporaryDirectory(prefix="off-") as name:
        copy = Path(name)
        for part in ("r3mes_vllm", "tests", "configs", "benchmarks", "docs"):
            shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", copy)
        (copy / "r3mes_vllm" / it.switch.file).write_text(edited(it.switch))
        found = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", it.switch.test],
            cwd=copy,
            env=os.environ | {"PYTHONPATH": str(copy)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=_TIMEOUT_S,
        )
    counted = re.search(r"(\d+) failed", found.stdout)
    return bool(found.returncode == 1 and counted), found.stdout


def main() -> int:
    wanted = set(map(int, sys.argv[1:])) or {it.number for it in PROPERTIES}
    bad = 0
    for it in PROPERTIES:
        if it.number not in wanted:
            continue
        began = time.monotonic()
        failed, said = failed_without(it)
        word = "fails, as it must" if failed else "DOES NOT FAIL"
        print(f"{it.number:2} {it.name}: {word} ({time.monotonic() - began:.0f} s)", flush=True)
        if not failed:
            bad += 1
            print(said[-3000:])
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
