"""From rows to the figures that have targets: pure functions, no clock and no file."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

from . import baseline, gpu_backends, gpu_workloads
from .gpu_session import Row

DEVICE, CALL = "device", "call"
MET, SHORT, OPEN = "met", "not met", "not measured"
WORKSPACE = 32 << 20  # bytes beside torch's that a step may take
HOST_SECONDS = 5e-6  # of a call, at most
SMALL = 1024

Takes = Callable[[Row], bool]


@dataclass(frozen=True)
class Line:
    """A line of the summary: which rows it is made of, and its targets; None where none is set."""

    name: str
    takes: Takes
    device: float | None
    call: float | None
    worst: bool = False

    def target(self, clock: str) -> float | None:
        return self.device if clock == DEVICE else self.call


class Figure(NamedTuple):
    """A ratio to torch.mm, above 1 faster; None where nothing of it was measured."""

    value: float | None
    target: float | None
    note: str = ""

    @property
    def met(self) -> str:
        """As a word; "" where there is no target."""
        if self.target is None:
            return ""
        if self.value is None:
            return OPEN
        return MET if self.value >= self.target else SHORT


class Entry(NamedTuple):
    """A line with its two figures, and of how many of the planned comparisons they are made."""

    line: Line
    device: Figure
    call: Figure
    rows: int
    planned: int


def half(product: str) -> Takes:
    return lambda row: row["part"] == "products" and row["dtype"] in gpu_workloads.HALF and row["product"] == product


def cube(row: Row) -> bool:
    return half("forward")(row) and row["m"] == row["n"] == row["k"] <= SMALL


def any_half(row: Row) -> bool:
    return row["part"] == "products" and row["dtype"] in gpu_workloads.HALF


def float32(precision: str) -> Takes:
    """The three products; the step would count them twice."""

    def takes(row: Row) -> bool:
        single = row["part"] == "products" and row["product"] != baseline.STEP
        return single and row["dtype"] == "f32" and row["precision"] == precision

    return takes


def part(name: str) -> Takes:
    return lambda row: row["part"] == name


LINES = (
    Line("bf16, fp16 forward, geometric mean over all shapes", half("forward"), 1.00, 1.00),
    Line("bf16, fp16 dgrad", half("dgrad"), 1.00, 1.00),
    Line("bf16, fp16 wgrad", half("wgrad"), 1.05, 1.00),
    Line("bf16, fp16 forward + backward through autograd", half(baseline.STEP), 1.05, 1.05),
    Line("bf16, fp16 cubes ≤ 1024, forward", cube, 1.00, 1.00),
    Line("bf16, fp16 worst shape", any_half, 0.90, 0.85, worst=True),
    Line("bf16 batch-invariant mode, forward + backward", part("invariant"), 0.95, None),
    Line('float32 IEEE against torch "highest"', float32("ieee"), 1.0, None),
    Line('float32 TF32 against torch "highest"', float32("tf32"), None, None),
    Line('float32 3×TF32 against torch "highest"', float32("tf32x3"), 2.0, None),
    Line("bf16 bmm", part("bmm"), None, None),
    *(Line(f"bf16 forward against {name}", part(name), 1.0, None) for name in gpu_backends.OTHERS),
)


def compared(row: Row) -> bool:
    return DEVICE in row and CALL in row


def figure(line: Line, rows: Sequence[Row], clock: str) -> Figure:
    """The geometric mean of the ratios, or the worst of them and whose it is."""
    if not rows:
        return Figure(None, line.target(clock))
    if line.worst:
        worst = min(rows, key=lambda row: float(row[clock]["ratio"]))
        return Figure(worst[clock]["ratio"], line.target(clock), worst["name"])
    return Figure(statistics.geometric_mean(row[clock]["ratio"] for row in rows), line.target(clock))


def entries(rows: Iterable[Row]) -> list[Entry]:
    """The summary."""
    done = [row for row in rows if compared(row)]
    planned = [asdict(workload) for workload in (*gpu_workloads.ratios(), *gpu_workloads.against_others())]
    found = []
    for line in LINES:
        mine = [row for row in done if line.takes(row)]
        device, call = figure(line, mine, DEVICE), figure(line, mine, CALL)
        found.append(Entry(line, device, call, len(mine), sum(map(line.takes, planned))))
    return found


def troubles(rows: Iterable[Row]) -> list[str]:
    """A line for each row that is wrong or failed."""
    found = []
    for row in rows:
        for kind in ("wrong", "failed"):
            if kind in row:
                found.append(f"{row['step']}, {row['name']}: {kind}: {row[kind]}")
    return found


def memory_met(row: Row) -> str:
    """A step's peak and what it keeps: at most torch's peak, and a workspace."""
    ours, theirs = row["bytes"][baseline.OURS], row["bytes"][baseline.TORCH]
    return MET if ours["peak"] + ours["kept"] <= theirs["peak"] + WORKSPACE else SHORT


def launch_met(seconds: float) -> str:
    return MET if seconds <= HOST_SECONDS else SHORT
