"""Every setting of node and backend, in one place: option > environment > TOML file > default.

This is the only module that reads the environment.
"""

import difflib
import json
import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import platformdirs
from pydantic import (
    AliasChoices,
    Field,
    StringConstraints,
    ValidationError,
    field_validator,
)
from pydantic_core import ErrorDetails
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from r3mes_vllm import versions
from r3mes_vllm.errors import ConfigError
from r3mes_vllm.tables import AdapterSettings, ChatSettings, RateSettings, RequestLimits
from r3mes_vllm.urls import public
from r3mes_vllm.validation import words
from r3mes_vllm.wire import Wallet

EMBEDDED_MODEL = "SmolLM2-135M-Instruct"
"""The base model that comes out of a Python package."""

Origin = Annotated[
    str, StringConstraints(pattern=r"^https?://([a-z0-9.-]+|\[[0-9a-f:.]+\])(:[0-9]{1,5})?$")
]
"""As a browser sends it (https://fetch.spec.whatwg.org/#origin-header)."""

_UNITS = {"": 1, "B": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}

SECRET = ("api_keys", "admin_key", "database_url", "fallback_key", "fallback_url")

INTERNAL = ("followed", "passing", "restarts", "restored", "base_only")
"""What the programs of this package tell each other."""

_OURS = {
    "model": "`model`",
    "served_model_name": "`model`",
    "host": "`serving_node_host`",
    "port": "`serving_node_port`",
    "api_key": "`api_keys`",
    "lora_modules": "`loras`",
    "enable_lora": "this package",
    "max_loras": "`max_loras`",
    "max_cpu_loras": "this package",
    "max_lora_rank": "`max_lora_rank`",
    "api_server_count": "this package",
    "scheduler_cls": "this package",
    "worker_extension_cls": "this package",
    "ssl_certfile": "`ssl_certfile`",
    "ssl_keyfile": "`ssl_keyfile`",
}
"""Options of vLLM's that follow from settings."""


