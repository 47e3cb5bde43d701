"""The figures that have targets: which comparisons each is made of, and what it should be. Data, and pure functions.

A column of a figure is a number of threads on the CPU, and on a GPU the clock, "device" or "call".
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from . import backends, stats, workloads
from .shapes import CPU_CUBES, CPU_SMALL, CPU_TARGETS, CPU_THIN, CUBES
from .stats import Row
from .timer import CALL_CLOCK, DEVICE_CLOCK
from .workloads import CALL, CAST, CPU_DTYPES, INVARIANT, OPERATOR, OURS, STEP, TORCH, Workload

FALL = 0.10  # of a figure, below the committed one: more than two runs of the same sources differ by
WORKSPACE = 32 << 20  # bytes beside torch's that a step may take on a GPU
HOST_SECONDS = 5e-6  # of a call on a GPU, at most
MET, SHORT = "met", "not met"
MEAN, WORST, PEAK_SHARE = "mean", "worst", "share of peak"
Columns = Mapping[str, float | None]


@dataclass(frozen=True)
class Target:
    """A line of the table.

    where: what a workload's fields must be. columns: the target of each column, None where none is set. backend: whose
    time over ours it is. cubes: the least and the largest n, where it is of n × n × n. step: of which step of a run.
    by_isa: the columns of a CPU, by its instruction set.
    """

    name: str
    where: Mapping[str, Any]
    columns: Columns
    how: str = MEAN
    backend: str = TORCH
    cubes: tuple[int, float] | None = None
    step: str | None = None
    by_isa: Mapping[str, Columns] = field(default_factory=dict)

    def takes(self, workload: Workload) -> bool:
        for name, value in self.where.items():
            if getattr(workload, name) not in (value if isinstance(value, tuple) else (value,)):
                return False
        smallest, largest = self.cubes or (0, 0)
        return self.cubes is None or (len(set(workload.shape)) == 1 and smallest <= workload.m <= largest)

    def show(self, value: float) -> str:
        return f"{value:.1%}" if self.how == PEAK_SHARE else f"{value:.3f}"


class Figure(NamedTuple):
    """A number, the comparisons that it is made of, and the worst of them where it is one's."""

    value: float
    workloads: frozenset[Workload]
    note: str = ""


@dataclass(frozen=True)
class Entry:
    """A target in one column: this run's figure beside the committed one; None where nothing of it was measured."""

    target: Target
    column: str
    figure: Figure | None
    committed: Figure | None = None
    planned: int = field(default=0)

    @property
    def least(self) -> float | None:
        return self.target.columns.get(self.column)

    @property
    def short_by(self) -> float:
        return max(0.0, (self.least or 0.0) - self.figure.value) if self.figure else 0.0

    @property
    def verdict(self) -> str:
        """Whether the target is met, and by how much it is missed; nothing where there is none."""
        if self.least is None:
            return ""
        if self.figure is None:
            return "not measured" if self.planned else ""
        return f"short by {self.target.show(self.short_by)}" if self.short_by else MET

    @property
    def fell(self) -> bool:
        """Whether it is below the committed one, where both were made of the same comparisons."""
        if self.figure is None or self.committed is None or self.committed.workloads != self.figure.workloads:
            return False
        return self.figure.value < (1 - FALL) * self.committed.value


AVX512, AVX2 = "avx512", "avx2"
LARGE, SMALL = (1024, float("inf")), (CPU_SMALL[0][0], CPU_SMALL[-1][0])
SQUARES, STEPS = (CUBES[0][0], CPU_CUBES[-1][0]), (CPU_CUBES[0][0], CPU_CUBES[-1][0])


def cpu(
    name: str,
    dtypes: Sequence[str],
    avx512: Sequence[float] = (),
    avx2: Sequence[float] = (),
    where: Mapping[str, Any] = {"shape": CPU_TARGETS},
    **more: Any,
) -> Target:
    """``avx512`` and ``avx2``: the targets on one thread and on two."""
    least = {AVX512: avx512, AVX2: avx2}
    by_isa = {isa: dict(zip(("1", "2"), values, strict=False)) for isa, values in least.items()}
    return Target(name, {"product": "forward", "mode": "", "dtype": tuple(dtypes), **where}, {}, by_isa=by_isa, **more)


