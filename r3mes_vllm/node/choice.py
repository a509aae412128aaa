"""Which adapter answers a message that names none: the way the existing network chooses."""

from collections.abc import Sequence
from typing import cast

from r3mes_vllm import choice
from r3mes_vllm.choice import Policy
from r3mes_vllm.tables import ChatSettings

GENERAL = "general"


def policy(settings: ChatSettings) -> Policy:
    """By keyword; else `general`; else the first adapter. An import path replaces all of it.

    Raises ConfigError if the path leads nowhere.
    """
    if settings.policy is not None:
        return cast(Policy, choice.load(settings.policy))
    by_keywords = choice.by_keywords(settings)

    def choose(message: str, served: Sequence[str]) -> str | None:
        last = GENERAL if GENERAL in served else served[0] if served else None
        return by_keywords(message, served) or last

    return choose
