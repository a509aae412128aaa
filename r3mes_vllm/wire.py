"""What travels between node and backend.

Fields marked † in the contract are the shapes of the existing R3MES network; all others are
additive and optional, and unknown fields of a newer peer are ignored.
"""

from datetime import datetime
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, StringConstraints

Wallet = Annotated[str, StringConstraints(pattern=r"^remes[a-zA-Z0-9]{15,55}$")]
AdapterName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]

HEARTBEAT_TIMEOUT_S = 60
"""Seconds without a beat after which the network takes a node for dead."""

ACTIVE = "active"
DRAINING = "draining"
OFFLINE = "offline"


class Wire(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class RegisterNode(Wire):
    wallet_address: Wallet
    endpoint_url: str
    available_lora_list: list[str]
    # additive: the CID of each adapter, so that a router can demand exactly one version
    adapters: dict[str, str] = {}
    base_model: str | None = None
    version: str | None = None


class Registered(Wire):
    success: bool
    action: Literal["created", "updated"] | None = None
    node_id: int | None = None


class Heartbeat(Wire):
    wallet_address: Wallet
    status: str
    current_load: float
    adapters: dict[str, str] | None = None
    version: str | None = None


class Deregister(Wire):
    wallet_address: Wallet


class Ack(Wire):
    success: bool


class RegisterLora(Wire):
    name: AdapterName
    ipfs_hash: str
    description: str = ""
    category: str = ""
    version: str = "1.0.0"


class LoraRegistered(Wire):
    success: bool
    action: Literal["created", "updated"]
    lora_id: int


class Lora(Wire):
    id: int
    name: str
    ipfs_hash: str
    description: str | None = None
    category: str | None = None
    version: str | None = None
    created_at: datetime | None = None


class Node(Wire):
    wallet_address: str
    endpoint_url: str
    available_lora_list: list[str]
    status: str
    current_load: float
    last_heartbeat: datetime
    adapters: dict[str, str] = {}
    base_model: str | None = None


class NodeList(Wire):
    nodes: list[Node]
    count: int


class ChatRequest(BaseModel):
    """`POST /chat`, at the node and at the backend."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    message: str = ""
    lora_name: str | None = None
    adapter_name: str | None = None
    wallet_address: str | None = None
    messages: list[dict[str, object]] = []
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool = True

    @property
    def adapter(self) -> str | None:
        """The adapter asked for by name, under either of its two field names."""
        return self.lora_name or self.adapter_name
