"""`CID`, `CID/path/inside`, `/ipfs/CID/path`, `ipfs://CID/path` or `https://GATEWAY/ipfs/CID/path`."""

import re
from dataclasses import dataclass
from urllib.parse import unquote

from r3mes_vllm.errors import BadCID
from r3mes_vllm.ipfs.cid import CID

_MOST_NAMES = 64
_URL = re.compile(r"(?:ipfs://|https?://[^/?#]+/ipfs/)([^?#]*)", re.IGNORECASE)


@dataclass(frozen=True)
class IpfsPath:
    root: CID
    names: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> "IpfsPath":
        """Only in URLs are percent signs and what follows the path read as URLs have them; the host
        of one is not asked. Raises BadCID."""
        plain = text.lstrip()
        if url := _URL.match(plain):
            parts = [_decoded(part) for part in url[1].rstrip("/").split("/")]
        else:
            parts = plain.removeprefix("/ipfs/").rstrip("/").split("/")
        root, names = parts[0].rstrip(), parts[1:]
        if len(names) > _MOST_NAMES or any(
            name in ("", ".", "..") or "/" in name for name in names
        ):
            raise BadCID(f"{text[:100]!r} is no path below a CID")
        return cls(CID.parse(root), tuple(names))

    def __str__(self) -> str:
        return "/".join((str(self.root), *self.names))


def _decoded(part: str) -> str:
    try:
        return unquote(part, errors="strict")
    except UnicodeDecodeError as error:
        raise BadCID(f"{part[:100]!r} is no UTF-8 in percent signs") from error
