"""Nodes and adapters as the backend knows them: what the lists show, and what never leaves."""

from collections.abc import Mapping
from datetime import datetime
from functools import cached_property
from typing import Any

from pydantic import Field

from r3mes_vllm import wire


class KnownNode(wire.Node):
    id: int = Field(default=0, exclude=True)
    revision: int = Field(default=0, exclude=True)
    """See `RevisionRow`."""
    public_key: str | None = Field(default=None, exclude=True)
    """Hexadecimal; None for a node that doesn't sign."""
    version: str | None = Field(default=None, exclude=True)
    """Of this package; None for a node that is not of it."""
    access_key: str | None = Field(default=None, exclude=True, repr=False)
    """What the node wants of its backend: `Authorization: Bearer` of it."""
    proof_url: str | None = Field(default=None, exclude=True)
    """The URL that was asked last for a proof that the key answers there."""
    proof_at: datetime | None = Field(default=None, exclude=True)

    @cached_property
    def names(self) -> frozenset[str]:
        """`available_lora_list`, in which one is found at once."""
        return frozenset(self.available_lora_list)

    @property
    def usable(self) -> bool:
        """Whether a request may be sent to it."""
        return self.signature != wire.UNPROVEN

    @property
    def asked(self) -> bool:
        """Whether its URL has been asked for a proof."""
        return self.proof_url == self.endpoint_url


class KnownLora(wire.Lora):
    revision: int = Field(default=0, exclude=True)
    earlier: list[str] = Field(default=[], exclude=True)
    """See `LoraRow`."""


def known_lora(row: Mapping[str, Any]) -> KnownLora:
    """The adapter in a row of the table `loras`."""
    return KnownLora(**row, active=row["is_active"], owner=row["public_key"])


def known(row: Mapping[str, Any]) -> KnownNode:
    """The node in a row of the table `nodes`."""
    failure: str | None = row["proof_failure"]
    if row["proof_url"] != row["endpoint_url"]:
        failure = "its URL has not been asked yet"
    signature, reason = wire.SIGNED, None
    if row["public_key"] is None:
        signature = wire.UNSIGNED
    elif failure is not None:
        signature, reason = wire.UNPROVEN, failure
    return KnownNode(**row, signature=signature, signature_reason=reason)
