"""`r3mes-vllm bench`."""

from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer

from r3mes_vllm.errors import ConfigError

_ROOT = Path(__file__).parent.parent.parent


def bench(
    suite: Annotated[str, typer.Argument(help="A suite's name, `all`, or `list`.")],
    rounds: Annotated[
        int | None, typer.Option(min=1, help="Pairs of each figure. [the suite's own, 5 or more]")
    ] = None,
    quick: Annotated[
        bool,
        typer.Option("--quick", help="A tiny model and few requests, to see that it runs."),
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="To standard output, not a table.")] = False,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for JSON, page and plots. [benchmarks/results, quick: none]"),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of prompts, weights and arrivals.")] = 0,
    model: Annotated[
        str, typer.Option(help="smol, tiny, or of random weights: llama-1b, llama-8b.")
    ] = "smol",
    dtype: Annotated[
        str,
        typer.Option(help="Of the engine: bfloat16, float32, or auto, the faster one here."),
    ] = "auto",
    only: Annotated[
        str, typer.Option(help="A part of the names of the cases to measure; several: 'S1|zipf'.")
    ] = "",
    seconds: Annotated[
        float | None, typer.Option(min=0.1, help="Of a measurement. [the suite's own]")
    ] = None,
) -> None:
    """Measure against the peers, in turn, on this machine; Ctrl-C keeps what was measured.

    Example: r3mes-vllm bench fairness --rounds 5
    """
    if not (_ROOT / "benchmarks" / "suites.py").is_file():
        raise ConfigError(
            "the benchmarks are not part of the installed package",
            hint="run it in a checkout of the repository, after make test has set it up",
        )
    status = import_module("benchmarks.command").bench(
        suite,
        rounds=rounds,
        quick=quick,
        as_json=json,
        out=out,
        seed=seed,
        model=model,
        dtype=dtype,
        only=only,
        seconds=seconds,
    )
    raise typer.Exit(status)
