"""Blocks on disk by hash, in the layout of Kubo's and js-ipfs's `blocks` folder (flatfs,
next-to-last/2): so the repository of a daemon that isn't running can be read too."""

import base64
import os
import tempfile
from pathlib import Path

from r3mes_vllm.ipfs.cid import CID


class BlockStore:
    """One file a block under `directory`. A block whose file was cut or changed is not there."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def keep(self, cid: CID, data: bytes) -> None:
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

    def take(self, cid: CID) -> bytes | None:
        """`get`, and forget it."""
        data = self.get(cid)
        self._path(cid).unlink(missing_ok=True)
        return data

    def _path(self, cid: CID) -> Path:
        name = base64.b32encode(cid.multihash).decode().rstrip("=")
        return self._directory / f"_{name}"[-3:-1] / f"{name}.data"
