"""Which adapter answers a message that names none: the way the existing network chooses."""

from collections.abc import Callable, Mapping, Sequence

GENERAL = "general"

Policy = Callable[[str, Sequence[str]], str | None]


def by_keywords(keywords: Mapping[str, Sequence[str]]) -> Policy:
    """The first entry of the table with a word in the lower-cased message, of those served here;
    else `general`; else the first adapter."""

    def choose(message: str, served: Sequence[str]) -> str | None:
        lowered = message.lower()
        for name, words in keywords.items():
            if name in served and any(word in lowered for word in words):
                return name
        if GENERAL in served:
            return GENERAL
        return served[0] if served else None

    return choose
