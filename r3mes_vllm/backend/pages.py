"""What monitors look at: `/health`, `/ready`, `/metrics`."""

from fastapi import APIRouter, Request
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST

from r3mes_vllm import __version__
from r3mes_vllm.backend.refusals import DatabaseDown
from r3mes_vllm.backend.routing import served
from r3mes_vllm.backend.state import backend_of

router = APIRouter()


@router.get("/health")
async def health(request: Request) -> dict[str, object]:
    """200 while it can route, which goes on for minutes without the database."""
    backend = backend_of(request)
    nodes = len(await backend.live_nodes())
    since = backend.registry.down_since
    answer = {"status": "ok", "nodes": nodes, "version": __version__}
    return answer | ({"database_down_since": since} if since else {})


@router.get("/ready")
async def ready(request: Request) -> dict[str, object]:
    """200 while the database answers too. A backend without nodes is ready: they register here."""
    if since := backend_of(request).registry.down_since:
        raise DatabaseDown(f"the registry's database has not answered since {since:%H:%M:%S} UTC")
    return await health(request)


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    backend = backend_of(request)
    backend.metrics.nodes.set(len(await backend.live_nodes()))
    backend.metrics.adapters.set(len(await served(backend)))
    return Response(backend.metrics.text(), headers={"Content-Type": CONTENT_TYPE_LATEST})