class Settings(BaseSettings):
    # An empty variable is one that is not set: what Compose makes of `${NAME:-}`.
    model_config = SettingsConfigDict(
        env_prefix="R3MES_", extra="forbid", frozen=True, env_ignore_empty=True
    )

    enable_serving_node: bool = False

    # node
    backend_url: str = ""
    backend_ca: Path | None = None
    """Certificates to trust when talking to the backend, in place of the public ones."""
    ssl_certfile: Path | None = None
    """Of the node, with its chain, in PEM; it is followed while the node serves."""
    ssl_keyfile: Path | None = None
    """Of it; None: the key is in the same file."""
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
    passing: Annotated[list[str], NoDecode] = []
    """Of `loras`, what came on demand and may leave again as it came; internal."""
    on_demand: bool = True
    """Load an adapter of the registry when the first request for it comes."""
    base_only: bool = False
    """The base model alone, in no network: for the backend that started this node; internal."""
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
    """None for EMBEDDED_MODEL."""
    max_loras: int | None = Field(None, ge=1)
    max_lora_rank: int | None = Field(None, ge=1)
    open_chat: bool = False
    public_metrics: bool = False
    insecure: bool = False
    api_keys: Annotated[list[str], NoDecode] = []
    api_keys_file: Path | None = None
    admin_key: str | None = None
    header_bytes: int = Field(64 << 10, ge=1 << 10)
    """Of one request, with its first line."""
    header_timeout: float = Field(10.0, gt=0)
    """Seconds in which they must have come, from the connection's first moment on."""
    body_bytes: int = Field(8 << 20, ge=1)
    """Of one request; `8M` and the like are understood."""
    body_timeout: float = Field(30.0, gt=0)
    """Seconds in which a request's body must have come."""
    requests_at_once: int = Field(1024, ge=1)
    """Running and waiting; more are refused."""
    drain_timeout: float = Field(60.0, ge=0)
    """Seconds that running requests have to finish when the node is told to end."""
    log_requests: bool = False
    """A line for each request that has ended."""
    log_json: bool = False
    """These lines in JSON."""
    limits: RequestLimits = RequestLimits()
    rates: RateSettings = RateSettings()
    chat: ChatSettings = ChatSettings()
    adapter_cycle: float = Field(1.7, ge=0)
    """Seconds in which each adapter that waits for a slot has a turn; 0: stock vLLM's schedule."""
    adapters: dict[str, AdapterSettings] = {}
    vllm: dict[str, Any] = {}
    """`[vllm]`: options of vLLM's own by their names, before those that follow `--`."""

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
    fallback: Annotated[list[Literal["on-demand", "url", "local"]], NoDecode] = [
        *("on-demand", "url", "local")
    ]
    """What answers when no node holds an adapter, in this order."""
    fallback_url: str | None = None
    """Of an OpenAI-compatible server, as its clients have it; `/v1` is added to a bare host."""
    fallback_key: str | None = None
    """Its API key."""
    fallback_model: str | None = None
    """Without it the name that was asked for if that server lists it, else its first."""
    with_local_model: str | None = None
    cors_origins: Annotated[list[Origin], NoDecode] = []
    """Web pages of these origins may call the backend from a browser."""
    required_node_version: str | None = None
    """Nodes of an earlier one get no requests; existing nodes, which tell none, go on."""
    latest_node_version: str | None = None
    """Told to nodes of an earlier one."""
    forget_nodes_after: int = Field(30, ge=1)
    """Days of silence; those that never proved to live at their URL are forgotten after one."""
    first_byte_timeout: float = Field(120.0, gt=0)
    """Seconds that the nodes have in all to begin a stream."""
    answer_timeout: float = Field(600.0, gt=0)
    """Seconds that they have for an answer that is not streamed."""
    allow_private_nodes: bool = False
    require_signatures: bool = False

    @field_validator(
        *("loras", "followed", "passing", "restarts", "restored"),
        *("ipfs_gateways", "ipfs_blocks", "api_keys", "cors_origins", "fallback"),
        mode="before",
    )
    @classmethod
    def _split(cls, value: Any) -> Any:
        if isinstance(value, str):
            return [part.strip() for part in value.split(",") if part.strip()]
        return value

    @field_validator("cache_size", "adapter_bytes", "body_bytes", "header_bytes", mode="before")
    @classmethod
    def _bytes(cls, value: Any) -> Any:
        return parse_bytes(value) if isinstance(value, str) else value

    @field_validator("required_node_version", "latest_node_version")
    @classmethod
    def _version(cls, value: str | None) -> str | None:
        if value and versions.read(value) is None:
            raise ValueError("is no version such as 1.2.3")
        return value

    @field_validator("vllm")
    @classmethod
    def _options(cls, value: dict[str, Any]) -> dict[str, Any]:
        for name, given in value.items():
            option = name.replace("-", "_")
            if not re.fullmatch("[a-z][a-z0-9_]*", option):
                raise ValueError(f"{name!r} is not the name of an option")
            if (ours := _OURS.get(option)) is not None:
                raise ValueError(f"{name} is set by {ours}, not here")
            if not isinstance(given, (bool, int, float, str, list, dict)):
                raise ValueError(f"{name} can't be a {type(given).__name__}")
        return value

    @field_validator("backend_url", "serving_node_url", "ipfs_api_url", "fallback_url")
    @classmethod
    def _url(cls, value: str | None) -> str | None:
        if value and not value.startswith(("http://", "https://")):
            raise ValueError("must begin with http:// or https://")
        return value.rstrip("/") if value else value

    @field_validator("ipfs_gateways")
    @classmethod
    def _gateways(cls, value: list[str]) -> list[str]:
        for url in value:
            if not re.match(r"https?://[^/?#]", url):
                raise ValueError(f"{public(url)!r} must begin with http:// or https://")
        return value

    @field_validator("cache_dir", "state_dir", "backend_ca", "ssl_certfile", "ssl_keyfile")
    @classmethod
    def _absolute(cls, value: Path | None) -> Path | None:
        # vLLM takes a relative path that does not exist for a hub repository and downloads it.
        try:
            return value.expanduser().absolute() if value else None
        except RuntimeError as error:  # `~nobody`
            raise ValueError(f"{value}: no such user") from error

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
        return self.url_of(host)

    @property
    def local_url(self) -> str:
        """Where this machine reaches the node, without a trailing slash."""
        host = self.serving_node_host
        return self.url_of({"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}.get(host, host))

    def url_of(self, host: str) -> str:
        """Of this node on that address of its machine."""
        scheme = "https" if self.ssl_certfile else "http"
        return f"{scheme}://{f'[{host}]' if ':' in host else host}:{self.serving_node_port}"

    @property
    def vllm_arguments(self) -> list[str]:
        """`[vllm]` as vLLM's command line has it."""
        found: list[str] = []
        for name, value in self.vllm.items():
            option = name.replace("_", "-")
            if isinstance(value, bool):
                found.append(f"--{option}" if value else f"--no-{option}")
            elif isinstance(value, list):
                found += [f"--{option}", *map(str, value)]
            else:
                text = json.dumps(value) if isinstance(value, dict) else value
                found.append(f"--{option}={text}")
        return found

    def environ(self) -> dict[str, str]:
        """The variables from which another process loads these same settings."""
        values = self.model_dump(mode="json", exclude_defaults=True)
        return {
            _variable(name): value
            if isinstance(value, str)
            else ",".join(map(str, value)) or ","  # an empty variable would be none
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

    Raises ConfigError with each wrong setting's name and value.
    """
    return load_with_origins(options, config)[0]


def load_with_origins(
    options: Mapping[str, Any] | None = None, config: Path | None = None
) -> tuple[Settings, dict[str, str]]:
    """As `load`, and where each setting is from: `option`, the variable's name, the file's, or
    `default`."""
    given = {key: value for key, value in (options or {}).items() if value is not None}
    from_file = _read_toml(config) if config else {}

    layers: list[PydanticBaseSettingsSource] = []

    class Layered(Settings):
        @classmethod
        def settings_customise_sources(
            cls, settings_cls: type[BaseSettings], *args: Any, **kwargs: Any
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            above = Settings.settings_customise_sources(settings_cls, *args, **kwargs)
            layers[:] = [*above, InitSettingsSource(settings_cls, from_file)]
            return tuple(layers)

    try:
        loaded = Layered(**given)
    except ValidationError as error:
        message = "; ".join(map(_mistake, error.errors()))
        raise ConfigError(message, hint=f"fix it in {config}" if config else "") from error
    found = [set(layer()) for layer in layers]
    origins = {}
    for name in Settings.model_fields:
        names = {name, _variable(name)}
        where = ("option", _variable(name), str(config))
        origins[name] = next(
            (text for text, layer in zip(where, found, strict=True) if names & layer), "default"
        )
    return loaded, origins


def _mistake(error: ErrorDetails) -> str:
    name = ".".join(str(part) for part in error["loc"]) or "settings"
    if error["type"] == "extra_forbidden":
        return f"unknown setting {name!r}{_nearest(name, Settings.model_fields)}"
    shown = (
        "" if name.split(".")[0] in (*SECRET, "ipfs_gateways") else f" (given: {error['input']!r})"
    )
    return f"{name}: {words(error)}{shown}"


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
