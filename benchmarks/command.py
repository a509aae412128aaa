"""What `r3mes-vllm bench` does: run suites, write what they found, say it as a table."""

import signal
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from benchmarks import plots, report
from benchmarks.harness import Plan, carried_out, gpu
from benchmarks.results import RESULTS, Run
from benchmarks.shapes import SHAPES
from benchmarks.side_by_side import processor
from benchmarks.suites import SUITES, Suite
from r3mes_vllm.errors import ConfigError

ALL, LIST = "all", "list"
QUICK_ROUNDS = 2
DTYPES = ("auto", "bfloat16", "float32")
_FAST_BF16 = ("avx512_bf16", "amx_bf16")


def bench(
    name: str,
    *,
    rounds: int | None = None,
    quick: bool = False,
    as_json: bool = False,
    out: Path | None = None,
    seed: int = 0,
    model: str = "smol",
    dtype: str = "auto",
    only: str = "",
    seconds: float | None = None,
) -> int:
    """The exit status: 0, 1 if a suite failed, 130 after Ctrl-C.

    Results go to `out`, which is `benchmarks/results` where nothing is said; those of a quick run
    nowhere then. Raises ConfigError for a suite or a model that is not there, and for a folder that
    can't be written to.
    """
    if name == LIST:
        for suite in SUITES.values():
            print(f"{suite.name:14} {suite.about}")
        return 0
    suites = wanted(name)
    if dtype not in DTYPES:
        raise ConfigError(f"no --dtype {dtype!r}", hint=f"it is one of {', '.join(DTYPES)}")
    if model not in SHAPES:
        raise ConfigError(f"no model {model!r}", hint=f"--model is one of {', '.join(SHAPES)}")
    folder = out or (None if quick else RESULTS)
    if folder:
        _refuse_unwritable(folder)
    status = 0
    for suite in suites:
        pairs = rounds or (QUICK_ROUNDS if quick else suite.rounds)
        plan = Plan(pairs, quick, seed, model, _chosen(dtype), only, seconds)
        with _ended_as_by_ctrl_c():
            run, interrupted = carried_out(suite, plan, _say)
        _told(run, as_json)
        if folder and run.figures:
            try:
                _kept(run, folder)
            except OSError as error:
                _say(f"not kept but on standard output: {error}")
                if not as_json:  # else it is there already
                    print(run.text(), end="", flush=True)
                status = 1
        if interrupted:
            return 130
        if run.ended != "complete":
            status = 1
    return status


def _refuse_unwritable(folder: Path) -> None:
    """Before hours are spent."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(f"no result can be written: {error}", hint="give --out FOLDER") from error


def _chosen(dtype: str) -> str:
    """A processor without instructions for bf16 is four times slower with it."""
    if dtype != "auto":
        return dtype
    return "bfloat16" if gpu() or any(it in processor() for it in _FAST_BF16) else "float32"


@contextmanager
def _ended_as_by_ctrl_c() -> Iterator[None]:
    """SIGTERM too: the programs that a suite started must end with it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def wanted(name: str) -> Sequence[Suite]:
    """Raises ConfigError."""
    if name == ALL:
        return sorted(SUITES.values(), key=lambda it: it.long)
    if name not in SUITES:
        raise ConfigError(f"no suite {name!r}", hint="r3mes-vllm bench list")
    return [SUITES[name]]


def _told(run: Run, as_json: bool) -> None:
    print(run.text() if as_json else report.section(run), end="" if as_json else "\n", flush=True)


def _kept(run: Run, folder: Path) -> None:
    path = run.write(folder)
    try:
        report.written(folder)
    except ValueError as error:
        _say(f"the page of results is as it was: {error}")
    _say(f"{path}, and {path.parent / report.PAGE}")
    if not plots.available():
        _say(f"{plots.MISSING}; {plots.HINT}")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
