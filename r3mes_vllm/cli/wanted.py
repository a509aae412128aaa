"""Which adapter a command is asked about, by which settings, and how it answers."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from r3mes_vllm import settings
from r3mes_vllm.adapters.catalog import Catalog, Wanted
from r3mes_vllm.adapters.files import short
from r3mes_vllm.adapters.model_shape import ModelShape
from r3mes_vllm.engine.model import served_name, shape_of
from r3mes_vllm.errors import BackendError, ConfigError
from r3mes_vllm.node.backend_client import BackendClient
from r3mes_vllm.report import say, warn
from r3mes_vllm.settings import Settings

Model = Annotated[
    str | None, typer.Option(help="Hub name or directory of the base model it must fit.")
]
_PLACES = "give a directory, a CAR, a CID, CID/PATH or a name"
What = Annotated[str, typer.Argument(help="A directory, a CAR, a CID, CID/PATH or a NAME.")]


def settings_of(
    config: Path | None,
    cache_dir: Path | None = None,
    backend_url: str | None = None,
    ipfs_api: str | None = None,
    ipfs_gateway: list[str] | None = None,
    model: str | None = None,
    pin: bool | None = None,
    cache_size: str | None = None,
    backend_ca: Path | None = None,
    insecure: bool | None = None,
) -> Settings:
    return settings.load(
        {
            "cache_dir": cache_dir,
            "cache_size": cache_size,
            "backend_url": backend_url,
            "backend_ca": backend_ca,
            "insecure": insecure,
            "ipfs_api_url": ipfs_api,
            "ipfs_gateways": ipfs_gateway or None,
            "ipfs_pin": pin,
            "model": model,
        },
        config,
    )


def base_of(given: Settings) -> ModelShape | None:
    """What the adapter must fit, where `--model` says. Raises ConfigError if that is no model."""
    return shape_of(given.model, served_name(given.model)) if given.model else None


async def find_wanted(given: Settings, what: str) -> Wanted:
    """A path or a CID as it is; a name by the backend's registry, or by the last run."""
    known = Catalog(given.state_dir, None)
    require_path_or_name(what)
    if known.is_place(what):
        return known.find(what)
    try:
        async with BackendClient.of(given) as client:
            return Catalog(given.state_dir, await client.loras()).find(what)
    except BackendError as error:
        warn(f"{error}; asking the last run")
        return known.find(what)


def require_path_or_name(what: str) -> None:
    """Raises ConfigError for what the system can't look for."""
    try:
        if not Catalog.is_place(what) and what.startswith(("/", "./", "../", "~")):
            raise ConfigError(f"there is no {short(what)}", hint=_PLACES)
    except (OSError, RuntimeError, ValueError) as error:
        raise ConfigError(
            f"{short(what)} can't be looked for: {str(error)[:80]}",
            hint=_PLACES,
        ) from error


def tell(as_json: bool, values: dict[str, Any], text: str) -> None:
    if as_json:
        print_json(values)
    else:
        say(text)


def print_json(values: object) -> None:
    json.dump(values, sys.stdout, indent=1, default=str)
    sys.stdout.write("\n")
