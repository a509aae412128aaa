"""Have the engine's processes a core when they want one? Else they are slow, and do not hang."""

import time
from collections.abc import Iterator
from pathlib import Path

import psutil

_PROC = Path("/proc")


class Cores:
    """Of all processes that `pid` (this one, if None) has started, and theirs."""

    def __init__(self, pid: int | None = None) -> None:
        self._pid = pid
        self._at = 0.0
        self._threads: dict[Path, tuple[int, int]] = {}

    def waited(self) -> float:
        """Seconds since the last call for which a thread wanted a core and had none, of the thread
        that waited longest; 0 the first time, and where Linux does not tell."""
        before, began = self._threads, self._at
        self._threads, self._at = {}, time.monotonic()
        longest = 0.0
        for thread in self._each():
            try:
                ran, waited, _ = map(int, (thread / "schedstat").read_text().split())
                state = (thread / "stat").read_text().rpartition(")")[2].split()[0]
            except (OSError, ValueError):
                continue  # it ended, or this kernel does not count
            self._threads[thread] = ran, waited
            if thread not in before:
                continue
            if state == "R" and before[thread] == (ran, waited):
                longest = self._at - began  # Linux counts a wait when it is over
            longest = max(longest, (waited - before[thread][1]) / 1e9)
        return min(longest, self._at - began)

    def _each(self) -> Iterator[Path]:
        try:
            for process in psutil.Process(self._pid).children(recursive=True):
                yield from (_PROC / str(process.pid) / "task").glob("*")
        except (psutil.Error, OSError):
            return
