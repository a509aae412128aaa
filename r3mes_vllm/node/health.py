"""`/health`, `/ready` and `/v1/models`."""

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse

from r3mes_vllm import __version__

router = APIRouter()


@router.get("/health")
async def health(request: Request) -> JSONResponse:
    """200 while the engine generates; 503 with the reason otherwise."""
    node = request.app.state.r3mes
    trouble = await node.canary.trouble()
    body = {
        "status": "ok" if trouble is None else "error",
        "available_loras": [hosted.name for hosted in node.host.adapters],
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
    trouble = await node.canary.trouble()
    if trouble is None and not node.host.adapters:
        trouble = "no adapter is ready"
    if trouble is not None:
        return JSONResponse({"ready": False, "reason": trouble}, 503)
    return JSONResponse({"ready": True})


@router.get("/v1/models")
async def models(request: Request) -> JSONResponse:
    return JSONResponse(await request.app.state.r3mes.host.models())


@router.get("/adapters")
async def adapters(request: Request) -> JSONResponse:
    """The admin's view: what is hosted. Paths stay on this machine."""
    hosted = request.app.state.r3mes.host.adapters
    return JSONResponse(
        {
            "adapters": [
                {"name": it.name, "cid": it.cid, "rank": it.rank, "bytes": it.size} for it in hosted
            ]
        }
    )
