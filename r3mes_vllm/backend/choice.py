"""Which adapter answers a `/chat` message that names none."""

import importlib
from collections.abc import Callable, Sequence

from r3mes_vllm.errors import ConfigError
from r3mes_vllm.settings import ChatSettings
from r3mes_vllm.wire import ChatRequest

Policy = Callable[[str, list[str]], str | None]
"""`(message, adapters with a live holder) -> one of them`, or None: the node may choose."""


def policy(settings: ChatSettings) -> Policy:
    """The policy that `settings` name. Raises ConfigError if its import path leads nowhere."""
    if settings.policy is None:
        return lambda message, adapters: by_keyword(message, adapters, settings.keywords)
    module, _, function = settings.policy.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"chat.policy: can't import {settings.policy!r}: {error}", hint="write module:function"
        ) from error
    if not callable(found):
        raise ConfigError(f"chat.policy: {settings.policy!r} is not callable")
    chosen: Policy = found
    return chosen


def by_keyword(message: str, adapters: Sequence[str], keywords: dict[str, list[str]]) -> str | None:
    """The first adapter of the table that is among `adapters` and has a word in `message`."""
    lowered = message.lower()
    for name, words in keywords.items():
        if name in adapters and any(word in lowered for word in words):
            return name
    return None


def question(ask: ChatRequest) -> str:
    """What the user says in `ask`: its message, else the last user message of its history."""
    if ask.message:
        return ask.message
    for message in reversed(ask.messages):
        content = message.get("content")
        if message.get("role") == "user" and isinstance(content, str):
            return content
    return ""
