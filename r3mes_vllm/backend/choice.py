"""Which adapter answers a `/chat` message that names none."""

from typing import cast

from r3mes_vllm import choice
from r3mes_vllm.choice import Policy
from r3mes_vllm.tables import ChatSettings
from r3mes_vllm.wire import ChatRequest


def policy(settings: ChatSettings) -> Policy:
    """The policy that `settings` name; where it chooses none, the node may.

    Raises ConfigError if its import path leads nowhere.
    """
    if settings.policy is None:
        return choice.by_keywords(settings)
    return cast(Policy, choice.load(settings.policy))


def question(ask: ChatRequest) -> str:
    """What the user says in `ask`: its message, else the last user message of its history."""
    if ask.message:
        return ask.message
    for message in reversed(ask.messages):
        content = message.get("content")
        if message.get("role") == "user" and isinstance(content, str):
            return content
    return ""
