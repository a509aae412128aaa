"""The command `r3mes-vllm`: options in, one line of error out."""

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Annotated, ParamSpec

import typer
from typer.exceptions import TyperException

from r3mes_vllm import __version__
from r3mes_vllm.adapters.files import printable
from r3mes_vllm.cli import adapter, backend, bench, config, demo, doctor, serve, status, store
from r3mes_vllm.errors import ConfigError, R3mesError

app = typer.Typer(
    name="r3mes-vllm",
    help="Serve many LoRA adapters, fetched and verified from IPFS, on one vLLM engine.\n\n"
    "Example: r3mes-vllm serve --loras legal,medical",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,  # it takes a default in [] for markup, and leaves it out
)

P = ParamSpec("P")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"r3mes-vllm {__version__}")
        raise typer.Exit


_VERSION = "program_version"
Version = Annotated[
    bool, typer.Option("--version", callback=_show_version, is_eager=True, help="And exit.")
]


def _plain(command: Callable[P, None]) -> Callable[P, None]:
    """Errors that a person can mend become one line and a hint; `--version` is added."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        kwargs.pop(_VERSION, None)
        try:
            command(*args, **kwargs)
        except KeyboardInterrupt:
            raise typer.Exit(130) from None
        except R3mesError as error:
            if "--debug" in sys.argv:
                raise
            # What it quotes may be a stranger's.
            typer.echo(f"error: {printable(str(error))}", err=True)
            if error.hint:
                typer.echo(f"  try: {printable(error.hint)}", err=True)
            raise typer.Exit(2 if isinstance(error, ConfigError) else 1) from error
        except ModuleNotFoundError as error:
            if "--debug" in sys.argv or (error.name or "").partition(".")[0] != "vllm":
                raise
            typer.echo("error: vLLM is not installed", err=True)
            typer.echo("  try: pip install 'r3mes-vllm[cuda]', or [cpu] without a GPU", err=True)
            raise typer.Exit(1) from error
        except OSError as error:
            if "--debug" in sys.argv or isinstance(error, BrokenPipeError):
                raise
            typer.echo(f"error: {printable(str(error)[:300])}", err=True)
            typer.echo("  try: the same with --debug before the command says where", err=True)
            raise typer.Exit(1) from error

    taken = inspect.signature(command)
    if "version" not in taken.parameters:  # of what is published, in `adapter publish`
        added = inspect.Parameter(
            _VERSION, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Version
        )
        run.__signature__ = taken.replace(  # type: ignore[attr-defined]
            parameters=[*taken.parameters.values(), added]
        )
        run.__annotations__ = {**command.__annotations__, _VERSION: Version}
    return run


def _group(version: Version = False) -> None:
    """Its help stands with its name."""


app.command("serve", context_settings={"allow_extra_args": True})(_plain(serve.serve))
app.command("backend")(_plain(backend.backend))
app.command("demo")(_plain(demo.demo))
app.command("bench")(_plain(bench.bench))
app.command("doctor")(_plain(doctor.doctor))
app.command("status")(_plain(status.status))

_adapters = typer.Typer(
    name="adapter",
    rich_markup_mode=None,
    help="Publish adapters, and keep those on this machine.\n\n"
    "Example: r3mes-vllm adapter inspect ./my-adapter",
)
for _name, _command in (adapter.COMMANDS | store.COMMANDS).items():
    _adapters.command(_name)(_plain(_command))
app.add_typer(_adapters, callback=_group, no_args_is_help=True)

_config = typer.Typer(
    name="config",
    rich_markup_mode=None,
    help="Look at settings before a program runs with them.\n\nExample: r3mes-vllm config show",
)
for _name, _look in config.COMMANDS.items():
    _config.command(_name)(_plain(_look))
app.add_typer(_config, callback=_group, no_args_is_help=True)


@app.callback()
def _root(
    version: Version = False,
    debug: Annotated[bool, typer.Option("--debug", help="Tracebacks and vLLM's own log.")] = False,
) -> None:
    """Its help stands above: Typer takes that one."""


def main() -> None:
    """Exit status: 0, 1 on failure, 2 on bad usage, 130 on Ctrl-C."""
    try:
        sys.exit(app(prog_name="r3mes-vllm", standalone_mode=False))
    except TyperException as error:
        text, context = error.format_message(), getattr(error, "ctx", None)
        if text.startswith("Usage:"):  # nothing was asked: that is the help
            typer.echo(text, err=True)
        else:
            command = context.command_path if context else "r3mes-vllm"
            typer.echo(f"error: {printable(text)}", err=True)
            typer.echo(f"  try: {command} --help", err=True)
        sys.exit(error.exit_code)
