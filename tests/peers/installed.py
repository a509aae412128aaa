"""Others' programs that the tests talk to, installed once into the user's cache, each as its lock
says."""

import fcntl
import hashlib
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import platformdirs

_HERE = Path(__file__).parent
_PYTHON = _HERE / "requirements.txt"


def npm(package: str, beside: Path = _HERE) -> Path:
    """A copy of the npm package in the folder `beside`, with its `node_modules`."""

    def install(folder: Path) -> None:
        shutil.copytree(beside / package, folder, dirs_exist_ok=True)
        _run(["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"], folder)

    if not shutil.which("npm"):
        raise RuntimeError("Node.js and npm are needed: apt-get install nodejs npm")
    return _once(package, beside / package / "package-lock.json", install)


def python() -> Path:
    """A folder with what `tests/peers/requirements.txt` names, to be put on a path."""

    def install(folder: Path) -> None:
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install"]
        _run([*pip, "--no-deps", "--target", str(folder), "--requirement", str(_PYTHON)], folder)

    return _once("python", _PYTHON, install)


def environment(name: str, requirements: Path) -> Path:
    """The `python` of a virtual environment with that and nothing else."""

    def install(folder: Path) -> None:
        _run([sys.executable, "-m", "venv", "--without-pip", str(folder)], folder)
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
        there = ["--python", str(folder / "bin" / "python"), "install", "--no-deps"]
        _run([*pip, *there, "--requirement", str(requirements)], folder)

    return _once(name, requirements, install) / "bin" / "python"


def _once(name: str, lock_file: Path, install: Callable[[Path], None]) -> Path:
    cache = Path(platformdirs.user_cache_dir("r3mes-vllm-tests"))
    ready = cache / f"{name}-{hashlib.sha256(lock_file.read_bytes()).hexdigest()[:16]}"
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not ready.is_dir():
            aside = cache / f"{name}-installing"
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir()
            install(aside)
            aside.rename(ready)
    return ready


def _run(command: list[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=900)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[:4])} failed: {done.stderr[-2000:]}")
