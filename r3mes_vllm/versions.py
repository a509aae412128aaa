"""Versions of this package that nodes and backends tell each other."""

from functools import lru_cache

from packaging.version import InvalidVersion, Version


@lru_cache(maxsize=1024)
def read(text: str | None) -> Version | None:
    """None for what is no version by PEP 440."""
    try:
        return Version(text) if text else None
    except InvalidVersion:
        return None


def is_older(version: str | None, than: str | None) -> bool:
    """False where one of them is not known."""
    mine, other = read(version), read(than)
    return mine is not None and other is not None and mine < other
