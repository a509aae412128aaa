"""Which adapter answers a message that names none, as node and backend both choose it."""

import importlib
from collections.abc import Callable, Sequence
from typing import cast

from r3mes_vllm.errors import ConfigError
from r3mes_vllm.tables import ChatSettings

Policy = Callable[[str, Sequence[str]], str | None]
"""`(message, adapters that can be had) -> one of them`, or None."""


def by_keywords(settings: ChatSettings) -> Policy:
    """The first adapter of the table with a word in the lower-cased message, if it can be had."""

    def choose(message: str, adapters: Sequence[str]) -> str | None:
        lowered = message.lower()
        for name, words in settings.keywords.items():
            if name in adapters and any(word in lowered for word in words):
                return name
        return None

    return choose


def load(path: str) -> Callable[..., object]:
    """`module:function` → the function. Raises ConfigError."""
    module, _, name = path.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"can't import {path!r}: {error}", hint="give it as package.module:function"
        ) from error
    if not callable(function):
        raise ConfigError(f"{path!r} is not a function")
    return cast("Callable[..., object]", function)
