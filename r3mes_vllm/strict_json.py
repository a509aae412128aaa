"""JSON from strangers, as RFC 8259 has it, and no text in it that UTF-8 can't carry on."""

import json
import re
from collections.abc import Callable
from typing import NoReturn

Json = dict[str, object]

_PART = 64 << 10
_MAYBE_LONE = re.compile(rb"\\u[dD][89a-fA-F]")


def parse_object(body: bytes) -> Json:
    """`body` as a JSON object. Raises ValueError with a sentence about the body.

    Python by itself takes NaN, Infinity and escapes that make a lone surrogate.
    """
    try:
        value = json.loads(body.decode("utf-8"), parse_constant=_no_constant)
        is_whole = not _MAYBE_LONE.search(body) or _is_unicode(value)
    except UnicodeDecodeError as error:
        raise ValueError(f"the body is not UTF-8: byte {error.start} is wrong") from error
    except RecursionError as error:
        raise ValueError("the body is nested too deeply") from error
    except ValueError as error:  # JSONDecodeError, and integers of more than 4300 digits
        raise ValueError(f"the body is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"the body must be a JSON object, not {_kind(value)}")
    if not is_whole:
        raise ValueError("the body has text with half of a surrogate pair, which is no Unicode")
    return value


def any_string(value: object, wrong: Callable[[str], bool]) -> bool:
    """Whether any key or string in `value`, at any depth, is `wrong`."""
    waiting = [value]
    while waiting:
        match waiting.pop():
            case str() as text if wrong(text):
                return True
            case dict() as fields:
                waiting += [*fields.keys(), *fields.values()]
            case list() as items:
                waiting += items
    return False


def has_over(most: int, body: bytes) -> bool:
    """Whether `body` has more values than `most`, where lists and objects count twice, if it is
    JSON. It is not parsed: a list of three bytes takes 64 in Python."""
    if _separators(body) <= most:
        return False
    bare = body.replace(rb"\\", b"").replace(rb"\"", b"")
    found, within = 0, 0
    for start in range(0, len(bare), _PART):
        pieces = bare[start : start + _PART].split(b'"')
        found += _separators(b"".join(pieces[within::2]))
        within ^= (len(pieces) - 1) & 1
    return found > most


def _separators(text: bytes) -> int:
    """One for each value after the first of its list or object, and for each list and object."""
    return text.count(b",") + text.count(b"[") + text.count(b"{")


def _is_unicode(value: object) -> bool:
    """Whether there is no half of a surrogate pair in it. Raises RecursionError."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _kind(value: object) -> str:
    names = {list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
