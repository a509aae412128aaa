"""Print a lock of `requirements/` without what an image does not need, its hashes with it.

    python runtime_lock.py cpu                  all but the tests' tools
    python runtime_lock.py cuda --on-vllm       also without what vLLM's own image brings: its CUDA
                                                stack, which is what no other lock names, and IMAGES
    python runtime_lock.py cpu --only build     what building the wheel takes

Only the standard library: it runs before anything is installed.
"""

import argparse
import re
import sys
from importlib import metadata
from pathlib import Path

LOCKS = Path(__file__).parents[2] / "requirements"
TEST_ONLY = Path(__file__).with_name("test-only.txt")
BUILD = ("hatchling", "editables", "packaging", "pathspec", "pluggy", "trove-classifiers")
"""What `pip wheel --no-build-isolation .` needs."""
IMAGES = {"setuptools"}
"""vLLM bounds it for Pythons after 3.11 only: the image's has another than the lock's."""


def entries(lock: str) -> dict[str, str]:
    """The name of each package → its lines."""
    found = re.split(r"^(?=[A-Za-z0-9])", (LOCKS / f"{lock}.lock").read_text(), flags=re.MULTILINE)
    return {_name(entry): entry for entry in found if "==" in entry}


def chosen(lock: str, *, on_vllm: bool, only: list[str] | None = None) -> dict[str, str]:
    every = entries(lock)
    if only:
        return {name: every[name] for name in only}
    left_out = set(TEST_ONLY.read_text().split())
    if on_vllm:
        left_out |= (every.keys() - entries("cpu").keys()) | IMAGES
    return {name: entry for name, entry in every.items() if name not in left_out}


def refuse_another_vllm(lock: str) -> None:
    """The image's vLLM must be the one that the lock was made for."""
    wanted = entries(lock)["vllm"].split("==")[1].split()[0]
    found = metadata.version("vllm").split("+")[0]
    if found != wanted:
        sys.exit(f"error: the base image has vllm {found}, the lock {wanted}: change its tag")


def _name(entry: str) -> str:
    return re.sub(r"[-_.]+", "-", entry.split("==")[0].split("[")[0]).lower()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("lock", choices=("cpu", "cuda"))
    parser.add_argument("--on-vllm", action="store_true")
    parser.add_argument("--only", choices=("build",))
    given = parser.parse_args()
    if given.on_vllm:
        refuse_another_vllm(given.lock)
    only = list(BUILD) if given.only else None
    print("".join(chosen(given.lock, on_vllm=given.on_vllm, only=only).values()), end="")


if __name__ == "__main__":
    main()
