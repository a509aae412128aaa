"""Every setting of node and backend, in one place: option > environment > TOML file > default.

This is the only module that reads the environment.
"""

import difflib
import json
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import platformdirs
from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from r3mes_vllm.errors import ConfigError
from r3mes_vllm.wire import Wallet

_UNITS = {"": 1, "B": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}

_SECRET = ("api_keys", "admin_key", "database_url")

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


class Settings(BaseSettings):
    model_config = SettingsConfigDict(env_prefix="R3MES_", extra="forbid", frozen=True)

    enable_serving_node: bool = False

    # node
    backend_url: str = ""
    serving_node_url: str | None = None
    serving_node_host: str = "0.0.0.0"
    serving_node_port: int = Field(8081, ge=1, le=65535)
    wallet_address: Wallet | None = None
    heartbeat_interval: float = Field(30.0, ge=1, le=55)
    loras: Annotated[list[str], NoDecode] = []
    lora_policy: str = "first"
    """Without `loras`: `first`, `all`, `category:NAME`, or an import path `module:function`."""
    followed: Annotated[list[str], NoDecode] = []
    """Of `loras`, what the registry may replace by another CID; for the server's process."""
    on_demand: bool = True
    """Load an adapter of the registry when the first request for it comes."""
    allow_cid: bool = False
    """Take `ipfs://CID` for the name of an adapter."""
    load_wait: float = Field(20.0, ge=0)
    """Seconds a request waits for an adapter that is not here yet."""
    loads_waiting: int = Field(64, ge=1)
    registry_refresh: float = Field(30.0, ge=1)
    """Seconds between two looks at the registry for new versions."""
    canary_interval: float = Field(5.0, ge=0.5, le=60)
    """Seconds between two looks at the engine's health."""
    canary_timeout: float = Field(8.0, ge=1)
    """Seconds that a step of a well engine may take."""
    restarts: Annotated[list[float], NoDecode] = []
    """When this node started again because of its engine, by the machine's clock; internal."""
    restored: Annotated[list[str], NoDecode] = []
    """`NAME=CID` of the adapters that such a node goes on with, in place of `loras`; internal."""
    model: str | None = None
    max_loras: int | None = Field(None, ge=1)
    max_lora_rank: int | None = Field(None, ge=1)
    open_chat: bool = False
    public_metrics: bool = False
    insecure: bool = False
    api_keys: Annotated[list[str], NoDecode] = []
    api_keys_file: Path | None = None
    admin_key: str | None = None
    body_bytes: int = Field(8 << 20, ge=1)
    """Of one request; `8M` and the like are understood."""
    body_timeout: float = Field(30.0, gt=0)
    """Seconds in which a request's body must have come."""
    requests_at_once: int = Field(1024, ge=1)
    """Running and waiting; more are refused."""
    limits: RequestLimits = RequestLimits()
    chat: ChatSettings = ChatSettings()
    adapter_cycle: float = Field(1.8, ge=0)
    """Seconds in which each adapter that waits for a slot has a turn; 0: stock vLLM's schedule."""
    adapters: dict[str, AdapterSettings] = {}

    # supply
    ipfs_api_url: str = "http://127.0.0.1:5001"
    ipfs_gateways: Annotated[list[str], NoDecode] = []
    cache_dir: Path = Path(platformdirs.user_cache_dir("r3mes-vllm"))
    cache_size: int = Field(50 << 30, ge=1 << 20)
    """Bytes; `20G` and the like are understood."""
    ipfs_blocks: Annotated[list[Path], NoDecode] = []
    """Folders of blocks, such as `~/.ipfs/blocks` of a Kubo that isn't running."""
    ipfs_pin: bool = False
    """Pin what is fetched on the IPFS daemon."""
    adapter_bytes: int = Field(4 << 30, ge=1)
    """Of one adapter, with all that comes with it; `4G` and the like are understood."""
    adapter_files: int = Field(1000, ge=1)
    adapter_depth: int = Field(16, ge=1)
    adapter_name_length: int = Field(255, ge=1, le=255)
    fetch_stall: float = Field(30.0, gt=0)
    """Seconds without progress after which a source has failed."""
    fetch_timeout: float = Field(1800.0, gt=0)
    """Seconds in all."""
    fetches_at_once: int = Field(4, ge=1)
    fetches_waiting: int = Field(256, ge=1)
    state_dir: Path = Path(platformdirs.user_state_dir("r3mes-vllm"))

    # backend
    backend_host: str = "127.0.0.1"
    backend_port: int = Field(
        8000, ge=1, le=65535, validation_alias=AliasChoices("backend_port", "BACKEND_PORT")
    )
    database_url: str | None = None
    fallback_url: str | None = None
    with_local_model: str | None = None
    allow_private_nodes: bool = False
    require_signatures: bool = False

    @field_validator(
        *("loras", "followed", "restarts", "restored"),
        *("ipfs_gateways", "ipfs_blocks", "api_keys"),
        mode="before",
    )
    @classmethod
    def _split(cls, value: Any) -> Any:
        if isinstance(value, str):
            return [part.strip() for part in value.split(",") if part.strip()]
        return value

    @field_validator("cache_size", "adapter_bytes", "body_bytes", mode="before")
    @classmethod
    def _bytes(cls, value: Any) -> Any:
        return parse_bytes(value) if isinstance(value, str) else value

    @field_validator("backend_url", "serving_node_url", "ipfs_api_url", "fallback_url")
    @classmethod
    def _url(cls, value: str | None) -> str | None:
        if value and not value.startswith(("http://", "https://")):
            raise ValueError("must begin with http:// or https://")
        return value.rstrip("/") if value else value

    @field_validator("cache_dir", "state_dir")
    @classmethod
    def _absolute(cls, value: Path) -> Path:
        # vLLM takes a relative path that does not exist for a hub repository and downloads it.
        return value.expanduser().absolute()

    @property
    def backend(self) -> str:
        """The backend's URL without a trailing slash."""
        return self.backend_url or f"http://localhost:{self.backend_port}"

    @property
    def public_url(self) -> str:
        """Where the network reaches this node, without a trailing slash."""
        if self.serving_node_url:
            return self.serving_node_url
        host = self.serving_node_host
        if host in ("0.0.0.0", "::", ""):
            host = "localhost"
        return f"http://{f'[{host}]' if ':' in host else host}:{self.serving_node_port}"

    def environ(self) -> dict[str, str]:
        """The variables from which another process loads these same settings."""
        values = self.model_dump(mode="json", exclude_defaults=True)
        return {
            _variable(name): value
            if isinstance(value, str)
            else ",".join(map(str, value))
            if isinstance(value, list)
            else json.dumps(value)
            for name, value in values.items()
        }

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings, env_settings)


