"""The command `r3mes-vllm`: options in, one line of error out."""

import sys
from typing import Annotated

import click
import typer

from r3mes_vllm import __version__
from r3mes_vllm.cli import backend, demo, serve
from r3mes_vllm.errors import ConfigError, R3mesError

app = typer.Typer(
    name="r3mes-vllm",
    help="Serve many LoRA adapters, fetched and verified from IPFS, on one vLLM engine.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.command("serve", context_settings={"allow_extra_args": True})(serve.serve)
app.command("backend")(backend.backend)
app.command("demo")(demo.demo)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"r3mes-vllm {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="And exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Tracebacks and vLLM's own log.")] = False,
) -> None:
    """Example: r3mes-vllm serve --loras legal,medical"""


def main() -> None:
    """Exit status: 0, 1 on failure, 2 on bad usage, 130 on Ctrl-C."""
    try:
        status = app(standalone_mode=False)
    except click.exceptions.Abort:
        status = 130
    except KeyboardInterrupt:
        status = 130
    except click.ClickException as error:
        error.show()
        status = error.exit_code
    except R3mesError as error:
        if "--debug" in sys.argv:
            raise
        print(f"error: {error}", file=sys.stderr)
        if error.hint:
            print(f"  try: {error.hint}", file=sys.stderr)
        status = 2 if isinstance(error, ConfigError) else 1
    sys.exit(status)
