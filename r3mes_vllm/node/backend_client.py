"""What a node or a publisher says to a backend, in the shapes that the existing network's backend
knows."""

from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx
from pydantic import BaseModel, TypeAdapter, ValidationError

from r3mes_vllm.errors import BackendRefused, BackendUnreachable
from r3mes_vllm.node.line import refuse_plain_http, trusted
from r3mes_vllm.node.signer import Signer
from r3mes_vllm.settings import Settings
from r3mes_vllm.wire import Deregister, Heartbeat, Lora, RegisterLora, RegisterNode, Told

_LORAS = TypeAdapter(list[Lora])
_NODE = "/api/serving-node"
_TIMEOUT = httpx.Timeout(10.0, connect=5.0)


@dataclass(frozen=True)
class Listing:
    """The registry's active adapters, as the backend tagged them."""

    loras: list[Lora]
    tag: str | None


class BackendClient:
    """`url` without a trailing slash. Every call raises BackendUnreachable or BackendRefused.

    What is said there is signed by `signer`.

    Raises ConfigError for plain HTTP to another machine unless `insecure`, and for a `ca` that
    holds no certificates.
    """

    def __init__(
        self,
        url: str,
        *,
        ca: Path | None = None,
        insecure: bool = False,
        signer: Signer | None = None,
    ) -> None:
        if not insecure:
            refuse_plain_http(url)
        self.url = url
        self._signer = signer
        self._http = httpx.AsyncClient(
            base_url=url, timeout=_TIMEOUT, trust_env=False, verify=trusted(ca)
        )

    @classmethod
    def of(cls, settings: Settings, signer: Signer | None = None) -> "BackendClient":
        ca, insecure = settings.backend_ca, settings.insecure
        return cls(settings.backend, ca=ca, insecure=insecure, signer=signer)

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
        return (await self.listing()).loras

    async def listing(self, known: Listing | None = None) -> Listing:
        """`known` itself if that is how it still is: then nothing of it is sent again."""
        headers = {"If-None-Match": known.tag} if known and known.tag else {}
        response = await self._call(
            "GET", "/api/lora/list", params={"active_only": "true"}, headers=headers
        )
        if known and response.status_code == httpx.codes.NOT_MODIFIED:
            return known
        try:
            return Listing(_LORAS.validate_json(response.content), response.headers.get("etag"))
        except ValidationError as error:
            raise BackendRefused(
                f"the answer of {self.url}/api/lora/list is no list of adapters: {error}",
                answered=response.status_code,
            ) from error

    async def register_lora(self, lora: RegisterLora, *, admin_key: str | None = None) -> None:
        await self._tell("/api/lora/register", lora, secret=admin_key, key=admin_key)

    async def register(self, node: RegisterNode) -> Told:
        return await self._tell(f"{_NODE}/register", node, secret=node.access_key)

    async def beat(self, heartbeat: Heartbeat) -> Told:
        return await self._tell(f"{_NODE}/heartbeat", heartbeat)

    async def deregister(self, wallet_address: str) -> None:
        await self._tell(f"{_NODE}/deregister", Deregister(wallet_address=wallet_address))

    async def _tell(
        self, path: str, message: BaseModel, *, secret: str | None = None, key: str | None = None
    ) -> Told:
        """An existing backend says nothing of versions."""
        body = message.model_dump_json(exclude_none=True).encode()
        headers = {"Content-Type": "application/json"}
        if key:
            headers["Authorization"] = f"Bearer {key}"
        if self._signer:
            headers |= self._signer.headers("POST", path, body)
        answer = await self._call("POST", path, content=body, headers=headers, secret=secret)
        try:
            return Told.model_validate_json(answer.content)
        except ValidationError:
            return Told()

    async def _call(
        self, method: str, path: str, *, secret: str | None = None, **request: Any
    ) -> httpx.Response:
        """Errors quote the answer, but not the `secret` if that repeats it."""
        try:
            response = await self._http.request(method, path, **request)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise BackendUnreachable(
                f"the backend {self.url} can't be reached: {error or type(error).__name__}",
                hint="is it running? r3mes-vllm backend starts one; --backend-url names another",
            ) from error
        if not response.is_success and response.status_code != httpx.codes.NOT_MODIFIED:
            said = response.text.replace(secret, "...") if secret else response.text
            raise BackendRefused(
                f"the backend {self.url} answered {response.status_code} to {method} {path}: "
                f"{said[:300]}",
                answered=response.status_code,
                retry_after=_seconds(response.headers.get("retry-after")),
            )
        return response


def _seconds(header: str | None) -> float | None:
    try:
        return min(max(float(header or ""), 0.0), 3600.0)
    except ValueError:
        return None
