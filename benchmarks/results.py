"""What a run of a suite found: pairs of two sides, and all that decided them, as JSON.

Only what was measured is kept; ratios, medians and whether a target was met follow from the pairs,
are written beside them for readers, and are computed anew when a file is read.
"""

import statistics
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, computed_field

SCHEMA = 1
LEAST_PAIRS = 5
"""Fewer say nothing about the spread."""
RESULTS = Path(__file__).parent / "results"
ONLY, LEFT_OUT = "only", "left_out"
"""Settings that say which cases were measured, and which were not; absent where all were."""
_DIGITS = 6


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class Spread(_Frozen):
    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float | None]) -> "Spread | None":
        """Of what is not None; None if nothing is left."""
        known = [value for value in values if value is not None]
        if not known:
            return None
        return cls(median=shortened(statistics.median(known)), least=min(known), most=max(known))

    def __str__(self) -> str:
        if self.least == self.most:
            return told(self.median)
        return f"{told(self.median)} ({told(self.least)} to {told(self.most)})"


class Target(_Frozen):
    """Of the median of the ratio, of what our side measured, or of that less the peer's."""

    of: Literal["ratio", "ours", "added"] = "ratio"
    at_least: float | None = None
    at_most: float | None = None

    def met(self, median: float) -> bool:
        if self.at_least is not None and median < self.at_least:
            return False
        return self.at_most is None or median <= self.at_most

    def __str__(self) -> str:
        limits = [("\u2265", self.at_least), ("\u2264", self.at_most)]
        text = " and ".join(f"{sign} {told(it)}" for sign, it in limits if it is not None)
        return text if self.of == "ratio" else f"{self.of} {text}"


class Pair(_Frozen):
    """Two measurements, one right after the other; None where a side never got so far."""

    ours: float | None
    peer: float | None

    @computed_field  # type: ignore[prop-decorator]
    @property
    def added(self) -> float | None:
        known = self.ours is not None and self.peer is not None
        return shortened(self.ours - self.peer) if known else None  # type: ignore[operator]

    @computed_field  # type: ignore[prop-decorator]
    @property
    def ratio(self) -> float | None:
        return shortened(self.ours / self.peer) if self.ours is not None and self.peer else None


class Figure(_Frozen):
    name: str
    unit: str
    sides: tuple[str, str]
    """Ours and its peer."""
    better: Literal["higher", "lower"]
    setting: str = ""
    """What else this figure depends on, beside the run's settings."""
    target: Target | None = None
    chart: str = ""
    """Figures with the same one share a plot; those with an `x` are points of a line, `series`."""
    series: str = ""
    x: float | None = None
    x_axis: str = ""
    pairs: list[Pair] = Field(default_factory=list)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def ratio(self) -> Spread | None:
        return Spread.of([pair.ratio for pair in self.pairs])

    @computed_field  # type: ignore[prop-decorator]
    @property
    def ours(self) -> Spread | None:
        return Spread.of([pair.ours for pair in self.pairs])

    @computed_field  # type: ignore[prop-decorator]
    @property
    def peer(self) -> Spread | None:
        return Spread.of([pair.peer for pair in self.pairs])

    @computed_field  # type: ignore[prop-decorator]
    @property
    def added(self) -> Spread | None:
        """Ours less the peer's."""
        return Spread.of([pair.added for pair in self.pairs])

    @computed_field  # type: ignore[prop-decorator]
    @property
    def met(self) -> bool | None:
        """None without a target, or where nothing was measured to hold against it."""
        if self.target is None:
            return None
        seen: Spread | None = getattr(self, self.target.of)
        return self.target.met(seen.median) if seen else None


class Machine(_Frozen):
    processor: str
    cores: int
    memory_gib: float
    gpu: str = ""
    load_before: float = 0.0
    load_after: float = 0.0
    """Processes that wanted to run, in the mean of a minute; what exceeds the cores disturbs."""

    @property
    def slug(self) -> str:
        """For names of files and for telling machines apart."""
        name = self.gpu or f"{self.processor.split(' (')[0]} {self.cores} cores"
        kept = "".join(it if it.isalnum() else " " for it in name.lower())
        return "-".join(kept.split()) + ("-bf16" if "avx512_bf16" in self.processor else "")


class Run(_Frozen):
    schema_version: int = SCHEMA
    suite: str
    about: str
    model: str
    sampler: str = ""
    settings: dict[str, str | int | float | bool | None] = Field(default_factory=dict)
    seed: int
    rounds: int
    """Pairs wanted of each figure."""
    quick: bool
    """With a tiny model and few requests: it shows that the suite runs, and says nothing more."""
    ended: str
    """`complete`, `interrupted`, or `failed: ` with the kind of error."""
    started: datetime
    seconds: float
    commit: str
    clean: bool
    """Whether the working tree was that of the commit."""
    versions: dict[str, str]
    machine: Machine
    notes: list[str] = Field(default_factory=list)
    figures: list[Figure]

    @property
    def name(self) -> str:
        """Of its files, without the ending."""
        date = self.started.strftime("%Y-%m-%d-%H%M%S")
        model = "" if self.model in ("", "smol") else f"-{self.model}"
        return f"{self.suite}{model}-{self.machine.slug}-{date}"

    @property
    def whole(self) -> bool:
        """All cases, to the end, often enough."""
        cases = {ONLY, LEFT_OUT}.isdisjoint(self.settings)
        return cases and self.ended == "complete" and self.rounds >= LEAST_PAIRS

    @property
    def group(self) -> tuple[str, str, str, str]:
        """What runs have alike that `report.shown` chooses from."""
        return self.suite, self.model, self.machine.slug, str(self.settings.get("dtype", ""))

    def text(self) -> str:
        return self.model_dump_json(indent=1) + "\n"

    def write(self, folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.name}.json"
        path.write_text(self.text())
        return path

    @classmethod
    def read(cls, path: Path) -> "Run":
        """Raises ValueError for a file that no run has written."""
        text = path.read_text()
        try:
            run = cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise ValueError(f"{path.name}: {where}: {first['msg']}") from error
        if run.schema_version != SCHEMA:
            raise ValueError(f"{path.name}: of schema {run.schema_version}, not {SCHEMA}")
        if run.text() != text:
            raise ValueError(f"{path.name}: edited by hand: not what its pairs give")
        return run


def shortened(value: float) -> float:
    """To six digits: more is noise."""
    return float(f"{value:.{_DIGITS}g}")


def told(value: float) -> str:
    """Three digits, without an exponent."""
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) >= 0.001 else f"{value:.1g}"
