"""What pydantic found wrong, as a person is told it."""

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError


def first_mistake(error: ValidationError, *, levels: int | None = None) -> str:
    """The first one's field, with so many levels of it, and what is wrong there."""
    first = error.errors(include_url=False, include_input=False)[0]
    field = ".".join(str(part) for part in first["loc"][:levels])
    return f"{field}: {words(first)}" if field else words(first)


def words(mistake: Mapping[str, Any]) -> str:
    """Of one of a ValidationError's `errors()`: pydantic says before a validator's own words that
    they are a validator's."""
    return str(mistake["msg"]).removeprefix("Value error, ").removeprefix("Assertion failed, ")
