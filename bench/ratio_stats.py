"""The lines of `cpu-ratio`'s table: targets, and figures as pure functions of rows. No clock, no file."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from . import baseline

Row = dict[str, Any]
Key = tuple[str, str, str, int, int, int, int]

FALL = 0.10  # of a figure, below the committed one: more than two runs of the same sources differ by
NAMES = {"f32": "float32", "f64": "float64", "bf16": "bfloat16", "f16": "float16"}


class Figure(NamedTuple):
    """A number, the rows that it is made of, and what there is to say about it."""

    value: float
    rows: frozenset[Key]
    note: str = ""


@dataclass(frozen=True)
class Line:
    """One line of the table for each number of threads; a share is shown in per cent."""

    name: str
    part: str
    dtypes: tuple[str, ...]
    targets: Mapping[int, float]
    value: Callable[[Sequence[Row]], tuple[float, str]]
    from_peak: bool = False

    def figure(self, rows: Iterable[Row], threads: int) -> Figure | None:
        """None where nothing of it was measured."""
        mine = [row for row in rows if self.takes(row) and row["threads"] == threads]
        if not mine:
            return None
        value, note = self.value(mine)
        return Figure(value, frozenset(map(key, mine)), note)

    def takes(self, row: Row) -> bool:
        return row["part"] == self.part and row["dtype"] in self.dtypes and (not self.from_peak or "peak" in row)

    def show(self, value: float) -> str:
        return f"{value:.1%}" if self.from_peak else f"{value:.3f}"


def key(row: Row) -> Key:
    """What a row compares."""
    return row["part"], row["dtype"], row["layout"], row["m"], row["n"], row["k"], row["threads"]


def name(row: Row) -> str:
    return f"{row['dtype']} {row['layout']} {row['m']}×{row['n']}×{row['k']}"


def mean_ratio(rows: Sequence[Row]) -> tuple[float, str]:
    return statistics.geometric_mean(row["ratio"] for row in rows), ""


def worst_ratio(rows: Sequence[Row]) -> tuple[float, str]:
    worst = min(rows, key=lambda row: row["ratio"])
    return worst["ratio"], name(worst)


def mean_share(rows: Sequence[Row]) -> tuple[float, str]:
    return statistics.mean(share(row) for row in rows), ""


def rate(row: Row, backend: str = baseline.OURS) -> float:
    """GFLOP/s."""
    return row["flops"] / row["seconds"][backend]["median"] / 1e9


def share(row: Row) -> float:
    """Of the peak that was measured beside it."""
    return rate(row) / row["peak"]["median"]


PEAKED = ("f32", "f64")
LINES = (
    *(
        Line(f"{NAMES[dtype]} products", "products", (dtype,), {1: target, 2: target}, mean_ratio)
        for dtype, target in (("f32", 1.15), ("f64", 1.20), ("bf16", 1.00), ("f16", 1.00))
    ),
    Line("float32 step through autograd", "step", ("f32",), {1: 1.10, 2: 1.10}, mean_ratio),
    Line("worst product", "products", tuple(NAMES), {1: 0.90, 2: 0.85}, worst_ratio),
    *(
        Line(f"{NAMES[dtype]} share of peak", "products", (dtype,), {1: 0.92, 2: 0.88}, mean_share, True)
        for dtype in PEAKED
    ),
    *(
        Line(f"{NAMES[dtype]} against OpenBLAS", "openblas", (dtype,), {1: 1.00, 2: 1.00}, mean_ratio)
        for dtype in PEAKED
    ),
    Line("float32 call of 8×8", "overhead", ("f32",), {1: 1.00}, mean_ratio),
)


class Entry(NamedTuple):
    """A line with one number of threads: this run's figure beside the committed one."""

    line: Line
    threads: int
    figure: Figure
    committed: Figure | None

    @property
    def target(self) -> float | None:
        return self.line.targets.get(self.threads)

    @property
    def short_by(self) -> float:
        return max(0.0, (self.target or 0.0) - self.figure.value)

    @property
    def comparable(self) -> bool:
        """Whether both were made of the same comparisons."""
        return self.committed is not None and self.committed.rows == self.figure.rows

    @property
    def fell(self) -> bool:
        if self.committed is None or not self.comparable:
            return False
        return self.figure.value < (1 - FALL) * self.committed.value


def entries(rows: Sequence[Row], committed: Sequence[Row] = ()) -> list[Entry]:
    """The table. Of the committed rows those count whose like was measured now."""
    keys = {key(row) for row in rows}
    like = [row for row in committed if key(row) in keys]
    found = []
    for line in LINES:
        for threads in sorted({row["threads"] for row in rows}):
            figure = line.figure(rows, threads)
            if figure:
                found.append(Entry(line, threads, figure, line.figure(like, threads)))
    return found


def peaks(rows: Iterable[Row]) -> dict[tuple[str, int], float]:
    """The median of the peaks measured, in GFLOP/s, by dtype and threads."""
    measured: dict[tuple[str, int], list[float]] = {}
    for row in rows:
        if "peak" in row:
            measured.setdefault((row["dtype"], row["threads"]), []).append(row["peak"]["median"])
    return {which: statistics.median(values) for which, values in measured.items()}
