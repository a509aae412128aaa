"""`GET /status`: what an operator wants to know of this node, in one document."""

import time
from collections import deque
from datetime import UTC, datetime
from typing import Any

from fastapi import APIRouter, Request
from prometheus_client import REGISTRY
from starlette.responses import JSONResponse

from r3mes_vllm import __version__
from r3mes_vllm.node.admin import view
from r3mes_vllm.node.guard import needs_key
from r3mes_vllm.node.health import not_ready
from r3mes_vllm.node.heartbeat import Registration
from r3mes_vllm.node.journal import REFUSED, Entry
from r3mes_vllm.node.measures import Measures, OfAdapter

router = APIRouter()

_REFUSALS = 20
_ENGINE = {"vllm:num_requests_waiting": "waiting", "vllm:kv_cache_usage_perc": "kv_cache"}


class Standing:
    """What is remembered for it. `registration` is None until the node is in the network."""

    registration: Registration | None = None

    def __init__(self, measures: Measures) -> None:
        self.measures = measures
        self.started = time.time()
        self.refusals: deque[dict[str, Any]] = deque(maxlen=_REFUSALS)

    def refused(self, entry: Entry) -> None:
        """To be told of each request that has ended. Equal ones in a row are one, counted."""
        if entry.outcome != REFUSED or not entry.is_inference:
            return
        said = {
            "route": entry.route,
            "adapter": entry.adapter or None,
            "status": entry.status,
            "code": entry.code,
        }
        count = 1
        if self.refusals and said.items() <= self.refusals[-1].items():
            count += self.refusals.pop()["count"]
        at = datetime.now(UTC).isoformat(timespec="seconds")
        self.refusals.append({"time": at, **said, "count": count})


@router.get("/status")
async def status(request: Request) -> JSONResponse:
    """Times are in seconds. Nothing that was asked or answered, and no key."""
    node, standing = request.app.state.r3mes, request.app.state.standing
    await node.host.look_at_slots()
    described, registration = node.describe(), standing.registration
    accepted = registration.accepted_at if registration else None
    return JSONResponse(
        {
            "version": __version__,
            "wallet_address": described.wallet_address,
            "public_url": described.endpoint_url,
            "backend": None if node.settings.base_only else node.settings.backend,
            "model": described.base_model,
            "up_s": round(time.time() - standing.started, 1),
            "reason": not_ready(request),
            "chat_needs_key": needs_key(node.settings),
            "running": request.app.state.load.running,
            **_of_engine(),
            "beat_age_s": None if accepted is None else round(time.monotonic() - accepted, 1),
            "beat_trouble": (registration.trouble if registration else "") or None,
            "upgrade": (registration.upgrade if registration else "") or None,
            "outdated": bool(registration and registration.outdated),
            "adapters": [view(it) for it in node.host.versions],
            "requests": {name: _counted(it) for name, it in standing.measures.by_name().items()},
            "refusals": list(standing.refusals),
            "adapter_refusals": dict(node.supply.refusals),
        }
    )


def _of_engine() -> dict[str, float]:
    """Requests in the engine's queue; the used part of the KV cache, 0 to 1."""
    found = dict.fromkeys(_ENGINE.values(), 0.0)
    for family in REGISTRY.restricted_registry(list(_ENGINE)).collect():
        for sample in family.samples:
            found[_ENGINE[sample.name]] += sample.value
    return found


def _counted(it: OfAdapter) -> dict[str, Any]:
    return {
        **dict(it.requests),
        "running": it.running,
        "prompt_tokens": it.prompt_tokens,
        "generated_tokens": it.generated_tokens,
        "first_token_p50_s": it.first_token.quantile(0.5),
        "first_token_p95_s": it.first_token.quantile(0.95),
        "last_s_ago": None if it.asked_at is None else round(time.time() - it.asked_at, 1),
    }
