"""URLs as they may be shown."""

import re

_USER = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*://)?[^/]*@")


def public(url: str) -> str:
    """Without user, password and query, which may hold a token."""
    return _USER.sub(r"\1", re.split("[?#]", url, maxsplit=1)[0])
