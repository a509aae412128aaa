"""What a person reads while a program starts: one line a phase, with its seconds.

Lines go to the real standard output: vLLM puts a prefix before all that is printed in its
processes.
"""

import functools
import os
import sys
import time

from rich.console import Console


@functools.cache
def console() -> Console:
    out = os.fdopen(os.dup(1), "w", buffering=1)
    return Console(file=out, highlight=False, soft_wrap=True)


def say(text: str) -> None:
    console().print(text, markup=False)


def warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)


_began: dict[str, float] = {}


def begin(name: str) -> None:
    """A phase starts."""
    _began[name] = time.monotonic()


def done(name: str, text: str) -> None:
    """The phase is over: `base model: NAME (0.2 s)`, without the seconds if it never began here."""
    began = _began.pop(name, None)
    say(f"{name}: {text}" + (f" ({time.monotonic() - began:.1f} s)" if began else ""))
