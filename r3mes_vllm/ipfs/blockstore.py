"""Blocks on disk by hash, in the layout of Kubo's and js-ipfs's `blocks` folder (flatfs,
next-to-last/2): so the repository of a daemon that isn't running can be read too."""

import base64
import os
import tempfile
from pathlib import Path
from typing import BinaryIO

from r3mes_vllm.ipfs.cid import CID, Data


class BlockStore:
    """One file a block under `directory`. A block whose file was cut or changed is not there."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def keep(self, cid: CID, data: Data) -> None:
        """Keep `data`, which the caller has checked."""
        path = self._path(cid)
        path.parent.mkdir(parents=True, exist_ok=True)
        fd, aside = tempfile.mkstemp(dir=path.parent)
        try:
            with open(fd, "wb") as file:
                file.write(data)
            os.replace(aside, path)
        except BaseException:
            os.unlink(aside)
            raise

    def get(self, cid: CID) -> bytes | None:
        try:
            data = self._path(cid).read_bytes()
        except FileNotFoundError:
            return None
        return data if cid.matches(data) else None

    def _path(self, cid: CID) -> Path:
        name = base64.b32encode(cid.multihash).decode().rstrip("=")
        return self._directory / f"_{name}"[-3:-1] / f"{name}.data"


class Aside:
    """Blocks for a while, in one file in `directory` that has no name and goes with its process:
    many small ones cost no more than a few large ones, and no time to remove. One thread."""

    def __init__(self, directory: Path) -> None:
        self.bytes = 0
        """Kept so far, with what was taken."""
        self._directory = directory
        self._file: BinaryIO | None = None
        self._places: dict[CID, tuple[int, int]] = {}

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, cid: CID) -> bool:
        return cid in self._places

    def keep(self, cid: CID, data: Data) -> None:
        """Raises OSError."""
        if self._file is None:
            self._file = tempfile.TemporaryFile(dir=self._directory, buffering=0)  # noqa: SIM115
        os.pwrite(self._file.fileno(), data, self.bytes)
        self._places[cid] = self.bytes, len(data)
        self.bytes += len(data)

    def take(self, cid: CID) -> bytes | None:
        """The block, which is forgotten; None if it is not here as a whole. Raises OSError."""
        if self._file is None or cid not in self._places:
            return None
        at, length = self._places.pop(cid)
        data = os.pread(self._file.fileno(), length, at)
        return data if cid.matches(data) else None

    def close(self) -> None:
        self._places.clear()
        if self._file is not None:
            self._file.close()
