"""Which rows a signed request may change. The conditions are part of the UPDATE itself, so that of
two equal requests one gets through."""

from datetime import datetime
from typing import Any

from sqlalchemy import and_, or_

from r3mes_vllm.backend.database import NodeRow
from r3mes_vllm.identity import is_derived
from r3mes_vllm.signatures import Claim, not_yet

_NODES: Any = NodeRow.__table__


def claimed(claim: Claim | None) -> dict[str, Any]:
    """What a row keeps of the request that changed it."""
    if claim is None:
        return {}
    return {"public_key": claim.key.hex(), "boot": claim.boot, "sequence": claim.sequence}


def may_change(claim: Claim | None) -> Any:
    """The nodes of the request's key, if none like it was there before."""
    if claim is None:
        return _NODES.c.public_key.is_(None)
    return and_(_NODES.c.public_key == claim.key.hex(), is_later(claim))


def may_register(claim: Claim | None, wallet: str, oldest: datetime) -> Any:
    """The same, and rows without a key, to which the first signature gives one; but who does not
    sign keeps its wallet from strangers if it beat after `oldest`, unless the wallet itself names
    the key."""
    free = _NODES.c.public_key.is_(None)
    if claim and not is_derived(wallet):
        free = and_(free, is_silent(oldest))
    return or_(free, may_change(claim))


def is_silent(oldest: datetime) -> Any:
    """Whatever the status: anyone may set that of a node that does not sign."""
    return _NODES.c.last_heartbeat <= oldest


def is_forgettable(oldest: datetime, oldest_unproven: datetime) -> Any:
    """As `View.silent`."""
    is_unproven = or_(
        _NODES.c.public_key.is_(None),
        _NODES.c.proof_url.is_(None),
        _NODES.c.proof_url != _NODES.c.endpoint_url,
        _NODES.c.proof_failure.is_not(None),
    )
    return or_(
        _NODES.c.last_heartbeat <= oldest,
        and_(_NODES.c.last_heartbeat <= oldest_unproven, is_unproven),
    )


def is_later(claim: Claim) -> Any:
    """Rows that have seen neither this request nor a later one; also what they have seen by a clock
    that has been set back since."""
    rises = and_(_NODES.c.boot == claim.boot, _NODES.c.sequence < claim.sequence)
    return or_(_NODES.c.boot < claim.boot, rises, _NODES.c.boot >= not_yet(claim))
