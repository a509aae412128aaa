"""Just enough of CIDs for a registry: is this text one, and are these two the same?"""

import re
from functools import lru_cache

from multiformats_cid import make_cid

from r3mes_vllm.backend.refusals import BadInput

# CIDv0 is base58btc of 34 bytes. CIDv1 has a multibase prefix: base32, base36, base58btc or
# base64url. The 36 bytes of a sha2-256 CID are 48 characters of base64url; identity CIDs are
# shorter but hold no adapter.
_CID = re.compile(
    r"Qm[1-9A-HJ-NP-Za-km-z]{44}"
    r"|b[a-z2-7]{50,200}"
    r"|k[0-9a-z]{50,200}"
    r"|z[1-9A-HJ-NP-Za-km-z]{46,200}"
    r"|u[A-Za-z0-9_-]{46,200}"
)


def is_cid(text: str) -> bool:
    """Whether `text` is spelt like a CID; no more than that is looked at."""
    return _CID.fullmatch(text) is not None


def check_cid(text: str, *, field: str) -> None:
    """Raise BadInput naming `field` if `text` is obviously no CID."""
    if not is_cid(text):
        raise BadInput(
            f"{field}: {text[:80]!r} is not a CID",
            field=field,
            hint="a CID begins with Qm or bafy: `r3mes-vllm adapter publish DIR` prints it",
        )


@lru_cache(maxsize=4096)
def canonical(text: str) -> str:
    """One spelling (CIDv1, base32) for all spellings of a CID; other text stays as it is."""
    if not is_cid(text):
        return text
    try:
        cid = make_cid(text)
        spelt: bytes = (cid if cid.version == 1 else cid.to_v1()).encode("base32")
    except (ValueError, TypeError, KeyError, IndexError):
        return text
    return spelt.decode()
