"""Adapters in the database: each has a name, and a name may have an owner.

Whoever signs the request that makes a name owns it, and then only that key and the admin may change
it. A name that was made unsigned has no owner until the admin signs a change of it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import func, select

from r3mes_vllm import wire
from r3mes_vllm.backend.cids import canonical
from r3mes_vllm.backend.claims import claimed
from r3mes_vllm.backend.database import LoraRow, LoraVersionRow
from r3mes_vllm.backend.refusals import Deactivated, Replayed, Unauthorized, WrongKey
from r3mes_vllm.backend.writing import Change
from r3mes_vllm.errors import R3mesError, UnknownAdapter
from r3mes_vllm.signatures import Claim, not_yet

LORAS: Any = LoraRow.__table__
VERSIONS: Any = LoraVersionRow.__table__
MOST_VERSIONS = 1000
"""Told of one adapter; there may be any number."""

_MOST_EARLIER = 4

_ADMIN, _OWNER = "admin", "owner"


@dataclass(frozen=True)
class Author:
    """Who asks for a change."""

    is_admin: bool
    claim: Claim | None
    is_open: bool
    """Anyone may make names, and change those that have no owner: there is no admin."""


async def register(
    change: Change, lora: wire.RegisterLora, now: datetime, author: Author
) -> tuple[Any, bool]:
    """The row of `lora`, and whether it is new. Raises as `refusal`."""
    before = await change.first(select(LORAS).where(LORAS.c.name == lora.name))
    if refused := refusal(lora.name, before, author):
        raise refused
    values = lora.model_dump() | {"is_active": True, "deactivated_by": None}
    values |= _kept(before, author) | {"earlier": _earlier(before, lora.ipfs_hash)}
    row, created = await change.upsert(LORAS, LORAS.c.name, values, now)
    version = {
        "lora_id": row["id"],
        "ipfs_hash": lora.ipfs_hash,
        "version": lora.version,
        "registered_at": now,
    }
    noted = change.insert(VERSIONS).values(version).on_conflict_do_nothing()
    await change.connection.execute(noted)
    return row, created


async def set_active(change: Change, name: str, author: Author, *, active: bool) -> Any:
    """The row of `name`. Raises UnknownAdapter, and as `refusal`."""
    before = await change.first(select(LORAS).where(LORAS.c.name == name))
    if refused := refusal(name, before, author):
        raise refused
    if before is None:
        raise unknown(name)
    by = None if active else _ADMIN if author.is_admin else _OWNER
    values = {"is_active": active, "deactivated_by": by} | _kept(before, author)
    values |= {} if active else {"earlier": []}
    return (await change.update(LORAS, LORAS.c.id == before["id"], values))[0]


def refusal(name: str, row: Mapping[str, Any] | None, author: Author) -> R3mesError | None:
    """Why `author` may not change the adapter `name`, whose row is `row` if it has one."""
    if author.is_admin:
        return None
    owner = row["public_key"] if row else None
    if owner is None and not author.is_open:
        return Unauthorized(
            f"only the admin may register {name}: it has no owner",
            hint="send Authorization: Bearer KEY with the admin's key; sign too, to own it",
        )
    if owner is not None:
        if author.claim is None:
            return WrongKey(
                f"{name} belongs to a key, and this request has no signature",
                hint="r3mes-vllm adapter publish signs with the key of the state directory",
            )
        if author.claim.key.hex() != owner:
            return WrongKey(
                f"{name} belongs to another key",
                hint="publish where it was published first, or under another name",
            )
        if row and not is_later(row, author.claim):
            return Replayed("this request, or a later one of the same key, was here before")
    if row and row["deactivated_by"] == _ADMIN:
        return Deactivated(f"the admin has deactivated {name}")
    return None


def is_later(row: Mapping[str, Any], claim: Claim) -> bool:
    """As `claims.is_later`, of a request of the row's owner."""
    seen: str = row["boot"]
    return (claim.boot, claim.sequence) > (seen, row["sequence"]) or seen >= not_yet(claim)


def versions_of(ids: Sequence[int], most: int) -> Any:
    """What gives the last `most` versions of each adapter, the latest first."""
    place = func.row_number().over(partition_by=VERSIONS.c.lora_id, order_by=VERSIONS.c.id.desc())
    placed = select(VERSIONS, place.label("place")).where(VERSIONS.c.lora_id.in_(ids)).subquery()
    return select(placed).where(placed.c.place <= most).order_by(placed.c.id.desc())


def unknown(name: str) -> UnknownAdapter:
    return UnknownAdapter(
        f"no adapter is registered as {name[:300]!r}", hint="GET /api/lora/list shows them"
    )


def _earlier(row: Mapping[str, Any] | None, cid: str) -> list[str]:
    """What the name in `row` stood for before `cid`."""
    if row is None or not row["is_active"]:
        return []
    cids = dict.fromkeys([row["ipfs_hash"], *row["earlier"]])
    return [it for it in cids if canonical(it) != canonical(cid)][:_MOST_EARLIER]


def _kept(row: Mapping[str, Any] | None, author: Author) -> dict[str, Any]:
    """What the row keeps of who changed it."""
    if (claim := author.claim) is None:
        return {}
    owner = row["public_key"] if row else None
    if owner is None:
        return claimed(claim) if row is None or author.is_admin else {}
    is_its = claim.key.hex() == owner and row is not None and is_later(row, claim)
    return claimed(claim) if is_its else {}
