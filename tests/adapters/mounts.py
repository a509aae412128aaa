"""File systems for tests, which only root can mount: without it their tests are skipped."""

import subprocess
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest


def tmpfs(folder: Path, options: str) -> AbstractContextManager[Path]:
    """`options` as of `mount`, such as `size=4m`."""
    folder.mkdir()
    return _mounted(folder, "-t", "tmpfs", "-o", options, "tmpfs")


def image(file: Path, folder: Path) -> AbstractContextManager[Path]:
    """What is in `file`, the image of a disk."""
    folder.mkdir()
    return _mounted(folder, "-o", "loop", str(file))


@contextmanager
def read_only(folder: Path, view: Path) -> Iterator[Path]:
    """`folder` as it is seen at `view`, where nothing can be written."""
    view.mkdir(exist_ok=True)
    with _mounted(view, "--bind", str(folder)):
        subprocess.run(["mount", "-o", "remount,bind,ro", str(view)], check=True)
        yield view


@contextmanager
def _mounted(folder: Path, *options: str) -> Iterator[Path]:
    if subprocess.run(["mount", *options, str(folder)], capture_output=True).returncode:
        pytest.skip("a file system can only be mounted by root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)
