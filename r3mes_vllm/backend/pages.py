"""What people and monitors look at: `/`, `/health`, `/ready`, `/metrics`."""

from html import escape

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST

from r3mes_vllm.backend.routing import served
from r3mes_vllm.backend.state import backend_of

router = APIRouter()

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>R3MES</title>
<style>body{{font:16px system-ui;margin:2rem;max-width:60rem}}
table{{border-collapse:collapse}}td,th{{text-align:left;padding:.3rem 1rem .3rem 0}}</style></head>
<body><h1>R3MES</h1>
<h2>Adapters</h2><table><tr><th>Name<th>CID<th>Base model</tr>{adapters}</table>
<h2>Nodes</h2><table><tr><th>Wallet<th>Adapters<th>Last beat</tr>{nodes}</table>
</body></html>
"""


@router.get("/")
async def index(request: Request) -> HTMLResponse:
    backend = backend_of(request)
    adapters = [(a.name, a.cid or "", a.base_model or "") for a in await served(backend)]
    nodes = [
        (
            node.wallet_address,
            ", ".join(node.available_lora_list),
            f"{node.last_heartbeat:%Y-%m-%d %H:%M:%S} UTC",
        )
        for node in await backend.live_nodes()
    ]
    page = _PAGE.format(adapters=_rows(adapters), nodes=_rows(nodes))
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return HTMLResponse(page, headers={"Content-Security-Policy": policy})


@router.get("/health")
@router.get("/ready")
async def health(request: Request) -> dict[str, object]:
    """200 while the database answers. A backend without nodes is ready too: they register here."""
    backend = backend_of(request)
    nodes = await backend.live_nodes()
    return {"status": "ok", "nodes": len(nodes)}


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    backend = backend_of(request)
    backend.metrics.nodes.set(len(await backend.live_nodes()))
    backend.metrics.adapters.set(len(await served(backend)))
    return Response(backend.metrics.text(), headers={"Content-Type": CONTENT_TYPE_LATEST})


def _rows(rows: list[tuple[str, str, str]]) -> str:
    return "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