CPU = (
    cpu("float32 products", ["f32"], (1.20, 1.20), (1.10, 1.10)),
    cpu("float64 products", ["f64"], (1.20, 1.20), (1.15, 1.15)),
    cpu("bfloat16 products", ["bf16"]),
    cpu("float16 products", ["f16"]),
    cpu("bfloat16 against casting to float32", ["bf16"], (1.30, 1.30), (1.10, 1.10), backend=CAST),
    cpu("float16 against casting to float32", ["f16"], (1.30, 1.30), (1.10, 1.10), backend=CAST),
    cpu("float32 step, cubes from 256", ["f32"], (1.15, 1.15), (1.08, 1.08), {"product": STEP}, cubes=STEPS),
    cpu("float32 step, cubes to 64", ["f32"], (1.00,), (1.00,), {"product": STEP}, cubes=SMALL),
    cpu("float32 call, cubes to 64", ["f32"], (1.00,), (1.00,), {"threads": 1}, cubes=SMALL),
    cpu("float64 call, cubes to 64", ["f64"], (1.00,), (1.00,), {"threads": 1}, cubes=SMALL),
    cpu("worst product", CPU_DTYPES, (0.95, 0.95), (0.90, 0.90), {"shape": CPU_TARGETS + CPU_THIN}, how=WORST),
    cpu("one row, one column, k ≤ 2", CPU_DTYPES, where={"shape": CPU_THIN}),
    cpu("float32 share of peak", ["f32"], (0.93, 0.93), (0.90, 0.90), how=PEAK_SHARE, cubes=LARGE),
    cpu("float64 share of peak", ["f64"], (0.93, 0.93), (0.90, 0.90), how=PEAK_SHARE, cubes=LARGE),
    cpu("float32 against OpenBLAS", ["f32"], (1.03, 1.03), (1.00, 1.00), backend="numpy", cubes=SQUARES),
    cpu("float64 against OpenBLAS", ["f64"], (1.03, 1.03), (1.00, 1.00), backend="numpy", cubes=SQUARES),
    cpu(f"float32 call of {CALL}×{CALL}", ["f32"], (1.00,), (1.00,), {"mode": OPERATOR}),
)


def of_cpu(stamp: Mapping[str, str]) -> list[Target]:
    """The targets of the instruction set that a run was measured on; the figures alone, where it has none."""
    isa = stamp["instruction set"].split()[0]
    return [replace(target, columns=target.by_isa.get(isa, {})) for target in CPU]


PLAIN = {"mode": "", "batch": 1}
HALF = PLAIN | {"dtype": ("bf16", "f16")}
SINGLE = PLAIN | {"dtype": "f32", "product": ("forward", "dgrad", "wgrad")}  # a step would count them twice
RIVALS = [backend.name for backend in backends.ALL if backend.devices == ("cuda",)]


def gpu(name: str, where: Mapping[str, Any], device: float | None, call: float | None, **more: Any) -> Target:
    return Target(name, where, {DEVICE_CLOCK: device, CALL_CLOCK: call}, **{"step": "ratios", **more})


GPU = (
    gpu("bf16, fp16 forward, geometric mean over all shapes", HALF | {"product": "forward"}, 1.00, 1.00),
    gpu("bf16, fp16 dgrad", HALF | {"product": "dgrad"}, 1.00, 1.00),
    gpu("bf16, fp16 wgrad", HALF | {"product": "wgrad"}, 1.05, 1.00),
    gpu("bf16, fp16 forward + backward through autograd", HALF | {"product": STEP}, 1.05, 1.05),
    gpu("bf16, fp16 cubes ≤ 1024, forward", HALF | {"product": "forward"}, 1.00, 1.00, cubes=(0, 1024)),
    gpu("bf16, fp16 worst shape", HALF, 0.90, 0.85, how=WORST),
    gpu("bf16 batch-invariant mode, forward + backward", {"mode": INVARIANT}, 0.95, None),
    gpu('float32 IEEE against torch "highest"', SINGLE | {"precision": "ieee"}, 1.0, None),
    gpu('float32 TF32 against torch "highest"', SINGLE | {"precision": "tf32"}, None, None),
    gpu('float32 3×TF32 against torch "highest"', SINGLE | {"precision": "tf32x3"}, 2.0, None),
    gpu("bf16 bmm", {"batch": tuple(range(2, 65))}, None, None),
    *(gpu(f"bf16 forward against {name}", HALF, 1.0, None, backend=name, step="rivals") for name in RIVALS),
)