def load(options: Mapping[str, Any] | None = None, config: Path | None = None) -> Settings:
    """Settings from `options` (those not None), the environment and the TOML file `config`.

    Raises ConfigError with the setting's name and the wrong value.
    """
    given = {key: value for key, value in (options or {}).items() if value is not None}
    from_file = _read_toml(config) if config else {}

    class Layered(Settings):
        @classmethod
        def settings_customise_sources(
            cls, settings_cls: type[BaseSettings], *args: Any, **kwargs: Any
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            above = Settings.settings_customise_sources(settings_cls, *args, **kwargs)
            return (*above, InitSettingsSource(settings_cls, from_file))

    try:
        return Layered(**given)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"]) or "settings"
        if first["type"] == "extra_forbidden":
            message = f"unknown setting {name!r}{_nearest(name, Settings.model_fields)}"
        else:
            given_value = "" if name.split(".")[0] in _SECRET else f" (given: {first['input']!r})"
            message = f"{name}: {first['msg']}{given_value}"
        raise ConfigError(message, hint=f"fix it in {config}" if config else "") from error


def misspelt(environ: Mapping[str, str] = os.environ) -> list[str]:
    """A sentence for each `R3MES_*` variable that no setting reads."""
    known = {_variable(name) for name in Settings.model_fields}
    unknown = sorted(name for name in environ if name.startswith("R3MES_") and name not in known)
    return [f"unknown variable {name}{_nearest(name, known)}" for name in unknown]


def _variable(name: str) -> str:
    return "BACKEND_PORT" if name == "backend_port" else f"R3MES_{name.upper()}"


def parse_bytes(text: str) -> int:
    """`1048576`, `512M`, `20G`, `1.5 GiB` → bytes (powers of 1024). Raises ValueError."""
    unit = text.strip().upper().removesuffix("B").removesuffix("I")
    number = unit.rstrip("KMGT")
    try:
        return int(float(number) * _UNITS[unit[len(number) :].strip()])
    except (ValueError, KeyError, OverflowError):
        raise ValueError(f"{text!r} is not a size such as 512M or 20G") from None


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"can't read {path}: {error.strerror}") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error


def _nearest(name: str, known: Mapping[str, Any] | set[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f": did you mean {close[0]}?" if close else ""
