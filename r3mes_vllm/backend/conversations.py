"""Which node has a conversation's beginning in its prefix cache."""

import hashlib
from collections import OrderedDict
from collections.abc import Mapping

_MOST = 8192
_CHARACTERS = 4096
"""Of a text that count."""


def conversation(model: str, body: Mapping[str, object]) -> str | None:
    """The same word for all requests of a conversation with `model`: a hash of what comes up to the
    first question. None for a `body` with no text."""
    begin = _beginning(body)
    if not begin:
        return None
    digest = hashlib.blake2b(digest_size=16)
    for text in (model, *begin):
        digest.update(text[:_CHARACTERS].encode(errors="replace") + b"\0")
    return digest.hexdigest()


class Conversations:
    """The node that began the last answer of each; the oldest are forgotten."""

    def __init__(self) -> None:
        self._wallets = OrderedDict[str, str]()

    def __len__(self) -> int:
        return len(self._wallets)

    def wallet(self, conversation: str) -> str | None:
        return self._wallets.get(conversation)

    def note(self, conversation: str, wallet: str) -> None:
        self._wallets[conversation] = wallet
        self._wallets.move_to_end(conversation)
        if len(self._wallets) > _MOST:
            self._wallets.popitem(last=False)


def _beginning(body: Mapping[str, object]) -> list[str]:
    messages = body.get("messages") or body.get("input")
    if not isinstance(messages, list):
        return [it for it in (body.get(name) for name in _TEXTS) if isinstance(it, str) and it][:1]
    found = []
    for message in messages:
        if not isinstance(message, dict):
            break
        found += _texts(message.get("content"))
        if message.get("role") == "user":
            break
    return found


_TEXTS = ("message", "prompt", "input")


def _texts(content: object) -> list[str]:
    """Of a message: OpenAI's `content` is a text, or parts of which some are."""
    parts = content if isinstance(content, list) else [{"text": content}]
    texts = [part.get("text") for part in parts if isinstance(part, dict)]
    return [text for text in texts if isinstance(text, str)]
