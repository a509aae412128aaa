"""What travels between node and backend.

Fields marked † in the contract are the shapes of the existing R3MES network; all others are
additive and optional, and unknown fields of a newer peer are ignored.
"""

from datetime import datetime
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from r3mes_vllm.signatures import KEY_PATTERN, SIGNATURE_PATTERN

Wallet = Annotated[str, StringConstraints(pattern=r"^remes[a-zA-Z0-9]{15,55}$")]
AdapterName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]

SYSTEM_PROMPT_CHARACTERS = 8192
"""That an adapter's may have."""
SystemPrompt = Annotated[str, StringConstraints(max_length=SYSTEM_PROMPT_CHARACTERS)]

AccessKey = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._~+/-]{16,256}$")]

HEARTBEAT_TIMEOUT_S = 60
"""Seconds without a beat after which the network takes a node for dead."""

ACTIVE = "active"
DRAINING = "draining"
OFFLINE = "offline"

UNSIGNED = "unsigned"
SIGNED = "signed"
UNPROVEN = "unproven"
"""It signs, but has not proved that its URL is its own."""


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
    access_key: AccessKey | None = Field(default=None, repr=False)
    """The backend sends it as a bearer token with each request to this node, and never shows it."""


class Told(Wire):
    """What a backend may say of versions in each answer to a node."""

    required_version: str | None = None
    """A node of an earlier one gets no requests."""
    latest_version: str | None = None


class Registered(Told):
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


class Proof(Wire):
    """The answer of `POST /identity`: `signature` by `key`, over a nonce and the node's own URL."""

    key: Annotated[str, StringConstraints(pattern=KEY_PATTERN)]
    url: str
    signature: Annotated[str, StringConstraints(pattern=SIGNATURE_PATTERN)]


class Ack(Told):
    success: bool


class RegisterLora(Wire):
    name: AdapterName
    ipfs_hash: str
    description: str = ""
    category: str = ""
    version: str = "1.0.0"
    system_prompt: SystemPrompt | None = None
    base_model: str | None = None
    size_bytes: Annotated[int, Field(strict=True, ge=0, le=1 << 50)] | None = None
    """Of the weights."""
    rank: Annotated[int, Field(strict=True, ge=1, le=1 << 20)] | None = None


LoraAction = Literal["created", "updated", "deactivated", "activated"]


class LoraRegistered(Wire):
    success: bool
    action: LoraAction
    lora_id: int


class Lora(Wire):
    id: int
    name: str
    ipfs_hash: str
    description: str | None = None
    category: str | None = None
    version: str | None = None
    system_prompt: str | None = None
    """For chats that bring none; see `SYSTEM_PROMPT_CHARACTERS`."""
    created_at: datetime | None = None
    base_model: str | None = None
    size_bytes: int | None = None
    rank: int | None = None
    active: bool = True
    owner: str | None = None
    """The key that alone may change it, besides the admin: 64 hexadecimal digits."""


class LoraVersion(Wire):
    """What an adapter's name has stood for."""

    ipfs_hash: str
    version: str
    registered_at: datetime
    """For the first time."""
    current: bool


class Node(Wire):
    wallet_address: str
    endpoint_url: str
    available_lora_list: list[str]
    status: str
    current_load: float
    last_heartbeat: datetime
    adapters: dict[str, str] = {}
    base_model: str | None = None
    signature: str | None = None
    """`signed`, `unsigned`, or `unproven` for the reason that follows."""
    signature_reason: str | None = None


class NodeList(Wire):
    nodes: list[Node]
    count: int


class ChatRequest(BaseModel):
    """`POST /chat`, at the node and at the backend. A null is as good as nothing."""

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

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, given: object) -> object:
        if not isinstance(given, dict):
            return given
        return {name: value for name, value in given.items() if value is not None}

    @property
    def adapter(self) -> str | None:
        """The adapter asked for by name, under either of its two field names."""
        return self.lora_name or self.adapter_name
