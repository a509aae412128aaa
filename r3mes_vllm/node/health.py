"""`/health`, `/ready` and `/v1/models`."""

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from r3mes_vllm import __version__
from r3mes_vllm.node.refusals import openai_refusal

router = APIRouter()

DRAINING, NO_ADAPTER = "draining", "no adapter is ready"


@router.get("/health")
async def health(request: Request) -> JSONResponse:
    """200 while the engine generates, by the canary's last look; 503 with the reason otherwise."""
    node = request.app.state.r3mes
    trouble = node.canary.trouble
    body = {
        "status": "ok" if trouble is None else "error",
        "available_loras": list(node.host.adapters),
        "model": node.host.base_model,
        "version": __version__,
    }
    registration = request.app.state.standing.registration
    if registration and registration.upgrade:
        body["upgrade"] = registration.upgrade
    if trouble is not None:
        return JSONResponse(body | {"reason": trouble}, 503)
    return JSONResponse(body)


@router.get("/ready")
async def ready(request: Request) -> JSONResponse:
    """200 only when the node should get traffic."""
    if (reason := not_ready(request)) is not None:
        return JSONResponse({"ready": False, "reason": reason}, 503)
    return JSONResponse({"ready": True})


def not_ready(request: Request) -> str | None:
    """Why the node should get no traffic; None if it should."""
    node = request.app.state.r3mes
    if node.canary.trouble is not None:
        return str(node.canary.trouble)
    if node.canary.stopping or request.app.state.load.draining:
        return DRAINING
    return None if node.host.adapters else NO_ADAPTER


@router.get("/v1/models")
async def models(request: Request) -> JSONResponse:
    return JSONResponse(await request.app.state.r3mes.host.models())


@router.get("/v1/models/{name:path}")
async def model(request: Request, name: str) -> Response:
    listing = await request.app.state.r3mes.host.models()
    for entry in listing["data"]:
        if entry["id"] == name:
            return JSONResponse(entry)
    return openai_refusal(404, "model_not_found", f"no model {name[:200]!r} here", field="model")
