"""What a person reads while a program starts: one line a phase, with its seconds.

Lines go to the real standard output: vLLM puts a prefix before all that is printed in its
processes.
"""

import functools
import os
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TransferSpeedColumn,
)

if TYPE_CHECKING:
    from r3mes_vllm.ipfs.race import Progress as Fetched

_LONG_S = 2.0
_LINE_S = 10.0


@functools.cache
def console() -> Console:
    out = os.fdopen(os.dup(1), "w", buffering=1)
    return Console(file=out, highlight=False, soft_wrap=True)


def say(text: str) -> None:
    console().print(text, markup=False)


def line(text: str) -> None:
    """As `say`, for many a second."""
    console().file.write(f"{text}\n")


def warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)


class Downloads:
    """A bar for each adapter under way, on a terminal; a line every ten seconds elsewhere."""

    def __init__(self) -> None:
        self._bars = Progress(
            TextColumn("  {task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TextColumn("{task.fields[said]}"),
            console=console(),
            transient=True,
            disable=not sys.stdout.isatty(),
        )
        self._tasks: dict[str, TaskID] = {}
        self._said: dict[str, float] = {}

    def __enter__(self) -> "Downloads":
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def of(self, name: str) -> "Callable[[Fetched], None]":
        return functools.partial(self.show, name)

    def show(self, name: str, fetched: "Fetched") -> None:
        """Called from any thread."""
        said = f"from {fetched.source}" if fetched.source else "asking"
        if fetched.waited_s > _LONG_S:
            said += f", nothing for {fetched.waited_s:.0f} s"
        if self._bars.disable:
            self._say(name, fetched, said)
            return
        if name not in self._tasks:
            self._tasks[name] = self._bars.add_task(name, total=None, said="")
        self._bars.update(
            self._tasks[name],
            completed=fetched.bytes_verified,
            total=fetched.bytes_declared,
            said=said,
        )

    def _say(self, name: str, fetched: "Fetched", said: str) -> None:
        now = time.monotonic()
        if now - self._said.setdefault(name, now) > _LINE_S:
            self._said[name] = now
            of = f" of {fetched.bytes_declared}" if fetched.bytes_declared else ""
            print(f"  {name}: {fetched.bytes_verified}{of} bytes, {said}", file=sys.stderr)


_began: dict[str, float] = {}


def begin(name: str) -> None:
    """A phase starts."""
    _began[name] = time.monotonic()


def done(name: str, text: str) -> None:
    """The phase is over: `base model: NAME (0.2 s)`, without the seconds if it never began here."""
    began = _began.pop(name, None)
    say(f"{name}: {text}" + (f" ({time.monotonic() - began:.1f} s)" if began else ""))
