"""From rows to figures: ratios, means, worst cases, shares of the ceilings, what differs. No clock and no file."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from math import inf
from typing import Any, NamedTuple

from . import timer, workloads
from .timer import Spread
from .workloads import OURS, TORCH

Row = dict[str, Any]
# Sums of so many float32 or float64 products agree in every bit only where they are added in one order. (MKL and these
# kernels do so for 256 and 257 products on AVX2: both begin a new block of k after that.) One length is no evidence.
LONG_SUM, LENGTHS = 512, 2
FLOATS = ("f32", "f64")
NONE = "–"
IN_HEAP = 256 << 10  # bytes of a result that may lie in memory which any process has


class Group(NamedTuple):
    """What is summed up in one line: a dtype and pass, on one device with so many threads."""

    device: str
    threads: int
    dtype: str
    product: str

    @property
    def where(self) -> str:
        return f"{self.threads} thread{'s' * (self.threads > 1)}" if self.device == "cpu" else self.device


class Summary(NamedTuple):
    """Over a group: the geometric mean of a backend's time over ours, and the workload where it is least."""

    backend: str
    mean: Spread
    worst: float
    worst_cell: str
    cells: int


def leading_number(text: str) -> float:
    """The number that a text begins with, else infinity.

    >>> leading_number("612.5 W"), leading_number("[N/A]")
    (612.5, inf)
    """
    try:
        return float(text.split()[0])
    except (ValueError, IndexError):
        return inf


def clock(row: Row) -> str:
    """The prefix of the times that count: a GPU's own, where it was asked for them."""
    return "device " if "device seconds" in row else ""


def seconds(row: Row, name: str) -> float | None:
    """The median of a call; None where it was not timed."""
    found = row.get(f"{clock(row)}seconds", {}).get(name)
    return None if found is None else float(found["median"])


def ratio(row: Row, backend: str = TORCH) -> Spread | None:
    """A backend's time over ours, by rounds: above 1 this package is faster."""
    found = row.get(f"{clock(row)}ratio", {}).get(backend)
    return None if found is None else Spread(**found)


def rate(row: Row, name: str) -> float | None:
    """GFLOP/s."""
    found = seconds(row, name)
    return None if found is None else row["flops"] / found / 1e9


def extra_bytes(row: Row, name: str) -> int | None:
    """What a call takes beside its result, at its peak; None where it was not measured, or is less than the result:
    in older files the process had freed memory before, and used it again."""
    peak, result = row.get("peak bytes", {}).get(name), workloads.of_row(row).given
    return None if peak is None or peak < result - IN_HEAP else max(0, peak - result)


def tells_memory(rows: Iterable[Row]) -> bool:
    """Whether every peak of these rows holds the result at least."""
    return all(extra_bytes(row, name) is not None for row in rows for name in row.get("peak bytes", ()))


def intensity(row: Row) -> float:
    """Operations for each byte that has to be moved."""
    return row["flops"] / row["bytes"]


def bandwidth(result: dict[str, Any], row: Row) -> float | None:
    """GB/s of memory, as it was measured for this number of threads."""
    for roof in result["roofs"]:
        if (roof["device"], roof["threads"]) == (row["device"], row["threads"]):
            return float(roof["GB/s"]["median"])
    return None


def share_of_peak(row: Row, name: str = OURS) -> float | None:
    """Of the peak that was measured in the same rounds."""
    found = rate(row, name)
    return None if found is None or "peak" not in row else found / row["peak"]["median"]


def share_of_bandwidth(result: dict[str, Any], row: Row, name: str = OURS) -> float | None:
    """Bytes that have to be moved, over the time, of what memory gives."""
    taken, most = seconds(row, name), bandwidth(result, row)
    return None if taken is None or most is None else row["bytes"] / taken / 1e9 / most


def backends(rows: Iterable[Row]) -> list[str]:
    """All that were timed, ours first."""
    found = dict.fromkeys(name for row in rows for name in row.get("seconds", {}))
    return [name for name in (OURS,) if name in found] + [name for name in found if name != OURS]


def group_of(row: Row) -> Group:
    precision, batched = row.get("precision", "ieee"), row.get("batch", 1) > 1
    dtype = row["dtype"] if precision == "ieee" else f"{row['dtype']} {precision}"
    kind = " ".join(filter(None, (row["product"], "batched" * batched, row.get("mode", ""))))
    return Group(row["device"], row["threads"], dtype, kind)


def compared(rows: Iterable[Row]) -> list[Row]:
    """Those of workloads: a run of several steps has others too."""
    return [row for row in rows if "product" in row]


def groups(rows: Iterable[Row]) -> dict[Group, list[Row]]:
    found: dict[Group, list[Row]] = {}
    for row in rows:
        found.setdefault(group_of(row), []).append(row)
    return found


