"""`CID`, `CID/path/inside`, `/ipfs/CID/path` or `ipfs://CID/path`."""

from dataclasses import dataclass

from r3mes_vllm.errors import BadCID
from r3mes_vllm.ipfs.cid import CID

_MOST_NAMES = 64


@dataclass(frozen=True)
class IpfsPath:
    root: CID
    names: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> "IpfsPath":
        """Raises BadCID."""
        plain = text.removeprefix("ipfs://").removeprefix("/ipfs/").rstrip("/")
        root, *names = plain.split("/")
        if len(names) > _MOST_NAMES or any(name in ("", ".", "..") for name in names):
            raise BadCID(f"{text[:100]!r} is no path below a CID")
        return cls(CID.parse(root), tuple(names))

    def __str__(self) -> str:
        return "/".join((str(self.root), *self.names))