def ratio(row: Row, target: Target, column: str) -> float | None:
    """What a row adds to a figure."""
    if target.how == PEAK_SHARE:
        return stats.share_of_peak(row)
    found = row.get("device ratio" if column == DEVICE_CLOCK else "ratio", {}).get(target.backend)
    return None if found is None else float(found["median"])


def figure(target: Target, rows: Iterable[Row], column: str) -> Figure | None:
    """The geometric mean of the ratios, the mean of the shares, or the worst ratio and whose it is."""
    mine = []
    for row in rows:
        workload = workloads.of_row(row)
        value = ratio(row, target, column) if target.takes(workload) else None
        if value is not None and column in (str(workload.threads), DEVICE_CLOCK, CALL_CLOCK):
            mine.append((value, workload))
    if not mine:
        return None
    made_of = frozenset(workload for _, workload in mine)
    if target.how == WORST:
        value, workload = min(mine, key=lambda pair: pair[0])
        return Figure(value, made_of, workload.name)
    mean = statistics.mean if target.how == PEAK_SHARE else statistics.geometric_mean
    return Figure(mean(value for value, _ in mine), made_of)


def entries(
    targets: Sequence[Target],
    rows: Sequence[Row],
    committed: Sequence[Row] = (),
    planned: Mapping[str, Sequence[Workload]] | None = None,
) -> list[Entry]:
    """The table. Of the committed rows those count whose like was measured now. ``planned`` are the comparisons
    of each step; figures that nothing was planned for are left out where nothing of them was measured."""
    rows = stats.compared(rows)
    known = {workloads.of_row(row) for row in rows}
    like = [row for row in committed if workloads.of_row(row) in known]
    found = []
    for target in targets:
        mine = [row for row in rows if target.step in (None, row.get("step"))]
        count = sum(map(target.takes, planned.get(target.step or "", ()))) if planned else 0
        for column in columns_of(target, rows):
            entry = Entry(target, column, figure(target, mine, column), figure(target, like, column), count)
            if entry.figure or count:
                found.append(entry)
    return found


def columns_of(target: Target, rows: Sequence[Row]) -> list[str]:
    """The clocks, or every number of threads that was measured, with a target or without."""
    if DEVICE_CLOCK in target.columns:
        return list(target.columns)
    return [str(count) for count in sorted({row["threads"] for row in rows})]


def falls(found: Iterable[Entry]) -> list[str]:
    """A line for each figure that fell further below the committed one than runs differ by."""
    lines = []
    for entry in found:
        if entry.fell and entry.figure and entry.committed:
            show, now, before = entry.target.show, entry.figure.value, entry.committed.value
            threads = f"{entry.column} thread{'s' * (entry.column != '1')}"
            below = f"{show(now)}, {1 - now / before:.0%} below the committed {show(before)}"
            lines.append(f"{entry.target.name}, {threads}: {below}")
    return lines


def peaks(rows: Iterable[Row]) -> dict[tuple[str, int], float]:
    """The median of the peaks measured, in GFLOP/s, by dtype and threads."""
    measured: dict[tuple[str, int], list[float]] = {}
    for row in rows:
        if "peak" in row:
            measured.setdefault((row["dtype"], row["threads"]), []).append(row["peak"]["median"])
    return {which: statistics.median(values) for which, values in measured.items()}


def memory_met(row: Row) -> str:
    """A step's peak and what it keeps: at most torch's peak, and a workspace."""
    peak, kept = row["peak bytes"], row.get("kept bytes", {})
    return MET if peak[OURS] + kept.get(OURS, 0) <= peak[TORCH] + WORKSPACE else SHORT


def host_met(seconds: float) -> str:
    return MET if seconds <= HOST_SECONDS else SHORT
