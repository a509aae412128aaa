"""`/api/lora`: which adapters there are. Shapes as in the existing network."""

from typing import Annotated, TypeVar

from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel

from r3mes_vllm import signatures, wire
from r3mes_vllm.backend.bodies import API_BODY_LIMIT, WORD_LIMIT, at_most, parsed, read_body
from r3mes_vllm.backend.cids import check_cid
from r3mes_vllm.backend.keys import demand
from r3mes_vllm.backend.loras import Author
from r3mes_vllm.backend.refusals import BadInput
from r3mes_vllm.backend.routing import base_models
from r3mes_vllm.backend.signed import claim_of
from r3mes_vllm.backend.state import Backend, backend_of
from r3mes_vllm.keys import presented

_TEXT_LIMIT = 10_000
_MODEL_LIMIT = 256

Model = TypeVar("Model", bound=BaseModel)

router = APIRouter(prefix="/api/lora")


@router.post("/register")
async def register(request: Request) -> wire.LoraRegistered:
    backend = backend_of(request)
    body, author = await _authored(request)
    lora = parsed(body, wire.RegisterLora)
    check_cid(lora.ipfs_hash, field="ipfs_hash")
    at_most(_TEXT_LIMIT, description=lora.description)
    at_most(WORD_LIMIT, category=lora.category, version=lora.version)
    at_most(_MODEL_LIMIT, base_model=lora.base_model)
    if not (author.is_admin or backend.registry.is_registered(lora.name)):
        await _check_base(backend, lora.name)
    lora_id, created = await backend.registry.register_lora(lora, backend.clock(), author)
    action: wire.LoraAction = "created" if created else "updated"
    return wire.LoraRegistered(success=True, action=action, lora_id=lora_id)


@router.post("/{name}/deactivate")
async def deactivate(request: Request, name: wire.AdapterName) -> wire.LoraRegistered:
    return await _set_active(request, name, active=False)


@router.post("/{name}/activate")
async def activate(request: Request, name: wire.AdapterName) -> wire.LoraRegistered:
    return await _set_active(request, name, active=True)


@router.get("/list")
async def list_all(
    request: Request,
    active_only: bool = True,
    category: Annotated[str | None, Query(max_length=WORD_LIMIT)] = None,
) -> Response:
    registry = backend_of(request).registry
    body, tag = registry.loras_json(active_only=active_only, category=category)
    headers = {"ETag": tag} if tag else {}
    if tag and request.headers.get("if-none-match") == tag:
        return Response(status_code=304, headers=headers)
    return Response(body, media_type="application/json", headers=headers)


@router.get("/{name}/versions")
async def versions(request: Request, name: wire.AdapterName) -> list[wire.LoraVersion]:
    return await backend_of(request).registry.lora_versions(name)


async def _check_base(backend: Backend, name: str) -> None:
    if name in await base_models(backend):
        raise BadInput(
            f"name: {name} is the base model of a node", field="name", hint="take another name"
        )


async def _set_active(request: Request, name: str, *, active: bool) -> wire.LoraRegistered:
    _, author = await _authored(request)
    registry = backend_of(request).registry
    lora_id = await registry.set_lora_active(name, author, active=active)
    action: wire.LoraAction = "activated" if active else "deactivated"
    return wire.LoraRegistered(success=True, action=action, lora_id=lora_id)


async def _authored(request: Request) -> tuple[bytes, Author]:
    """The body, and who sends it. Raises Unauthorized for who neither signs nor has the admin's
    key where that is needed; BadSignature."""
    backend = backend_of(request)
    if signatures.KEY not in request.headers:
        demand(backend.admin_keys, request)
    body = await read_body(request, API_BODY_LIMIT)
    author = Author(
        is_admin=backend.admin_keys.accept(presented(request.headers)),
        claim=claim_of(request, body, backend.clock()),
        is_open=not backend.admin_keys.needed,
    )
    return body, author
