"""Where paths below a CID lead: that never changes, so whoever was told once need not ask again."""

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path

from r3mes_vllm.errors import BadCID
from r3mes_vllm.ipfs.cid import CID
from r3mes_vllm.ipfs.path import IpfsPath

_MOST = 1000
_writing = threading.Lock()


class Paths:
    """In a file that is replaced as a whole. Of two processes that write it at once one is not
    heard; where it can't be written or read nothing is remembered."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def get(self, path: IpfsPath) -> CID | None:
        try:
            return CID.parse(self._read()[str(path)])
        except (KeyError, BadCID):
            return None

    def remember(self, path: IpfsPath, cid: CID) -> None:
        """The oldest of many are forgotten."""
        with _writing:
            known = {**self._read(), str(path): str(cid)}
            self._write(dict(list(known.items())[-_MOST:]))

    def collect(self, is_here: Callable[[str], bool]) -> None:
        """Forget those that lead to what is not here."""
        with _writing:
            known = self._read()
            kept = {path: cid for path, cid in known.items() if is_here(cid)}
            if kept != known:
                self._write(kept)

    def _read(self) -> dict[str, str]:
        try:
            known = json.loads(self._file.read_bytes())
        except (OSError, ValueError):
            return {}
        if not isinstance(known, dict):
            return {}
        return {path: cid for path, cid in known.items() if isinstance(cid, str)}

    def _write(self, known: dict[str, str]) -> None:
        aside = self._file.with_name(f".{self._file.name}.{os.getpid()}")
        try:
            aside.write_text(json.dumps(known))
            os.replace(aside, self._file)
        except OSError:
            pass
