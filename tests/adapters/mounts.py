"""File systems for tests, which only root can mount: without it their tests are skipped."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def tmpfs(folder: Path, options: str) -> Iterator[Path]:
    """`options` as of `mount`, such as `size=4m`."""
    folder.mkdir()
    _mount(folder, "-t", "tmpfs", "-o", options, "tmpfs")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@contextmanager
def image(file: Path, folder: Path) -> Iterator[Path]:
    """What is in `file`, the image of a disk."""
    folder.mkdir()
    _mount(folder, "-o", "loop", str(file))
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@contextmanager
def read_only(folder: Path, view: Path) -> Iterator[Path]:
    """`folder` as it is seen at `view`, where nothing can be written."""
    view.mkdir(exist_ok=True)
    _mount(view, "--bind", str(folder))
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", str(view)], check=True)
        yield view
    finally:
        subprocess.run(["umount", str(view)], check=True)


def _mount(folder: Path, *options: str) -> None:
    if subprocess.run(["mount", *options, str(folder)], capture_output=True).returncode:
        pytest.skip("a file system can only be mounted by root")
