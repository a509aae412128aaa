"""`POST /identity`: proof that the node's key answers at its public URL.

Anyone may ask: the answer holds nothing that a list of nodes does not show, and the text that is
signed is of a kind of its own, of which only the nonce is the caller's.
"""

from typing import Annotated

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationError
from starlette.responses import JSONResponse, Response

from r3mes_vllm.errors import BadRequest
from r3mes_vllm.identity import Identity
from r3mes_vllm.signatures import NONCE_PATTERN, endpoint_text
from r3mes_vllm.wire import Proof

router = APIRouter()


class _Challenge(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)

    nonce: Annotated[str, StringConstraints(pattern=NONCE_PATTERN)]


@router.post("/identity")
async def identity(request: Request) -> Response:
    node = request.app.state.r3mes
    try:
        nonce = _Challenge.model_validate_json(await request.body()).nonce
    except ValidationError:
        error = BadRequest(
            "nonce: must be 64 hexadecimal digits in small letters",
            hint='send {"nonce": "0123..."}',
        )
        return JSONResponse(error.body(), error.status)
    return JSONResponse(prove(node.identity, nonce, node.settings.public_url).model_dump())


def prove(identity: Identity, nonce: str, url: str) -> Proof:
    signature = identity.sign(endpoint_text(nonce, url))
    return Proof(key=identity.public_key.hex(), url=url, signature=signature.hex())
