"""What a node says to a backend, in the shapes that the existing network's backend knows."""

from types import TracebackType
from typing import Any

import httpx
from pydantic import TypeAdapter, ValidationError

from r3mes_vllm.errors import BackendRefused, BackendUnreachable
from r3mes_vllm.wire import Deregister, Heartbeat, Lora, RegisterLora, RegisterNode

_LORAS = TypeAdapter(list[Lora])
_TIMEOUT = httpx.Timeout(10.0, connect=5.0)


class BackendClient:
    """`url` without a trailing slash. Every call raises BackendUnreachable or BackendRefused."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._http = httpx.AsyncClient(base_url=url, timeout=_TIMEOUT, trust_env=False)

    async def __aenter__(self) -> "BackendClient":
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        await self._http.aclose()

    async def loras(self) -> list[Lora]:
        response = await self._call("GET", "/api/lora/list", params={"active_only": "true"})
        try:
            return _LORAS.validate_json(response.content)
        except ValidationError as error:
            raise BackendRefused(
                f"the answer of {self.url}/api/lora/list is no list of adapters: {error}",
                answered=response.status_code,
            ) from error

    async def register_lora(self, lora: RegisterLora) -> None:
        await self._call("POST", "/api/lora/register", json=lora.model_dump())

    async def register(self, node: RegisterNode) -> None:
        body = node.model_dump(exclude_none=True)
        await self._call("POST", "/api/serving-node/register", json=body)

    async def beat(self, heartbeat: Heartbeat) -> None:
        body = heartbeat.model_dump(exclude_none=True)
        await self._call("POST", "/api/serving-node/heartbeat", json=body)

    async def deregister(self, wallet_address: str) -> None:
        body = Deregister(wallet_address=wallet_address).model_dump()
        await self._call("POST", "/api/serving-node/deregister", json=body)

    async def _call(self, method: str, path: str, **request: Any) -> httpx.Response:
        try:
            response = await self._http.request(method, path, **request)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise BackendUnreachable(
                f"the backend {self.url} can't be reached: {error or type(error).__name__}",
                hint="is it running? r3mes-vllm backend starts one; --backend-url names another",
            ) from error
        if not response.is_success:
            raise BackendRefused(
                f"the backend {self.url} answered {response.status_code} to {method} {path}: "
                f"{response.text[:300]}",
                answered=response.status_code,
                retry_after=_seconds(response.headers.get("retry-after")),
            )
        return response


def _seconds(header: str | None) -> float | None:
    try:
        return min(max(float(header or ""), 0.0), 3600.0)
    except ValueError:
        return None
