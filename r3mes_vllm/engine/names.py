"""The adapter that a request holds, and vLLM's map of names, which knows no other.

vLLM's handlers look a name up several times during a request. Between two looks the name may have
gone on to another version; what they find is the version that the request held from the start.
"""

from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass

from vllm.lora.request import LoRARequest

BY_CID = "ipfs://"
"""What a name begins with that says the adapter's CID."""


@dataclass(frozen=True)
class Held:
    asked: str
    """The name in the request."""
    request: LoRARequest


held: ContextVar[Held | None] = ContextVar("r3mes_held", default=None)
"""Of the request that is being answered; None for the base model."""


class HeldNames(Mapping[str, LoRARequest]):
    """In place of `OpenAIServingModels.lora_requests`."""

    def __getitem__(self, name: str) -> LoRARequest:
        it = held.get()
        if it is None or name != it.asked:
            raise KeyError(name)
        return it.request

    def __iter__(self) -> Iterator[str]:
        # vLLM looks here for an adapter named like the kind of a message, such as "image".
        return iter(())

    def __len__(self) -> int:
        return 0
