"""The operator's routes: which adapters are here, how far each has come, another one, one less."""

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, ValidationError
from starlette.responses import JSONResponse, Response

from r3mes_vllm.adapters.catalog import checked_name
from r3mes_vllm.engine.host import Host
from r3mes_vllm.engine.version import Version
from r3mes_vllm.errors import BadRequest, ConfigError, R3mesError
from r3mes_vllm.ipfs.path import IpfsPath
from r3mes_vllm.validation import first_mistake

router = APIRouter()


class _Put(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: str
    cid: str


@router.get("/adapters")
async def adapters(request: Request) -> Response:
    """Paths stay on this machine."""
    host: Host = request.app.state.r3mes.host
    await host.look_at_slots()
    return JSONResponse({"adapters": [view(it) for it in host.versions]})


@router.post("/adapters")
async def put_adapter(request: Request) -> Response:
    """Fetch, vet and load it, then let the name lead to it; answered when that is done."""
    node = request.app.state.r3mes
    try:
        asked = _read(await request.body())
        cid = await node.supply.resolve(IpfsPath.parse(asked.cid))
        version = await node.host.put(checked_name(asked.name), cid)
        node.registry.fixed.add(asked.name)
    except ConfigError as error:
        return _refusal(BadRequest(f"name: {error}"))
    except R3mesError as error:
        return _refusal(error)
    return JSONResponse({"success": True, "adapter": view(version)})


@router.delete("/adapters/{name:path}")
async def remove_adapter(request: Request, name: str) -> Response:
    """New requests for it are 404 from now on; those under way finish."""
    try:
        version = request.app.state.r3mes.host.remove(name)
    except R3mesError as error:
        return _refusal(error)
    return JSONResponse({"success": True, "adapter": view(version)})


@router.post("/drain")
async def drain(request: Request) -> Response:
    """As SIGTERM: no new requests, those that run finish, then the node ends. Twice: at once."""
    request.app.state.drain.begin()
    return JSONResponse({"success": True, "requests": request.app.state.load.running}, 202)


def _read(body: bytes) -> _Put:
    try:
        return _Put.model_validate_json(body)
    except ValidationError as error:
        hint = 'send {"name": "legal", "cid": "baf..."}'
        raise BadRequest(first_mistake(error), hint=hint) from error


def _refusal(error: R3mesError) -> Response:
    return JSONResponse(error.body(), error.status, error.headers)


def view(it: Version) -> dict[str, object]:
    """As `/adapters` shows it."""
    return {
        "name": it.name,
        "names": sorted(it.names),
        "cid": it.cid,
        "state": it.state,
        "since": it.since,
        "requests": it.uses,
        "rank": it.rank,
        "bytes": it.size,
    }
