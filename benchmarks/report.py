"""The page of results, made of the JSON files beside it and of nothing else.

python -m benchmarks.report [FOLDER]

It fills the tables of docs/performance.md too, if the folder is the repository's.
"""

import re
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from benchmarks.results import LEAST_PAIRS, ONLY, RESULTS, Figure, Run, told
from benchmarks.suites import SUITES

PAGE = "README.md"
EXPLAINED = RESULTS.parent.parent / "docs" / "performance.md"
_PLOTS = 3
"""Of a run, on that page."""
_BLOCK = re.compile(r"(<!-- results: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
_HEAD = """# Results

Made of the JSON files in this folder by `python -m benchmarks.report`; nothing is written by hand.
Each figure is of two sides measured in turn in one run on one machine; the ratio is ours to the
peer's of the same pair. Given is the median (least to most). Of runs of one suite, model,
machine and dtype the newest whole one is shown, and the newest of each part that was measured
later. How to run them: [../README.md](../README.md).
"""


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS
    for path in written(folder):
        print(path)


def written(folder: Path) -> list[Path]:
    """The page, and the plots of each run where matplotlib is installed.

    Raises ValueError for a JSON file that no run has written.
    """
    from benchmarks import plots

    runs = read(folder)
    pages = {folder / PAGE: page_of(runs)}
    drawn = [path for run in shown(runs) for path in plots.drawn(run, folder)]
    if folder.resolve() == RESULTS:
        pages[EXPLAINED] = explained(EXPLAINED.read_text(), runs)
    for path, text in pages.items():
        path.write_text(text)
    return [*pages, *drawn]


def read(folder: Path) -> list[Run]:
    return [Run.read(path) for path in sorted(folder.glob("*.json"))]


def shown(runs: Sequence[Run]) -> list[Run]:
    """In the order of the suites: of each group the newest whole run and the newest of each part
    that was measured later; a quick one only where no other is."""
    groups: dict[tuple[str, ...], list[Run]] = defaultdict(list)
    for run in runs:
        groups[run.group].append(run)
    order = {name: number for number, name in enumerate(SUITES)}
    return sorted(
        (run for of_group in groups.values() for run in _best(of_group)),
        key=lambda it: (order.get(it.suite, len(order)), it.group, it.started),
    )


def _best(of_group: Sequence[Run]) -> list[Run]:
    slow = [it for it in of_group if not it.quick] or of_group
    newest = sorted(slow, key=lambda it: it.started)
    whole = [it for it in newest if it.whole][-1:]
    later = (it for it in newest if ONLY in it.settings and it.started > whole[0].started)
    parts = [*later] if whole else newest
    return [*whole, *{it.settings.get(ONLY): it for it in parts}.values()]


def page_of(runs: Sequence[Run]) -> str:
    parts = [_HEAD, _machines(shown(runs))] if runs else [_HEAD, "No run yet.\n"]
    by_suite: dict[str, list[Run]] = defaultdict(list)
    for run in shown(runs):
        by_suite[run.suite].append(run)
    for suite, of_suite in by_suite.items():
        parts.append(f"## {suite}\n\n{of_suite[0].about}\n")
        parts += [section(run) for run in of_suite]
    return "\n".join(parts)


def explained(page: str, runs: Sequence[Run]) -> str:
    """`page` with the figures anew between `<!-- results: SUITE -->` and `<!-- end -->`."""
    return _BLOCK.sub(lambda it: it[1] + _of_suite(it[2], runs) + it[3], page)


def _of_suite(suite: str, runs: Sequence[Run]) -> str:
    """The newest run of each model on a GPU, and the newest without: what has a target and, where
    nothing has one, what its plots say by bars. Parts of one only where none is whole."""
    of_suite = [it for it in runs if it.suite == suite and not it.quick]
    newest = {
        (bool(run.machine.gpu), run.model): run.group
        for run in sorted(of_suite, key=lambda it: (it.whole, it.started))
    }
    if not newest:
        return "\nNot measured yet.\n\n"
    folder = f"../{RESULTS.parent.name}/{RESULTS.name}"
    lines = [""]
    groups = [group for _, group in sorted(newest.items(), reverse=True)]
    chosen = shown(of_suite)
    for run in (it for group in groups for it in chosen if it.group == group):
        where = run.machine.gpu or f"{run.machine.cores} cores of {run.machine.processor}"
        dtype = str(run.settings.get("dtype", ""))
        ended = "" if run.ended == "complete" else f"**not complete: {run.ended}**"
        only = f"**only {run.settings[ONLY]}**" if ONLY in run.settings else ""
        parts = (where, run.model, dtype, f"{run.started:%Y-%m-%d}", only, ended)
        about = ", ".join(it for it in parts if it)
        lines += [f"{about}; [all figures, settings, pairs]({folder}/{PAGE}#{suite}):", ""]
        aimed = [it for it in run.figures if it.target]
        told_of = aimed or [it for it in run.figures if it.chart and it.x is None]
        lines += table(told_of) if told_of else []
        for chart in [*charts(run)][:_PLOTS]:
            name = f"{plot_name(run, chart)}.png"
            lines += [f"![{chart}]({folder}/{name})", ""] if (RESULTS / name).exists() else []
    return "\n".join([*lines, ""])


def section(run: Run) -> str:
    """One run: what decided it, its table, its plots."""
    lines = [f"### {_title(run)}", "", _origin(run), ""]
    if run.quick:
        lines += ["**Quick: it shows that the suite runs, and says nothing about speed.**", ""]
    if run.ended != "complete":
        lines += [f"**Not complete: {run.ended}.**", ""]
    short = [it for it in run.figures if len(it.pairs) < LEAST_PAIRS]
    if short and not run.quick:
        lines += [f"**{len(short)} figures have fewer than {LEAST_PAIRS} pairs.**", ""]
    lines += table(run.figures)
    lines += [f"- {note}" for note in run.notes] + ([""] if run.notes else [])
    for chart in charts(run):
        name = plot_name(run, chart)
        lines += [f"![{chart}]({name}.png) ([SVG]({name}.svg))", ""]
    return "\n".join(lines)


def charts(run: Run) -> dict[str, list[Figure]]:
    """The plots, each with what is drawn there."""
    found: dict[str, list[Figure]] = defaultdict(list)
    for figure in run.figures:
        if figure.chart and figure.ratio:
            found[figure.chart].append(figure)
    return found


def plot_name(run: Run, chart: str) -> str:
    """Of the plot's files, without the ending."""
    kept = "".join(it if it.isalnum() else " " for it in chart.lower())
    return f"{run.name}-{'-'.join(kept.split())}"


def table(figures: Sequence[Figure]) -> list[str]:
    lines = [
        "| figure | unit | ours | peer | ratio | target | met | pairs |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for it in figures:
        sides = f"{it.sides[0]} / {it.sides[1]}"
        name = f"{it.name}{f' ({it.setting})' if it.setting else ''}: {sides}"
        unit = f"{it.unit}, {it.better} is better"
        met = {None: "", True: "yes", False: "**no**"}[it.met]
        ratio = str(it.ratio or "-")
        if it.target and it.target.of == "added":
            ratio += f"; added {it.added or '-'}"
        cells = [name, unit, it.ours or "-", it.peer or "-", ratio, it.target or "", met]
        lines.append(f"| {' | '.join(map(str, cells))} | {len(it.pairs)} |")
    return [*lines, ""]


def _title(run: Run) -> str:
    only = f"only {run.settings[ONLY]}" if ONLY in run.settings else ""
    where = run.machine.gpu or run.machine.processor
    return ", ".join(it for it in (run.model, where, only) if it)


def _origin(run: Run) -> str:
    machine = run.machine
    settings = ", ".join(
        f"{name.replace('_', ' ')} {value}" for name, value in run.settings.items()
    )
    tree = "" if run.clean or not run.commit else ", with changes"
    parts = [
        f"{run.started:%Y-%m-%d %H:%M} UTC, {told(run.seconds)} s",
        f"{machine.cores} cores, {told(machine.memory_gib)} GiB",
        f"load {machine.load_before:g} before, {machine.load_after:g} after",
        f"commit {run.commit[:12] or 'unknown'}{tree}",
        ", ".join(f"{name} {version}" for name, version in run.versions.items()),
        f"seed {run.seed}",
        *([f"sampler: {run.sampler}"] if run.sampler else []),
        *([settings] if settings else []),
    ]
    return f"{'; '.join(parts)}. [JSON]({run.name}.json)"


def _machines(runs: Sequence[Run]) -> str:
    """Which figures are from which machine."""
    by_machine: dict[str, list[str]] = defaultdict(list)
    for run in runs:
        machine = run.machine
        name = machine.gpu or f"no GPU: {machine.cores} cores of {machine.processor}"
        by_machine[name].append(run.suite)
    rows = [f"| {name} | {', '.join(dict.fromkeys(of))} |" for name, of in by_machine.items()]
    return "\n".join(["| machine | suites |", "|---|---|", *rows, ""])


if __name__ == "__main__":
    main()
