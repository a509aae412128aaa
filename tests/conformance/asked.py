"""What the clients ask."""

from typing import Literal

from openai.types.chat import ChatCompletionMessageParam, ChatCompletionToolParam
from pydantic import BaseModel

MESSAGES: list[ChatCompletionMessageParam] = [{"role": "user", "content": "What is a contract?"}]
WEATHER: ChatCompletionToolParam = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "How warm it is",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {
                "place": {"type": "string", "enum": ["Ankara", "Zürich"]},
                "unit": {"type": "string", "enum": ["C", "F"]},
            },
            "required": ["place", "unit"],
            "additionalProperties": False,
        },
    },
}


class Verdict(BaseModel):
    """Of few tokens, so that a model that says anything at all says all of it."""

    valid: bool
    kind: Literal["contract", "tort"]