def mean(spreads: Sequence[Spread]) -> Spread:
    """Geometric, of the medians and of either quartile.

    >>> mean([Spread(1.0, 2.0, 4.0), Spread(1.0, 8.0, 16.0)])
    Spread(low=1.0, median=4.0, high=8.0)
    """
    return Spread(*(timer.rounded(statistics.geometric_mean(part)) for part in zip(*spreads, strict=True)))


def summaries(rows: Sequence[Row]) -> dict[Group, list[Summary]]:
    """A group's backends, each over the workloads that it was timed in."""
    found: dict[Group, list[Summary]] = {}
    for group, some in groups(rows).items():
        for backend in backends(some):
            against = [(spread, row) for row in some if (spread := ratio(row, backend)) is not None]
            if against:
                least, where = min(against, key=lambda pair: pair[0].median)
                summary = Summary(
                    backend, mean([spread for spread, _ in against]), least.median, label(where), len(against)
                )
                found.setdefault(group, []).append(summary)
    return found


def label(row: Row) -> str:
    """A workload within its group."""
    batch = f"{row['batch']} × " if row.get("batch", 1) > 1 else ""
    return f"{row['layout']} {batch}{row['m']}×{row['n']}×{row['k']}"


def name_of(row: Row) -> str:
    name = row["name"] if "name" in row else workloads.of_row(row).name
    return f"{row['step']}, {name}" if "step" in row else name


def troubles(rows: Sequence[Row]) -> list[str]:
    """A line for each result that is wrong, each backend that failed, and each that may be another in disguise."""
    found = []
    for row in rows:
        for kind in ("wrong", "failed"):
            for name, why in row.get(kind, {}).items():
                found.append(f"{kind}: {name}, {name_of(row)}: {why}")
    disguised = twins(compared(rows))
    return found + [f"suspect: {name} gives the bits of {OURS} wherever it was judged" for name in disguised]


def twins(rows: Iterable[Row]) -> list[str]:
    """Contenders with our bits in every sum that is long, of LENGTHS lengths: a product that is held against itself."""
    lengths: dict[str, set[int]] = {}
    others: set[str] = set()
    for row in rows:
        bits, summed = row.get("bits", {}), workloads.of_row(row).summed
        if row["dtype"] in FLOATS and summed >= LONG_SUM and OURS in bits:
            for name, digest in bits.items():
                if digest == bits[OURS]:
                    lengths.setdefault(name, set()).add(summed)
                else:
                    others.add(name)
    return [n for n, seen in lengths.items() if n != OURS and n not in others and len(seen) >= LENGTHS]


def disturbed(rows: Iterable[Row]) -> list[str]:
    """The workloads during which a backend on one thread did not have a core to itself."""
    return [
        workloads.of_row(row).name
        for row in rows
        if row.get("device", "cpu") == "cpu"
        and row.get("threads", 1) == 1
        and row.get("share of core", 1.0) < timer.AT_REST
    ]


def apart(before: Spread, after: Spread) -> bool:
    """Whether two figures differ by more than their spread: what is between the quartiles of one meets nothing of the
    other's.

    >>> apart(Spread(1.0, 1.1, 1.2), Spread(1.2, 1.3, 1.4)), apart(Spread(1.0, 1.1, 1.2), Spread(1.3, 1.4, 1.5))
    (False, True)
    """
    return before.low > after.high or after.low > before.high


class Change(NamedTuple):
    """A workload in two runs: its figure in each, and the second over the first, above 1 faster."""

    name: str
    before: Spread
    after: Spread

    @property
    def ratio(self) -> float:
        return self.after.median / self.before.median

    @property
    def significant(self) -> bool:
        return apart(self.before, self.after)


def changes(before: Sequence[Row], after: Sequence[Row]) -> list[Change]:
    """The workloads that both runs have: by our ratio to torch, which knows nothing of the machine's mood, or else by
    how many calls a second we make."""
    known = {workloads.of_row(row): row for row in before}
    found = []
    for row in after:
        other = known.get(workloads.of_row(row))
        if other is None:
            continue
        figures = [ratio(one) for one in (other, row)]
        if None in figures:
            figures = [calls_a_second(one) for one in (other, row)]
        first, second = figures
        if first is not None and second is not None:
            found.append(Change(workloads.of_row(row).name, first, second))
    return found


def calls_a_second(row: Row) -> Spread | None:
    found = row.get(f"{clock(row)}seconds", {}).get(OURS)
    return None if found is None else Spread(1 / found["high"], 1 / found["median"], 1 / found["low"])


def mean_change(found: Sequence[Change]) -> float:
    return statistics.geometric_mean(change.ratio for change in found)
