"""Nodes that sign, and what answers at their URLs."""

import asyncio
import json
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from typing import Any

import httpx
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from r3mes_vllm.identity import Identity
from r3mes_vllm.node.identify import prove
from r3mes_vllm.signatures import Claim, new_boot, request_text, to_headers
from tests.backend.stand_ins import PATIENCE_S, Behaviour, Network, says_hello

FIELDS: dict[str, dict[str, Any]] = {
    "register": {"endpoint_url": "http://127.0.0.1:9", "available_lora_list": ["legal"]},
    "heartbeat": {"status": "active", "current_load": 0},
    "deregister": {},
}


def identity() -> Identity:
    return Identity(Ed25519PrivateKey.generate())


@dataclass(frozen=True)
class Sent:
    """A request that may be sent more than once."""

    path: str
    body: bytes
    headers: dict[str, str]

    def without_signature(self) -> "Sent":
        kept = {name: it for name, it in self.headers.items() if not name.startswith("X-R3MES-")}
        return replace(self, headers=kept)


@dataclass
class SigningNode:
    """A node with a key, by the clock of the network it is in."""

    network: Network
    identity: Identity = field(default_factory=identity)
    boot: str = ""
    sequence: int = 0
    wallet: str = ""

    def __post_init__(self) -> None:
        self.wallet = self.wallet or self.identity.wallet_address
        self.boot = self.boot or self.new_boot()

    def new_boot(self) -> str:
        return new_boot(self.network.clock().timestamp())

    def restarted(self) -> "SigningNode":
        """The same node a second later, as a new process."""
        self.network.clock.forward(1)
        return replace(self, boot=self.new_boot(), sequence=0)

    def request(self, what: str, *, late_s: float = 0, **changed: Any) -> Sent:
        """The next request of this node, signed `late_s` seconds ago."""
        fields = {"wallet_address": self.wallet} | FIELDS[what] | changed
        return self.signed(f"/api/serving-node/{what}", fields, late_s=late_s)

    def signed(self, path: str, fields: dict[str, Any], *, late_s: float = 0) -> Sent:
        self.sequence += 1
        body = json.dumps(fields).encode()
        now = int(self.network.clock().timestamp() - late_s)
        claim = Claim(self.identity.public_key, now, self.boot, self.sequence)
        signature = self.identity.sign(request_text(claim, "POST", path, body))
        return Sent(path, body, to_headers(claim, signature) | {"Content-Type": "application/json"})

    async def send(self, what: str, **changed: Any) -> httpx.Response:
        return await deliver(self.network, self.request(what, **changed))

    async def register(self, endpoint: str, *names: str, **changed: Any) -> None:
        fields = {"endpoint_url": endpoint, "available_lora_list": list(names), **changed}
        answer = await self.send("register", **fields)
        assert answer.status_code == 200, answer.text

    async def listed(self) -> dict[str, Any]:
        """What the node list shows of this node."""
        nodes = (await self.network.http.get("/api/serving-node/list")).json()["nodes"]
        (found,) = (node for node in nodes if node["wallet_address"] == self.wallet)
        return dict(found)

    async def settled(self) -> dict[str, Any]:
        """The same, once its URL has been asked."""

        async def asked() -> bool:
            return "not been asked" not in str((await self.listed())["signature_reason"])

        await until(asked)
        return await self.listed()


async def deliver(network: Network, sent: Sent) -> httpx.Response:
    return await network.http.post(sent.path, content=sent.body, headers=sent.headers)


def code(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json().get("error", {}).get("code", "")


def proves(identity: Identity, url: str | None = None) -> Behaviour:
    """A node's URL where `identity` is; it says that it lives at `url`, where it was called
    otherwise. Anything else than a challenge is greeted."""

    async def behaviour(request: Request) -> Response:
        if request.url.path != "/identity":
            return await says_hello(request)
        nonce = (await request.json())["nonce"]
        lives_at = url or str(request.base_url).rstrip("/")
        return JSONResponse(prove(identity, nonce, lives_at).model_dump())

    return behaviour


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not await condition():
            await asyncio.sleep(0.005)


def some_key() -> str:
    return secrets.token_urlsafe(32)
