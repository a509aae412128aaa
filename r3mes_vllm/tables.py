"""The tables of the TOML file, each a setting in itself."""

from pydantic import BaseModel, ConfigDict, Field

# In the order the existing network tries them; the first hit in the lower-cased message wins.
DEFAULT_KEYWORDS = {
    "coding": ["code", "program", "function", "debug", "error"],
    "legal": ["legal", "law", "contract", "court"],
    "medical": ["medical", "health", "doctor", "symptom"],
    "finance": ["finance", "money", "invest", "stock"],
}


class ChatSettings(BaseModel):
    """`[chat]`: how `/chat` chooses an adapter for a message that names none."""

    model_config = ConfigDict(extra="forbid")

    keywords: dict[str, list[str]] = DEFAULT_KEYWORDS
    policy: str | None = None
    """Import path `module:function` of `(message: str, adapters: list[str]) -> str | None`."""


class AdapterSettings(BaseModel):
    """`[adapters.NAME]`: what an adapter gets of an engine that it shares."""

    model_config = ConfigDict(extra="forbid")

    weight: float = Field(default=1.0, gt=0)
    """Of its turns, beside those of others."""
    in_flight: int | None = Field(default=None, ge=1)
    """Requests that run at a time; the others wait and hold up nobody."""


class RequestLimits(BaseModel):
    """`[limits]`: what one request may ask of a node."""

    model_config = ConfigDict(extra="forbid")

    tokens: int | None = Field(default=None, ge=1)
    """Of an answer; without it as many as the model's context has room for."""
    answers: int = Field(default=8, ge=1)
    """`n` and `best_of`."""
    logprobs: int = Field(default=20, ge=0)
    """Of each token."""
    prompts: int = Field(default=64, ge=1)
    """In one request to `/v1/completions` or `/v1/embeddings`."""
    messages: int = Field(default=1024, ge=1)
    stops: int = Field(default=16, ge=1)
    stop_characters: int = Field(default=256, ge=1)
    biases: int = Field(default=1024, ge=1)
    """Tokens in `logit_bias` and `allowed_token_ids`."""
    choices: int = Field(default=1024, ge=1)
    tools: int = Field(default=128, ge=1)
    schema_bytes: int = Field(default=64 << 10, ge=1)
    """Of all tools together, and of the schema or grammar of an answer."""
    schema_depth: int = Field(default=32, ge=1)
    pattern_characters: int = Field(default=1024, ge=1)
    """Of a regular expression for the answer, or within a schema."""


class RateSettings(BaseModel):
    """`[rates]`: what a minute allows; None: no limit. The admin and the backend have none."""

    model_config = ConfigDict(extra="forbid")

    requests: int | None = Field(default=None, ge=1)
    """Of each client key."""
    tokens: int | None = Field(default=None, ge=1)
    """Of each client key, of prompts and answers together."""
    address_requests: int | None = Field(default=None, ge=1)
    address_tokens: int | None = Field(default=None, ge=1)
