"""`r3mes-vllm config`: check, show."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from r3mes_vllm import report
from r3mes_vllm.adapters.files import printable
from r3mes_vllm.node import precheck
from r3mes_vllm.settings import INTERNAL, SECRET, load_with_origins, misspelt
from r3mes_vllm.urls import public

_HIDDEN = "***"
_WIDE = 200


def check(
    file: Annotated[
        Path | None, typer.Argument(help="TOML file. [the environment and the defaults alone]")
    ] = None,
) -> None:
    """Say whether a program would start with these settings. Exit status 2 if not.

    Example: r3mes-vllm config check configs/gpu-24gb.toml
    """
    given, origins = load_with_origins(config=file)
    if given.vllm:
        precheck.vllm_options(given)
    for text in [*misspelt(), *precheck.troubles(given, origins)]:
        report.warn(printable(text))
    typer.echo(f"{file or 'the environment'}: ok")


def show(
    config: Annotated[Path | None, typer.Option(help="TOML file with settings.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="An object, for programs.")] = False,
) -> None:
    """Show every setting, its value and where that is from.

    Example: r3mes-vllm config show --config configs/laptop.toml
    """
    given, origins = load_with_origins(config=config)
    values = given.model_dump(mode="json")
    values["ipfs_gateways"] = [*map(public, given.ipfs_gateways)]
    shown = {
        name: {"value": _HIDDEN if value and name in SECRET else value, "origin": origins[name]}
        for name, value in values.items()
        if name not in INTERNAL
    }
    if as_json:
        typer.echo(json.dumps(shown, indent=2))
        return
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=_WIDE)
    table = Table("setting", "value", "origin", box=None, pad_edge=False)
    for name, it in shown.items():
        table.add_row(name, printable(_text(it["value"])), printable(it["origin"]))
    console.print(table, markup=False)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


COMMANDS: dict[str, Callable[..., None]] = {"check": check, "show": show}
