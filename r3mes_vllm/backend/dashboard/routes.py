"""`/`, `/dashboard/data` and the page's files."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from fastapi import APIRouter, HTTPException, Request
from fastapi.responses import HTMLResponse, Response

from r3mes_vllm.backend.dashboard.page import POLICY, render
from r3mes_vllm.backend.dashboard.traffic import SLOT_S, Traffic
from r3mes_vllm.backend.dashboard.view import Latest, View
from r3mes_vllm.backend.state import backend_of

router = APIRouter()

_TYPES = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_YEAR_S = 31_536_000
_HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}


@dataclass(frozen=True)
class _File:
    content: bytes
    media_type: str
    digest: str


def _read(path: Path) -> _File:
    content = path.read_bytes()
    return _File(content, _TYPES[path.suffix], hashlib.sha256(content).hexdigest()[:16])


_FILES = {path.name: _read(path) for path in (Path(__file__).parent / "static").iterdir()}
# Without a slash in front: the page may be behind a proxy that puts a path before it.
_URLS = {name: f"dashboard/static/{name}?v={file.digest}" for name, file in _FILES.items()}


@router.get("/")
async def page(request: Request) -> HTMLResponse:
    needed = backend_of(request).client_keys.needed
    form = _page_with_key if needed else _page
    return HTMLResponse(await _shown(request, form), headers=_HEADERS)


@router.get("/dashboard/data")
async def data(request: Request) -> Response:
    """What the page shows, as its script takes it; not an interface for others."""
    traffic: Traffic = request.app.state.traffic
    slots = traffic.slots()
    series = {
        "slot_s": SLOT_S,
        "requests": [slot.requests / SLOT_S for slot in slots],
        "in_flight": [slot.in_flight for slot in slots],
        "bytes": [slot.bytes / SLOT_S for slot in slots],
    }
    view, plots = await _shown(request, _data), _json({"series": series})
    both = view.removesuffix(b"}") + b"," + plots.removeprefix(b"{")
    return Response(both, headers=_HEADERS, media_type="application/json")


@router.get("/dashboard/static/{name}")
async def static(request: Request, name: str, v: str = "") -> Response:
    file = _FILES.get(name)
    if file is None:
        raise HTTPException(404)
    # Another router of this name may be of another version, and have been asked for its own.
    kept = f"public, max-age={_YEAR_S}, immutable" if v == file.digest else "no-cache"
    headers = _HEADERS | {"Cache-Control": kept, "ETag": f'"{file.digest}"'}
    if headers["ETag"] in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    return Response(file.content, headers=headers, media_type=file.media_type)


async def _shown(request: Request, form: Callable[[View], bytes]) -> bytes:
    latest: Latest = request.app.state.latest
    return await latest.shown(backend_of(request), form)


def _page(view: View) -> bytes:
    return render(view, files=_URLS, key_needed=False).encode()


def _page_with_key(view: View) -> bytes:
    return render(view, files=_URLS, key_needed=True).encode()


def _data(view: View) -> bytes:
    return _json(asdict(view))


def _json(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
