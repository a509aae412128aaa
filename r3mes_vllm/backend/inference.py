"""`/chat` and `/v1`: find who can answer, and pass the request on."""

from fastapi import APIRouter, Request

from r3mes_vllm import wire
from r3mes_vllm.backend.bodies import INFERENCE_BODY_LIMIT, parse_object, read_body, validated
from r3mes_vllm.backend.choice import question
from r3mes_vllm.backend.dial import Outgoing
from r3mes_vllm.backend.headers import request_id, to_node
from r3mes_vllm.backend.keys import demand
from r3mes_vllm.backend.proxy import Relay
from r3mes_vllm.backend.refusals import BadInput
from r3mes_vllm.backend.routing import (
    any_nodes,
    base_models,
    holders,
    model_nodes,
    served,
)
from r3mes_vllm.backend.state import Backend, backend_of
from r3mes_vllm.errors import UnknownAdapter

router = APIRouter()


@router.post("/chat")
async def chat(request: Request) -> Relay:
    backend = backend_of(request)
    demand(backend.client_keys, request)
    body = await read_body(request, INFERENCE_BODY_LIMIT)
    ask = validated(wire.ChatRequest, parse_object(body))
    if not (ask.message or ask.messages):
        raise BadInput("message: is missing or empty", field="message")
    adapter = ask.adapter or request.headers.get("x-adapter") or None
    if adapter is None:
        names = [adapter.name for adapter in await served(backend)]
        adapter = backend.policy(question(ask), names)
        adapter = adapter if adapter in names else None
    nodes = await (any_nodes(backend) if adapter is None else holders(backend, adapter))
    return _relay(request, backend, nodes, body, adapter)


@router.post("/v1/chat/completions")
@router.post("/v1/completions")
@router.post("/v1/responses")
@router.post("/v1/embeddings")
async def openai(request: Request) -> Relay:
    backend = backend_of(request)
    demand(backend.client_keys, request)
    body = await read_body(request, INFERENCE_BODY_LIMIT)
    model = parse_object(body).get("model")
    if not isinstance(model, str) or not model:
        raise BadInput("model: must be a string that names a model", field="model")
    return _relay(request, backend, await model_nodes(backend, model), body, None)


@router.get("/v1/models")
async def models(request: Request) -> dict[str, object]:
    backend = backend_of(request)
    demand(backend.client_keys, request)
    return {"object": "list", "data": await _models(backend)}


@router.get("/v1/models/{model:path}")
async def model(request: Request, model: str) -> dict[str, object]:
    backend = backend_of(request)
    demand(backend.client_keys, request)
    for entry in await _models(backend):
        if entry["id"] == model:
            return entry
    raise UnknownAdapter(f"no model {model[:300]!r} is served", hint="GET /v1/models lists them")


async def _models(backend: Backend) -> list[dict[str, object]]:
    bases = base_models(backend.balancer.routable(await backend.live_nodes()))
    return [_model(base, 0, None, None) for base in bases] + [
        _model(adapter.name, adapter.created, adapter.base_model, adapter.cid)
        for adapter in await served(backend)
        if adapter.name not in bases
    ]


def _model(name: str, created: int, parent: str | None, cid: str | None) -> dict[str, object]:
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "r3mes",
        "parent": parent,
        "cid": cid,
    }


def _relay(
    request: Request, backend: Backend, nodes: list[wire.Node], body: bytes, adapter: str | None
) -> Relay:
    this = request_id(request)
    headers = to_node(request, name=backend.name, adapter=adapter, request_id=this)
    return Relay(
        nodes,
        Outgoing(request.scope["path"], headers, body),
        dialler=backend.dialler,
        timeouts=backend.timeouts,
        metrics=backend.metrics,
        request_id=this,
    )
