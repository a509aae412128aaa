"""LangChain's ChatOpenAI: python with_langchain.py BASE_URL"""

import asyncio
import sys
from typing import Literal

import openai
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel

QUESTION = "What is a contract?"


class Verdict(BaseModel):
    """Whether it is valid."""

    valid: bool
    kind: Literal["contract", "tort"]


@tool  # type: ignore[untyped-decorator]
def weather(unit: Literal["C", "F"]) -> str:
    """How warm it is."""
    return f"21 {unit}"


def chat(tokens: int, model: str = "legal", **options: object) -> ChatOpenAI:
    return ChatOpenAI(
        model=model,
        base_url=sys.argv[1],
        api_key="none",
        max_tokens=tokens,
        max_retries=0,
        temperature=0,
        **options,
    )


async def main() -> None:
    model = chat(8)
    whole = model.invoke(QUESTION)
    assert whole.content
    assert whole.usage_metadata
    assert whole.usage_metadata["output_tokens"] == 8
    assert whole.response_metadata["model_name"] == "legal"

    chunks = list(chat(8, stream_usage=True).stream(QUESTION))
    assert "".join(str(chunk.content) for chunk in chunks) == whole.content
    assert sum((it.usage_metadata or {}).get("output_tokens", 0) for it in chunks) == 8

    answers = await asyncio.gather(
        *(chat(8, name).ainvoke(QUESTION) for name in ("legal", "medical"))
    )
    assert answers[0].content == whole.content != answers[1].content
    assert "".join([str(it.content) async for it in model.astream(QUESTION)]) == whole.content
    assert [it.content for it in model.batch([QUESTION, QUESTION])] == [whole.content] * 2

    for method in ("json_schema", "function_calling"):
        structured = chat(300).with_structured_output(Verdict, method=method, strict=True)
        verdict = structured.invoke(QUESTION)
        assert isinstance(verdict, Verdict), method

    called = chat(300).bind_tools([weather], tool_choice="weather", strict=True).invoke(QUESTION)
    assert isinstance(called, AIMessage)
    [call] = called.tool_calls
    assert call["name"] == "weather"
    result = ToolMessage(weather.invoke(call["args"]), tool_call_id=call["id"])
    again = chat(4).bind_tools([weather], tool_choice="none")
    assert again.invoke([HumanMessage(QUESTION), called, result]).content

    logprobs = chat(4).bind(logprobs=True, top_logprobs=2).invoke(QUESTION)
    assert len(logprobs.response_metadata["logprobs"]["content"]) == 4

    response = chat(8, use_responses_api=True).invoke(QUESTION)
    assert response.text

    try:
        chat(4, "nobody").invoke(QUESTION)
    except openai.NotFoundError:
        return
    raise AssertionError("nobody answered")


asyncio.run(main())
