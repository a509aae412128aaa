"""`/api`: adapters and nodes make themselves known. Shapes as in the existing network."""

import math
from collections.abc import Mapping
from typing import Annotated

from fastapi import APIRouter, Query, Request

from r3mes_vllm import wire
from r3mes_vllm.backend.bodies import registration
from r3mes_vllm.backend.cids import check_cid
from r3mes_vllm.backend.endpoints import check_endpoint
from r3mes_vllm.backend.keys import demand
from r3mes_vllm.backend.refusals import BadInput, UnknownNode
from r3mes_vllm.backend.state import backend_of

_TEXT_LIMIT = 10_000
_WORD_LIMIT = 128
_STATUS_LIMIT = 32
_CID_LIMIT = 256
_DAY_S = 86_400

router = APIRouter(prefix="/api")


@router.post("/lora/register")
async def register_lora(request: Request) -> wire.LoraRegistered:
    backend = backend_of(request)
    demand(backend.admin_keys, request)
    lora = await registration(request, wire.RegisterLora)
    check_cid(lora.ipfs_hash, field="ipfs_hash")
    _at_most(_TEXT_LIMIT, description=lora.description)
    _at_most(_WORD_LIMIT, category=lora.category, version=lora.version)
    lora_id, created = await backend.registry.register_lora(lora, backend.clock())
    return wire.LoraRegistered(
        success=True, action="created" if created else "updated", lora_id=lora_id
    )


@router.get("/lora/list")
async def list_loras(request: Request, active_only: bool = True) -> list[wire.Lora]:
    return await backend_of(request).registry.loras(active_only=active_only)


@router.post("/serving-node/register")
async def register_node(request: Request) -> wire.Registered:
    backend = backend_of(request)
    node = await registration(request, wire.RegisterNode)
    for name in node.available_lora_list:
        _at_most(_WORD_LIMIT, available_lora_list=name)
    _check_adapters(node.adapters)
    _at_most(_WORD_LIMIT, version=node.version, base_model=node.base_model)
    url = await check_endpoint(
        node.endpoint_url, allow_private=backend.allow_private_nodes, resolve=backend.resolve
    )
    node = node.model_copy(update={"endpoint_url": url})
    node_id, created = await backend.registry.register_node(node, backend.clock())
    return wire.Registered(
        success=True, action="created" if created else "updated", node_id=node_id
    )


@router.post("/serving-node/heartbeat")
async def heartbeat(request: Request) -> wire.Ack:
    backend = backend_of(request)
    beat = await registration(request, wire.Heartbeat)
    _at_most(_STATUS_LIMIT, status=beat.status)
    _at_most(_WORD_LIMIT, version=beat.version)
    _check_adapters(beat.adapters or {})
    if not (math.isfinite(beat.current_load) and beat.current_load >= 0):
        raise BadInput("current_load: must be a number from 0 up", field="current_load")
    if not await backend.registry.beat(beat, backend.clock()):
        raise _unknown(beat.wallet_address)
    return wire.Ack(success=True)


@router.post("/serving-node/deregister")
async def deregister(request: Request) -> wire.Ack:
    backend = backend_of(request)
    leaving = await registration(request, wire.Deregister)
    if not await backend.registry.deregister_node(leaving.wallet_address):
        raise _unknown(leaving.wallet_address)
    return wire.Ack(success=True)


@router.get("/serving-node/list")
async def list_nodes(
    request: Request,
    lora: Annotated[str | None, Query(max_length=_WORD_LIMIT)] = None,
    max_age_seconds: Annotated[int, Query(ge=1, le=_DAY_S)] = wire.HEARTBEAT_TIMEOUT_S,
) -> wire.NodeList:
    backend = backend_of(request)
    nodes = await backend.registry.live_nodes(backend.clock(), max_age_seconds)
    if lora is not None:
        nodes = [node for node in nodes if lora in node.available_lora_list]
    return wire.NodeList(nodes=nodes, count=len(nodes))


def _check_adapters(adapters: Mapping[str, str]) -> None:
    for name, cid in adapters.items():
        _at_most(_WORD_LIMIT, adapters=name)
        _at_most(_CID_LIMIT, adapters=cid)


def _at_most(limit: int, **fields: str | None) -> None:
    for field, value in fields.items():
        if value is not None and len(value) > limit:
            raise BadInput(f"{field}: longer than {limit} characters", field=field)


def _unknown(wallet: str) -> UnknownNode:
    return UnknownNode(f"no node is registered as {wallet}", hint="register it first")
