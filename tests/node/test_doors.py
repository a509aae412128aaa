"""Every route that vLLM mounts, on the application as it is served, tried by a stranger."""

from pathlib import Path
from typing import Any, get_args

import httpx
import pytest
from fastapi.routing import APIWebSocketRoute
from starlette.routing import Mount, WebSocketRoute
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from r3mes_vllm.node import guard

ANYONE = {("GET", "/health"), ("GET", "/ready"), ("POST", "/identity")}


@pytest.fixture
def app(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """With all of vLLM's tasks, and the routes of its development mode."""
    from vllm import tasks
    from vllm.entrypoints.launchers.app import build_app
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    monkeypatch.setenv("VLLM_PLUGINS", "r3mes")
    monkeypatch.setenv("VLLM_SERVER_DEV_MODE", "1")
    monkeypatch.setenv("R3MES_API_KEYS", "client")
    monkeypatch.setenv("R3MES_ADMIN_KEY", "admin")
    monkeypatch.setenv("R3MES_STATE_DIR", str(tmp_path))
    monkeypatch.setattr("r3mes_vllm.engine.ending.no_tracebacks", lambda: None)
    args = make_arg_parser(FlexibleArgumentParser()).parse_args(["--enable-lora"])
    every = {name for kind in (tasks.GenerationTask, tasks.FrontendTask) for name in get_args(kind)}
    return build_app(args, tuple(sorted(every)), None)


def routes(app: Any) -> set[tuple[str, str]]:
    """Method and path; WS is a socket's."""
    found = set()
    for route in app.routes:
        path = route.path.replace("{response_id}", "r1").replace(":path", "")
        path = path.replace("{name}", "legal")
        assert "{" not in path
        if isinstance(route, Mount):
            found |= {("GET", f"{path}/"), ("POST", f"{path}/x")}
        elif isinstance(route, WebSocketRoute | APIWebSocketRoute):
            found.add(("WS", path))
        else:
            found |= {(method, path) for method in route.methods - {"HEAD"}}
    return found


async def statuses(app: Any, **headers: str) -> dict[tuple[str, str], int]:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://node") as client:
        return {
            (method, path): (await client.request(method, path, headers=headers)).status_code
            for method, path in sorted(routes(app) - ANYONE)
            if method != "WS"
        }


async def test_without_a_key_none_of_vllms_routes_answers(app: Any) -> None:
    found = await statuses(app)
    assert len(found) > 50
    assert set(found.values()) <= {401, 404, 405}


async def test_a_clients_key_opens_no_other_than_the_clients(app: Any) -> None:
    found = await statuses(app, **{"X-API-Key": "client"})
    opened = {route for route, status in found.items() if status not in (401, 404, 405)}
    clients = {it for it, who in guard.ROUTES.items() if who is guard.Access.CLIENT}
    assert opened <= {(method, path.replace("{name}", "legal")) for method, path in clients}


async def test_with_the_guard_off_strangers_get_in(
    app: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def through(self: guard.Guard, scope: Any, receive: Any, send: Any) -> None:
        await self._app(scope, receive, send)

    monkeypatch.setattr(guard.Guard, "__call__", through)
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app), base_url="http://node"
    ) as client:
        assert (await client.get("/version")).status_code == 200


def test_no_socket_is_opened(app: Any) -> None:
    sockets = [path for method, path in routes(app) if method == "WS"]
    assert sockets
    for path in sockets:
        with (
            pytest.raises(WebSocketDisconnect) as caught,
            TestClient(app).websocket_connect(path, headers={"X-API-Key": "admin"}),
        ):
            pass
        assert caught.value.code == 1008
