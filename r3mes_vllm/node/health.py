"""`/health`, `/ready` and `/v1/models`."""

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse

from r3mes_vllm import __version__

router = APIRouter()


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
    if trouble is not None:
        return JSONResponse(body | {"reason": trouble}, 503)
    return JSONResponse(body)


@router.get("/ready")
async def ready(request: Request) -> JSONResponse:
    """200 only when the node should get traffic."""
    node = request.app.state.r3mes
    trouble = node.canary.trouble
    if trouble is None and node.canary.stopping:
        trouble = "shutting down"
    if trouble is None and not node.host.adapters:
        trouble = "no adapter is ready"
    if trouble is not None:
        return JSONResponse({"ready": False, "reason": trouble}, 503)
    return JSONResponse({"ready": True})


@router.get("/v1/models")
async def models(request: Request) -> JSONResponse:
    return JSONResponse(await request.app.state.r3mes.host.models())
