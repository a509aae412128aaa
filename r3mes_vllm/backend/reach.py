"""`POST /api/serving-node/reach`: whether this backend reaches a node at its public URL.

It dials for a stranger, so: signed callers only, a few a minute, one fixed path, the rules of any
node's URL, and an answer that tells apart no more than the caller needs.
"""

import json
import secrets
from typing import Literal

import httpx
from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, ValidationError

from r3mes_vllm import signatures, wire
from r3mes_vllm.backend.dial import Outgoing
from r3mes_vllm.backend.endpoints import check_endpoint, normal_form
from r3mes_vllm.backend.refusals import BadInput, BadSignature, NodeFailed, RateLimited
from r3mes_vllm.backend.signed import check_wallet, from_node
from r3mes_vllm.backend.state import Backend, backend_of
from r3mes_vllm.rates import REQUESTS, Meter, allowances

_A_MINUTE = 6
"""Of one key, and of one address: keys cost nothing."""
_TIMEOUT_S = 5.0
_ANSWER_BYTES = 4096
_HEADERS = [
    (b"content-type", b"application/json"),
    (b"accept", b"application/json"),
    (b"accept-encoding", b"identity"),
]

Reason = Literal["not_allowed", "refused", "timed_out", "not_a_node", "other_key"]

router = APIRouter(prefix="/api/serving-node")


class Reach(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)

    wallet_address: wire.Wallet
    endpoint_url: str


class Reached(BaseModel):
    reachable: bool
    reason: Reason | None
    address: str
    """The caller's, as it is seen from here."""


@router.post("/reach")
async def reach(request: Request) -> Reached:
    backend = backend_of(request)
    asked, claim = await from_node(request, Reach)
    if claim is None:
        raise BadSignature("only signed requests are called back")
    check_wallet(asked.wallet_address, claim)
    address = request.client.host if request.client else ""
    _take_turn(request, claim.key.hex(), address)
    reason = await _failure(backend, normal_form(asked.endpoint_url), claim.key)
    return Reached(reachable=reason is None, reason=reason, address=address)


def _take_turn(request: Request, key: str, address: str) -> None:
    state = request.app.state
    if not hasattr(state, "reach_meter"):
        state.reach_meter = Meter()
    meter: Meter = state.reach_meter
    of = allowances(REQUESTS, key, _A_MINUTE, address, _A_MINUTE)
    if over := meter.over(of):
        raise RateLimited(f"over {over}", retry_after=meter.retry_after(over))
    meter.take(of, 1)


async def _failure(backend: Backend, url: str, key: bytes) -> Reason | None:
    try:
        await check_endpoint(
            url, allow_private=backend.allow_private_nodes, resolve=backend.resolve
        )
    except BadInput:
        return "not_allowed"
    nonce = secrets.token_hex(32)
    challenge = Outgoing("/identity", _HEADERS, json.dumps({"nonce": nonce}).encode())
    try:
        answer = await backend.dialler.exchange(
            url, challenge, limit=_ANSWER_BYTES, timeout_s=_TIMEOUT_S
        )
        proof = wire.Proof.model_validate_json(answer)
        said = normal_form(proof.url)
    except NodeFailed as error:
        if isinstance(error.__cause__, TimeoutError | httpx.TimeoutException):
            return "timed_out"
        return "refused" if isinstance(error.__cause__, httpx.ConnectError) else "not_a_node"
    except (ValidationError, BadInput):
        return "not_a_node"
    text = signatures.endpoint_text(nonce, proof.url)
    is_signed = signatures.is_signed(key, bytes.fromhex(proof.signature), text)
    return None if proof.key == key.hex() and said == url and is_signed else "other_key"
