"""Who sends a node's request: its signature, checked as far as that goes without the registry.

What the registry adds: that the wallet has no other key, and that the request is a new one.
"""

from datetime import datetime
from typing import TypeVar

from fastapi import Request
from pydantic import BaseModel

from r3mes_vllm import identity, signatures
from r3mes_vllm.backend.bodies import API_BODY_LIMIT, parsed, read_body
from r3mes_vllm.backend.refusals import BadSignature, WrongKey
from r3mes_vllm.backend.state import backend_of
from r3mes_vllm.signatures import TOLERANCE_S, Claim

Model = TypeVar("Model", bound=BaseModel)


async def from_node(request: Request, model: type[Model]) -> tuple[Model, Claim | None]:
    """The body as a `model`, and who signed it; None if nobody did and that is allowed.

    Raises BadInput and BadSignature.
    """
    backend = backend_of(request)
    body = await read_body(request, API_BODY_LIMIT)
    claim = claim_of(request, body, backend.clock())
    if claim is None and backend.require_signatures:
        raise BadSignature(
            "this backend takes signed requests only",
            hint="run a node that signs: a current `r3mes-vllm serve` does",
        )
    return parsed(body, model), claim


def claim_of(request: Request, body: bytes, now: datetime) -> Claim | None:
    """Who signed `request`, at about `now`; None if it has no signature. Raises BadSignature."""
    try:
        found = signatures.from_headers(request.headers)
    except ValueError as error:
        raise BadSignature(str(error)) from error
    if found is None:
        return None
    claim, signature = found
    text = signatures.request_text(claim, request.method, request.scope["path"], body)
    if not signatures.is_signed(claim.key, signature, text):
        raise BadSignature("the signature is not this key's for this request")
    check_time(claim, now)
    return claim


def check_time(claim: Claim, now: datetime) -> None:
    """Raise BadSignature unless `claim` is of about `now`."""
    late = now.timestamp() - claim.time
    if abs(late) > TOLERANCE_S:
        raise BadSignature(
            f"the request was signed more than {TOLERANCE_S} s "
            f"{'before' if late > 0 else 'after'} the time here",
            hint="set the node's clock",
        )
    if claim.boot_time > claim.time + TOLERANCE_S:
        # A boot of next year would keep every other one of this key out until then.
        raise BadSignature(
            f"{signatures.BOOT} began after the request was signed",
            hint="set the node's clock and restart the node",
        )


def check_wallet(wallet: str, claim: Claim | None) -> None:
    """Raise WrongKey if `wallet` was derived from a key, and `claim` has another one."""
    if claim and identity.is_derived(wallet) and identity.wallet_of(claim.key) != wallet:
        raise WrongKey(f"{wallet} was derived from another key than the one that signed")
