"""One version of an adapter, and how far it has come."""

import time
from dataclasses import dataclass, field
from enum import StrEnum

from vllm.lora.request import LoRARequest

from r3mes_vllm.adapters.supply import Obtained


class State(StrEnum):
    """In this order; from staged or resident back to vetted when the engine needs the room."""

    FETCHING = "fetching"
    VETTED = "vetted"
    """In the store, and leased."""
    STAGED = "staged"
    """In the memory of the engine's workers."""
    RESIDENT = "resident"
    """In a slot."""
    DRAINING = "draining"
    """No name leads to it any more; requests that hold it go on."""
    GONE = "gone"


@dataclass(eq=False)
class Version:
    """`lora_id` is vLLM's number, given once and to no other; the path that vLLM sees holds the
    CID, so that neither its weights nor its prefix cache can be those of another version."""

    name: str
    """Under which it came first."""
    cid: str
    lora_id: int
    keep: bool
    """Whether it stays when the engine needs room: the operator named it."""
    names: set[str] = field(default_factory=set)
    """That lead to it now."""
    uses: int = 0
    """Requests that hold it."""
    used_at: float = 0.0
    """When the last one let it go, by `time.monotonic`."""
    obtained: Obtained | None = None
    on_engine: bool = False
    state: State = State.FETCHING
    since: dict[State, float] = field(default_factory=dict)
    """Seconds since 1970, of when it last became that."""

    def became(self, state: State) -> None:
        self.state = state
        self.since[state] = time.time()

    @property
    def request(self) -> LoRARequest:
        if self.obtained is None:
            raise LookupError(f"{self.cid} is not here yet")
        return LoRARequest(f"{self.name}@{self.cid}", self.lora_id, str(self.obtained.path))

    @property
    def rank(self) -> int | None:
        return self.obtained.facts.rank if self.obtained else None

    @property
    def size(self) -> int | None:
        """Bytes on disk."""
        return self.obtained.facts.size if self.obtained else None
