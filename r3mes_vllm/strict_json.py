"""JSON from strangers, as RFC 8259 has it, and no text in it that UTF-8 can't carry on."""

import json
from collections.abc import Callable
from typing import NoReturn

Json = dict[str, object]


def parse_object(body: bytes) -> Json:
    """`body` as a JSON object. Raises ValueError with a sentence about the body.

    Python by itself takes NaN, Infinity and escapes that make a lone surrogate.
    """
    try:
        value = json.loads(body.decode("utf-8"), parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise ValueError(f"the body is not UTF-8: byte {error.start} is wrong") from error
    except RecursionError as error:
        raise ValueError("the body is nested too deeply") from error
    except ValueError as error:  # JSONDecodeError, and integers of more than 4300 digits
        raise ValueError(f"the body is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"the body must be a JSON object, not {_kind(value)}")
    if b"\\u" in body and any_string(value, _is_lone):
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


def _is_lone(text: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in text)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _kind(value: object) -> str:
    names = {list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
