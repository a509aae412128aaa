"""Bounds on the fields of a request that cost its node more than they cost the sender, and what a
node does not do, whatever vLLM does."""

import json
from collections.abc import Iterator
from typing import Any

from r3mes_vllm.errors import BadRequest
from r3mes_vllm.tables import RequestLimits

_SCHEMAS = (
    "response_format",
    "text",
    "structured_outputs",
    "structured_outputs.json",  # perhaps as text
    "structured_outputs.structural_tag",
    "tools",
    "functions",
)
_PATTERN = "structured_outputs.regex"
_LISTS = {
    "messages": "messages",
    "tools": "tools",
    "functions": "tools",
    "stop": "stops",
    "stop_token_ids": "stops",
    "bad_words": "stops",
    "logit_bias": "biases",
    "structured_outputs.choice": "choices",
    "allowed_token_ids": "biases",
}
_NUMBERS = {
    "n": "answers",
    "best_of": "answers",
    "logprobs": "logprobs",
    "top_logprobs": "logprobs",
    "prompt_logprobs": "logprobs",
    "max_tokens": "tokens",
    "max_completion_tokens": "tokens",
    "max_output_tokens": "tokens",
}


class BadField(BadRequest):
    """`field` is the one to blame."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field


class TooMuch(BadField):
    """It is over its limit."""


def refuse_background(body: dict[str, Any]) -> None:
    """Raise BadField for what vLLM would answer after the request has ended, and with it the hold
    on its adapter's version. Nobody could get that answer: `GET /v1/responses/ID` is no route here.
    """
    if body.get("background"):
        raise BadField("background", "an answer is given to the request that asks for it")


def refuse_excess(body: dict[str, Any], limits: RequestLimits) -> None:
    """Raise TooMuch for the first field over its limit. Of another type than it should have is
    not this function's business: vLLM says that better."""
    for field, limit in _NUMBERS.items():
        value, most = body.get(field), getattr(limits, limit)
        if most is not None and (number := _number(value)) is not None and number > most:
            raise TooMuch(field, f"{number:g} is over the limit of {most}")
    for field, limit in _LISTS.items():
        value, most = _at(body, field), getattr(limits, limit)
        if isinstance(value, list | dict) and len(value) > most:
            raise TooMuch(field, f"{len(value)} entries, the limit is {most}")
    _refuse_prompts(body, limits)
    for field in ("stop", "bad_words"):
        for text in _texts(body.get(field)):
            if len(text) > limits.stop_characters:
                raise TooMuch(field, f"one is over {limits.stop_characters} characters")
    for text in _texts(_at(body, _PATTERN)):
        _refuse_pattern(_PATTERN, text, limits)
    for field in _SCHEMAS:
        _refuse_schema(field, _at(body, field), limits)


def _refuse_prompts(body: dict[str, Any], limits: RequestLimits) -> None:
    """Each of several prompts is a request of its own to the engine."""
    for field in ("prompt", "input"):
        value = body.get(field)
        if not isinstance(value, list):
            continue
        if any(isinstance(it, dict) for it in value):
            many, most = "messages", limits.messages
        elif any(isinstance(it, str | list) for it in value):
            many, most = "prompts", limits.prompts
        else:
            continue  # the tokens of one
        if len(value) > most:
            raise TooMuch(field, f"{len(value)} {many}, the limit is {most}")


def _refuse_schema(field: str, value: Any, limits: RequestLimits) -> None:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            value = {"": value}  # its length counts all the same
    if not isinstance(value, list | dict):
        return
    for depth, it in _within(value):
        if depth > limits.schema_depth:
            raise TooMuch(field, f"nested over {limits.schema_depth} deep")
        if isinstance(it, dict):
            for text in _texts(it.get("pattern")):
                _refuse_pattern(field, text, limits)
    if len(json.dumps(value)) > limits.schema_bytes:
        raise TooMuch(field, f"over {limits.schema_bytes} bytes")


def _refuse_pattern(field: str, text: str, limits: RequestLimits) -> None:
    if len(text) > limits.pattern_characters:
        raise TooMuch(field, f"a pattern over {limits.pattern_characters} characters")


def _within(value: Any) -> Iterator[tuple[int, Any]]:
    """All lists and objects in it, with their depth, the shallow ones first."""
    level, depth = [value], 1
    while level:
        for it in level:
            yield depth, it
        inner = (it.values() if isinstance(it, dict) else it for it in level)
        level = [it for part in inner for it in part if isinstance(it, list | dict)]
        depth += 1


def _number(value: Any) -> float | None:
    """As vLLM reads it, which takes "8" for 8."""
    try:
        return float(value) if isinstance(value, int | float | str) else None
    except (ValueError, OverflowError):
        return None


def _at(body: Any, path: str) -> Any:
    for name in path.split("."):
        body = body.get(name) if isinstance(body, dict) else None
    return body


def _texts(value: Any) -> list[str]:
    return [it for it in (value if isinstance(value, list) else [value]) if isinstance(it, str)]
