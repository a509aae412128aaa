"""What `POST /chat` asks, in OpenAI's words, wherever it is answered."""

from typing import Any

from r3mes_vllm.wire import ChatRequest

DEFAULT_MAX_TOKENS = 512
_SYSTEM = ("system", "developer")


def completion_fields(
    asked: ChatRequest, model: str, system_prompt: str | None = None
) -> dict[str, Any]:
    """The fields of a chat completion. `system_prompt` is the adapter's; one that the caller sent
    goes before."""
    messages = list(asked.messages)
    if asked.message:
        messages.append({"role": "user", "content": asked.message})
    if system_prompt and not any(it.get("role") in _SYSTEM for it in messages):
        messages.insert(0, {"role": "system", "content": system_prompt})
    fields = {
        "model": model,
        "messages": messages,
        "max_tokens": DEFAULT_MAX_TOKENS if asked.max_tokens is None else asked.max_tokens,
        "temperature": asked.temperature,
        "top_p": asked.top_p,
        "seed": asked.seed,
        "stop": asked.stop,
    }
    return {name: value for name, value in fields.items() if value is not None}
