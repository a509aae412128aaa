"""LiteLLM: python with_litellm.py BASE_URL"""

import asyncio
import json
import os
import sys

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # or it asks GitHub at import

import litellm

litellm.telemetry = False
MESSAGES = [{"role": "user", "content": "What is a contract?"}]
SCHEMA = {
    "type": "object",
    "properties": {"unit": {"type": "string", "enum": ["C", "F"]}},
    "required": ["unit"],
    "additionalProperties": False,
}
WEATHER = {
    "type": "function",
    "function": {"name": "weather", "strict": True, "parameters": SCHEMA},
}


def asked(tokens: int = 8, **fields: object) -> dict[str, object]:
    return {
        "model": "openai/legal",
        "messages": MESSAGES,
        "api_base": sys.argv[1],
        "api_key": "none",
        "max_tokens": tokens,
        "temperature": 0,
        "num_retries": 0,
        **fields,
    }


async def main() -> None:
    whole = litellm.completion(**asked())
    text = whole.choices[0].message.content
    assert text
    assert whole.usage.completion_tokens == 8

    stream = list(litellm.completion(**asked(stream=True, stream_options={"include_usage": True})))
    assert "".join(it.choices[0].delta.content or "" for it in stream if it.choices) == text
    assert any(getattr(it, "usage", None) and it.usage.completion_tokens == 8 for it in stream)

    answer = await litellm.acompletion(**asked())
    assert answer.choices[0].message.content == text
    pieces = [it async for it in await litellm.acompletion(**asked(stream=True))]
    assert "".join(it.choices[0].delta.content or "" for it in pieces) == text

    choice = {"type": "function", "function": {"name": "weather"}}
    called = litellm.completion(**asked(300, tools=[WEATHER], tool_choice=choice))
    [call] = called.choices[0].message.tool_calls
    assert set(json.loads(call.function.arguments)) == {"unit"}

    shape = {"type": "json_schema", "json_schema": {"name": "unit", "schema": SCHEMA}}
    structured = litellm.completion(**asked(200, response_format=shape))
    assert set(json.loads(structured.choices[0].message.content)) == {"unit"}

    completed = litellm.text_completion(
        model="text-completion-openai/legal",
        prompt="One is",
        api_base=sys.argv[1],
        api_key="none",
        max_tokens=4,
    )
    assert completed.choices[0].text

    for fields, expected in (
        ({"model": "openai/nobody"}, litellm.NotFoundError),
        ({"temperature": -1}, litellm.BadRequestError),
    ):
        try:
            litellm.completion(**asked(**fields))
        except expected:
            continue
        raise AssertionError(f"{fields} was answered")


asyncio.run(main())
