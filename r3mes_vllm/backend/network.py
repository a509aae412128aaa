"""`/api/serving-node`: nodes make themselves known. Shapes as in the existing network."""

import math
from collections.abc import Collection, Mapping
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request, Response

from r3mes_vllm import wire
from r3mes_vllm.backend.bodies import WORD_LIMIT, at_most
from r3mes_vllm.backend.endpoints import check_endpoint
from r3mes_vllm.backend.refusals import BadInput, UnknownNode
from r3mes_vllm.backend.signed import check_wallet, from_node
from r3mes_vllm.backend.state import backend_of

_STATUS_LIMIT = 32
_CID_LIMIT = 256
_MOST_ADAPTERS = 10_000
"""Of one node."""
_DAY_S = 86_400

router = APIRouter(prefix="/api/serving-node")


@router.post("/register", response_model_exclude_none=True)
async def register_node(request: Request) -> wire.Registered:
    backend = backend_of(request)
    node, claim = await from_node(request, wire.RegisterNode)
    check_wallet(node.wallet_address, claim)
    _check_number(available_lora_list=node.available_lora_list)
    for name in node.available_lora_list:
        at_most(WORD_LIMIT, available_lora_list=name)
    _check_adapters(node.adapters)
    at_most(WORD_LIMIT, version=node.version, base_model=node.base_model)
    url = await check_endpoint(
        node.endpoint_url, allow_private=backend.allow_private_nodes, resolve=backend.resolve
    )
    names = [*dict.fromkeys(node.available_lora_list)]
    node = node.model_copy(update={"endpoint_url": url, "available_lora_list": names})
    node_id, created = await backend.registry.register_node(node, backend.clock(), claim)
    if claim and (known := await backend.registry.node(node.wallet_address)):
        backend.prover.look(known)
    action: Literal["created", "updated"] = "created" if created else "updated"
    told = backend.told.model_dump()
    return wire.Registered(success=True, action=action, node_id=node_id, **told)


@router.post("/heartbeat", response_model_exclude_none=True)
async def heartbeat(request: Request) -> wire.Ack:
    backend = backend_of(request)
    beat, claim = await from_node(request, wire.Heartbeat)
    at_most(_STATUS_LIMIT, status=beat.status)
    at_most(WORD_LIMIT, version=beat.version)
    _check_adapters(beat.adapters or {})
    if not (math.isfinite(beat.current_load) and beat.current_load >= 0):
        raise BadInput("current_load: must be a number from 0 up", field="current_load")
    node = await backend.registry.beat(beat, backend.clock(), claim)
    if node is None:
        raise _unknown(beat.wallet_address)
    backend.prover.look(node)
    return wire.Ack(success=True, **backend.told.model_dump())


@router.post("/deregister", response_model_exclude_none=True)
async def deregister(request: Request) -> wire.Ack:
    backend = backend_of(request)
    leaving, claim = await from_node(request, wire.Deregister)
    if not await backend.registry.deregister_node(leaving.wallet_address, claim):
        raise _unknown(leaving.wallet_address)
    return wire.Ack(success=True)


@router.get("/list")
async def list_nodes(
    request: Request,
    lora: Annotated[str | None, Query(max_length=WORD_LIMIT)] = None,
    max_age_seconds: Annotated[int, Query(ge=1, le=_DAY_S)] = wire.HEARTBEAT_TIMEOUT_S,
) -> Response:
    """A `wire.NodeList`."""
    backend = backend_of(request)
    nodes = await backend.live_nodes(max_age_seconds)
    if lora is not None:  # who asks this wants to send one of them a request
        gone = backend.registry.is_deactivated(lora)
        nodes = [
            n for n in nodes if backend.balancer.may_be_asked(n) and lora in n.names and not gone
        ]
    body = b'{"nodes":%b,"count":%d}' % (backend.registry.nodes_json(nodes), len(nodes))
    return Response(body, media_type="application/json")


def _check_number(**fields: Collection[str]) -> None:
    for field, names in fields.items():
        if len(names) > _MOST_ADAPTERS:
            raise BadInput(f"{field}: more than {_MOST_ADAPTERS} adapters", field=field)


def _check_adapters(adapters: Mapping[str, str]) -> None:
    _check_number(adapters=adapters)
    for name, cid in adapters.items():
        at_most(WORD_LIMIT, adapters=name)
        at_most(_CID_LIMIT, adapters=cid)


def _unknown(wallet: str) -> UnknownNode:
    return UnknownNode(f"no node is registered as {wallet}", hint="register it first")
