"""The plots of a run, as PNG and SVG; the same bytes for the same figures and matplotlib."""

from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.report import charts, plot_name
from benchmarks.results import Figure, Run

MISSING = "no plots: matplotlib is not installed"
HINT = "pip install matplotlib, then python -m benchmarks.report"
_WIDE, _HIGH, _BAR = 8.0, 4.5, 0.35
"""Inches."""


def available() -> bool:
    return find_spec("matplotlib") is not None


def drawn(run: Run, folder: Path) -> list[Path]:
    """The files, one PNG and one SVG for each chart; none without matplotlib."""
    if not available():
        return []
    matplotlib: Any = import_module("matplotlib")  # which has no types
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = run.name
    matplotlib.rcParams["svg.fonttype"] = "none"
    found = []
    for chart, figures in charts(run).items():
        drawing = _drawing(run, chart, figures)
        for ending, told in (("png", {"Software": None}), ("svg", {"Date": None, "Creator": None})):
            path = folder / f"{plot_name(run, chart)}.{ending}"
            drawing.savefig(path, metadata=told, dpi=120)
            found.append(path)
    return found


def _drawing(run: Run, chart: str, figures: Sequence[Figure]) -> Any:
    lines = [it for it in figures if it.x is not None]
    high = _HIGH if lines else max(2.0, 1.2 + _BAR * len(figures))
    drawing: Any = import_module("matplotlib.figure").Figure(
        figsize=(_WIDE, high), layout="constrained"
    )
    axes = drawing.subplots()
    (_lines if lines else _bars)(axes, lines or figures)
    sides = dict.fromkeys(" / ".join(it.sides) for it in figures)
    better = dict.fromkeys(it.better for it in figures)
    title = f"{chart}\n{run.model or run.suite}, {run.machine.gpu or run.machine.processor}"
    axes.set_title(f"{title}{' (quick)' if run.quick else ''}", fontsize=9)
    label = next(iter(sides)) if len(sides) == 1 else "ours / peer"
    label = f"{label}\n{' or '.join(better)} is better"
    (axes.set_ylabel if lines else axes.set_xlabel)(label, fontsize=8)
    axes.tick_params(labelsize=8)
    return drawing


def _lines(axes: Any, figures: Sequence[Figure]) -> None:
    xs = sorted({it.x for it in figures if it.x is not None})
    for series in dict.fromkeys(it.series for it in figures):
        of = sorted((it for it in figures if it.series == series), key=lambda it: it.x or 0)
        spreads = [it.ratio for it in of if it.ratio]
        medians = [it.median for it in spreads]
        errors = [
            [it.median - it.least for it in spreads],
            [it.most - it.median for it in spreads],
        ]
        axes.errorbar(
            [it.x for it in of], medians, yerr=errors, marker="o", capsize=3, label=series or None
        )
    if len(xs) > 2 and xs[0] > 0 and xs[-1] / xs[0] > 8:
        axes.set_xscale("log", base=2)
    axes.set_xticks(xs, [f"{x:g}" for x in xs])
    axes.axhline(1, color="grey", linewidth=0.8, linestyle=":")
    axes.set_ylim(bottom=0)
    axes.set_xlabel(next((it.x_axis for it in figures if it.x_axis), ""), fontsize=8)
    if any(it.series for it in figures):
        axes.legend(fontsize=8)


def _bars(axes: Any, figures: Sequence[Figure]) -> None:
    places = range(len(figures))
    for place, it in zip(places, figures, strict=True):
        spread = it.ratio
        if spread is None:
            continue
        errors = [[spread.median - spread.least], [spread.most - spread.median]]
        axes.barh(place, spread.median, xerr=errors, capsize=3, height=0.6, color="#4878a8")
        limit = it.target and it.target.of == "ratio" and (it.target.at_least or it.target.at_most)
        if limit:
            axes.plot([limit, limit], [place - 0.4, place + 0.4], color="black", linewidth=1.5)
    axes.set_yticks(list(places), [it.name for it in figures])
    axes.invert_yaxis()
    axes.axvline(1, color="grey", linewidth=0.8, linestyle=":")
