"""`/chat` and `/v1`: find who can answer, and pass the request on."""

from collections.abc import Awaitable, Callable

from fastapi import APIRouter, Request
from starlette.types import Scope

from r3mes_vllm import wire
from r3mes_vllm.backend.bodies import INFERENCE_BODY_LIMIT, parse_object, read_body, validated
from r3mes_vllm.backend.choice import question
from r3mes_vllm.backend.conversations import conversation
from r3mes_vllm.backend.course import EVENTS, Course
from r3mes_vllm.backend.dial import Outgoing
from r3mes_vllm.backend.elsewhere import Asked
from r3mes_vllm.backend.fallback import loading, sources
from r3mes_vllm.backend.headers import to_node
from r3mes_vllm.backend.keys import demand
from r3mes_vllm.backend.known import KnownNode
from r3mes_vllm.backend.proxy import Relay
from r3mes_vllm.backend.refusals import BadInput
from r3mes_vllm.backend.routing import (
    Servable,
    any_nodes,
    base_models,
    holders,
    model_nodes,
    served,
    served_version,
)
from r3mes_vllm.backend.state import Backend, backend_of
from r3mes_vllm.errors import AdapterNotReady, R3mesError, UnknownAdapter

router = APIRouter()

Find = Callable[[str | None], Awaitable[list[KnownNode]]]
"""From a name to the nodes to try. Raises UnknownAdapter, AdapterNotReady."""

ASKED = "r3mes.asked"
"""In a request's scope: the name that is asked for, of an adapter or a base model."""


def asks_a_model(scope: Scope) -> bool:
    path: str = scope["path"]
    return scope["method"] == "POST" and (path == "/chat" or path.startswith("/v1/"))


@router.post("/chat")
async def chat(request: Request) -> Relay:
    backend = backend_of(request)
    demand(backend.client_keys, request)
    asked, word = await _asked_chat(request, backend)

    async def find(named: str | None) -> list[KnownNode]:
        if named is None:
            return await any_nodes(backend, conversation=word)
        return await holders(backend, named, conversation=word)

    return await _relay(request, backend, find, asked, word)


async def _asked_chat(request: Request, backend: Backend) -> tuple[Asked, str | None]:
    """What is asked for, and the word for its conversation. What the body is in Python ends here:
    it may be many times as large."""
    body = await read_body(request, INFERENCE_BODY_LIMIT)
    ask = validated(wire.ChatRequest, fields := parse_object(body))
    if not (ask.message or ask.messages):
        raise BadInput("message: is missing or empty", field="message")
    adapter = ask.adapter or request.headers.get("x-adapter") or None
    if adapter is None:
        names = await Servable.now(backend)
        adapter = backend.policy(question(ask), names)
        adapter = adapter if adapter in names else None
    lora = await backend.registry.lora(adapter.partition("@")[0]) if adapter else None
    headers = to_node(request, name=backend.name, adapter=adapter)
    asked = Asked(
        name=adapter,
        path="/chat",
        headers=headers,
        body=body,
        streams=ask.stream,
        events=EVENTS in request.headers.get("accept", ""),
        system_prompt=lora.system_prompt if lora else None,
    )
    return asked, conversation(adapter or "", fields)


@router.post("/v1/chat/completions")
@router.post("/v1/completions")
@router.post("/v1/responses")
@router.post("/v1/embeddings")
async def openai(request: Request) -> Relay:
    backend = backend_of(request)
    demand(backend.client_keys, request)
    asked, word = await _asked_openai(request, backend)

    async def find(named: str | None) -> list[KnownNode]:
        return await model_nodes(backend, named or asked.name or "", conversation=word)

    return await _relay(request, backend, find, asked, word)


async def _asked_openai(request: Request, backend: Backend) -> tuple[Asked, str | None]:
    """As `_asked_chat`."""
    body = await read_body(request, INFERENCE_BODY_LIMIT)
    fields = parse_object(body)
    model = fields.get("model")
    if not isinstance(model, str) or not model:
        raise BadInput("model: must be a string that names a model", field="model")
    asked = Asked(
        name=model,
        path=request.scope["path"],
        headers=to_node(request, name=backend.name, adapter=None),
        body=body,
        streams=fields.get("stream") is True,
    )
    return asked, conversation(model, fields)


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
    if version := await served_version(backend, model):
        return _model(model, version.created, version.base_model, version.cid)
    raise UnknownAdapter(f"no model {model[:300]!r} is served", hint="GET /v1/models lists them")


async def _models(backend: Backend) -> list[dict[str, object]]:
    bases = await base_models(backend)
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


async def _found(find: Find, named: str | None) -> tuple[list[KnownNode], R3mesError | None]:
    """The nodes to try, and why there are none."""
    try:
        return await find(named), None
    except AdapterNotReady as error:
        return [], error


async def _relay(
    request: Request,
    backend: Backend,
    find: Find,
    asked: Asked,
    word: str | None,
) -> Relay:
    """`find` gives the nodes to try for a name: the one that was `asked`, and for the rest of an
    answer the very version that began it. `word` is for its conversation."""

    async def rest(course: Course) -> list[KnownNode]:
        if course.adapter and course.cid:
            version = f"{course.adapter}@{course.cid}"
            nodes, _ = await _found(find, version)
            nodes = [*nodes, *await loading(backend, version)]
        else:
            nodes = await find(asked.name)
        return [it for it in nodes if it.base_model == course.base_model]

    request.scope[ASKED] = asked.name
    nodes, missing = await _found(find, asked.name)
    path, headers, body = asked.path, asked.headers, asked.body
    return Relay(
        nodes,
        Outgoing(path, headers, body, streams=asked.streams, conversation=word),
        name=asked.name,
        missing=missing,
        others=sources(backend, asked),
        rest=rest,
        dialler=backend.dialler,
        timeouts=backend.timeouts,
        metrics=backend.metrics,
    )
