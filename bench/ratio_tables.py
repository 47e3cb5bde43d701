"""What `cpu-ratio` prints of rows: the table, every shape, the peaks, what fell."""

from __future__ import annotations

from collections.abc import Sequence

from ..console import Console, table
from . import baseline, ratio_stats, timer
from .ratio_results import Result
from .ratio_stats import Entry, Row
from .ratio_workloads import PEAK_FROM

NONE = "–"


def show(console: Console, result: Result, entries: Sequence[Entry], committed: Result | None, shapes: bool) -> None:
    stamp, rows = result["stamp"], result["rows"]
    if shapes:
        show_shapes(console, rows)
    show_table(console, entries)
    peaks = [f"{dtype} × {threads}: {rate:.1f}" for (dtype, threads), rate in ratio_stats.peaks(rows).items()]
    if peaks:
        console.print(f"FMA peak in GFLOP/s, dtype × threads: {', '.join(peaks)}")
    console.print(f"{stamp['CPU']}, {stamp['instruction set'].split()[0]}; {stamp['versions']}")
    console.print("Ratios are geometric means of their time over ours: above 1 this package is faster. Their time is")
    console.print(f"torch's but for OpenBLAS. The share of peak is a mean over cubes from {PEAK_FROM} on.")
    console.print(f"Measured in {result['protocol']}.")
    if committed:
        console.print(f"committed: {committed['stamp']['date']} {committed['stamp'].get('commit', '')}".rstrip())
    elif not result["quick"]:
        console.print("committed: no earlier run of this machine")
    busy = disturbed(rows)
    if busy:
        some = ", ".join(busy[:3]) + ", …" * (len(busy) > 3)
        console.print(f"other work ran here during {len(busy)} of {len(rows)} comparisons: {some}")


def show_table(console: Console, entries: Sequence[Entry]) -> None:
    rows = []
    for entry in entries:
        say = entry.line.show
        short = f"short by {say(entry.short_by)}" if entry.short_by else ""
        target = NONE if entry.target is None else say(entry.target)
        before = NONE if entry.committed is None else say(entry.committed.value)
        what = f"{entry.line.name} {entry.figure.note}".rstrip()
        rows.append([what, str(entry.threads), target, say(entry.figure.value), before, short])
    table(console, ["", "threads", "target", "this run", "committed", ""], rows)


def show_shapes(console: Console, rows: Sequence[Row]) -> None:
    """Every comparison, in the order of measuring."""
    lines = []
    for row in rows:
        theirs = next(backend for backend in row["seconds"] if backend != baseline.OURS)
        times = [f"{row['seconds'][backend]['median'] * 1e3:.4g}" for backend in (theirs, baseline.OURS)]
        share = f"{ratio_stats.share(row):.1%}" if "peak" in row else ""
        figure = f"{ratio_stats.rate(row):.1f}", share, f"{row['ratio']:.3f}"
        lines.append([row["part"], ratio_stats.name(row), str(row["threads"]), theirs, *times, *figure])
    columns = ["", "m×n×k", "threads", "against", "its ms", "our ms", "GFLOP/s", "peak", "ratio"]
    table(console, columns, lines, left=2)


def falls(entries: Sequence[Entry]) -> list[str]:
    """A line for each figure that fell further below the committed one than runs differ by."""
    lines = []
    for entry in entries:
        if entry.fell and entry.committed is not None:
            now, before = entry.figure.value, entry.committed.value
            shown = f"{entry.line.show(now)}, {1 - now / before:.0%} below the committed {entry.line.show(before)}"
            lines.append(f"{entry.line.name}, {threads(entry.threads)}: {shown}")
    return lines


def threads(count: int) -> str:
    return f"{count} thread{'s' * (count > 1)}"


def disturbed(rows: Sequence[Row]) -> list[str]:
    """The comparisons on one thread during which the process did not have a core to itself."""
    alone = (row for row in rows if row["threads"] == 1)
    return [f"{row['part']} {ratio_stats.name(row)}" for row in alone if row["share of core"] < timer.AT_REST]
