"""Verified blocks on disk, by hash. A block that is not what its CID says is never kept."""

import os
import tempfile
from pathlib import Path

from r3mes_vllm.ipfs.cid import CID


class BlockStore:
    """One file a block under `directory`. A block whose file was cut or changed is not there."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        # Written by this process: checked once, on the way in.
        self._sound: set[CID] = set()

    def put(self, cid: CID, data: bytes, source: str) -> None:
        """Keep `data` if it is what `cid` names. Raises BlockMismatch naming `source`."""
        cid.check(data, source)
        self.keep(cid, data)

    def keep(self, cid: CID, data: bytes) -> None:
        """Keep `data`, which the caller has checked."""
        path = self._path(cid)
        fd, aside = tempfile.mkstemp(dir=self._directory)
        try:
            with open(fd, "wb") as file:
                file.write(data)
            os.replace(aside, path)
        except BaseException:
            os.unlink(aside)
            raise
        self._sound.add(cid)

    def get(self, cid: CID) -> bytes | None:
        if cid.inline is not None:
            return cid.inline
        try:
            data = self._path(cid).read_bytes()
        except FileNotFoundError:
            return None
        if cid not in self._sound:
            if not cid.matches(data):
                return None
            self._sound.add(cid)
        return data

    def has(self, cid: CID) -> bool:
        return cid in self._sound or self.get(cid) is not None

    def _path(self, cid: CID) -> Path:
        return self._directory / cid.multihash.hex()
