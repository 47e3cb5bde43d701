"""What the bench prints and writes in words: summaries, workloads, changes between two runs."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from ..markdown import table
from . import baseline, stats
from .stats import NONE, Change

READING = """\
Every ratio is another's time over this package's, in rounds taken by turns in one run: above 1 this package is faster;
in brackets what lies between the quartiles of the rounds. A share of the peak is of multiply-adds on registers alone
(on a GPU of torch's product at 8192), timed in the same rounds; a share of the bandwidth is of what memory gave to
a copy or a sum, where each operand and each result is counted once. A step is forward and both gradients: through
autograd in torch and here, compiled in JAX, and three bare products in packages that know no gradient."""


def page(result: dict[str, Any]) -> str:
    """The Markdown of a run."""
    stamp, rows = result["stamp"], result["rows"]
    summary = [[where, *line] for where, lines in summaries(rows).items() for line in lines]
    parts = [f"# Bench: {stamp['GPU'] if stamp['device'] != 'cpu' else stamp['CPU']}, {stamp['date']}", *notes(result)]
    parts += ["## Geometric means and worst cases", verdict(rows), table(["where", *SUMMARY], summary, left=4), READING]
    parts += ["## Every comparison", table(cell_columns(rows), cell_lines(result), left=4)]
    skipped = left_out(rows)
    if skipped:
        parts += ["## Left out", "\n".join(f"- {line}" for line in skipped)]
    parts += ["## Machine", table(["", ""], machine(result), left=2)]
    return "\n\n".join(parts) + "\n"


def notes(result: dict[str, Any]) -> list[str]:
    """What a reader has to know before the figures."""
    rows, found = result["rows"], []
    if not result.get("whole"):
        found.append(f"**Not a whole run**: {len(rows)} of {result['planned']} comparisons.")
    troubles = stats.troubles(rows)
    if troubles:
        found.append("**Wrong, failed or suspect**\n\n" + "\n".join(f"- {line}" for line in troubles))
    busy = stats.disturbed(rows)
    if busy:
        found.append(f"Other work ran here during {len(busy)} of {len(rows)} comparisons: their times are rough.")
    if result.get("larger"):
        limit = result["settings"]["max gflop"]
        found.append(f"{result['larger']} comparisons of the suite were larger than {limit:g} GFLOP, and left out.")
    return found


SUMMARY = ["dtype", "pass", "against", "geometric mean", "worst", "at", "cells"]


def summaries(rows: Sequence[stats.Row]) -> dict[str, list[list[str]]]:
    """The lines of the summary by where they were measured: narrow enough for a terminal and a phone."""
    found: dict[str, list[list[str]]] = {}
    for group, summed in stats.summaries(rows).items():
        for s in summed:
            figure = [str(s.mean), f"{s.worst:.2f}", s.worst_cell, str(s.cells)]
            found.setdefault(group.where, []).append([group.dtype, group.product, s.backend, *figure])
    return found


def verdict(rows: Sequence[stats.Row]) -> str:
    """The run in one sentence.

    >>> verdict([])
    'Nothing was compared with torch.'
    """
    measured = [(spread.median, row) for row in rows if (spread := stats.ratio(row)) is not None]
    if not measured:
        return "Nothing was compared with torch."
    mean = statistics.geometric_mean(ratio for ratio, _ in measured)
    slower = sum(ratio < 1 for ratio, _ in measured)
    worst, row = min(measured, key=lambda pair: pair[0])
    troubles = len(stats.troubles(rows))
    right = f"Results wrong, failed or suspect: {troubles}." if troubles else "All results are right."
    return (
        f"This package is {mean:.2f} times as fast as torch in the geometric mean of {len(measured)} comparisons; it "
        f"is slower in {slower} of them, and slowest, with {worst:.2f}, in {row['product']} {row['dtype']} "
        f"{stats.label(row)}. {right}"
    )


def cell_columns(rows: Sequence[stats.Row]) -> list[str]:
    names = stats.backends(rows)
    ratios = [f"ratio to {name}" for name in names if name != baseline.OURS]
    rates = [f"GFLOP/s, {name}" for name in names]
    return ["where", "dtype", "pass", "layout, m×n×k", *rates, *ratios, "peak", "bandwidth", "first ms", "peak MiB"]


def cell_lines(result: dict[str, Any]) -> list[list[str]]:
    rows = result["rows"]
    names = stats.backends(rows)
    lines = []
    for row in rows:
        group = stats.group_of(row)
        rates = [say(stats.rate(row, name), "{:.4g}") for name in names]
        ratios = [say(stats.ratio(row, name), "{}") for name in names if name != baseline.OURS]
        shares = stats.share_of_peak(row), stats.share_of_bandwidth(result, row)
        first, most = row.get("first", {}).get(baseline.OURS), row.get("peak bytes", {}).get(baseline.OURS)
        ours = say(first and first * 1e3, "{:.3g}"), say(most if most is None else most / 2**20, "{:.1f}")
        lines.append(
            [group.where, group.dtype, group.product, stats.label(row), *rates, *ratios]
            + [say(share, "{:.0%}") for share in shares] + list(ours)
        )  # fmt: skip
    return lines


def say(value: Any, form: str) -> str:
    return NONE if value is None else form.format(value)


def left_out(rows: Sequence[stats.Row]) -> list[str]:
    """Each reason once, with how many comparisons it holds for."""
    found: dict[str, int] = {}
    for row in rows:
        for name, why in row.get("skipped", {}).items():
            found[f"{name}: {why}"] = found.get(f"{name}: {why}", 0) + 1
    return [f"{what} ({count} comparisons)" for what, count in found.items()]


def machine(result: dict[str, Any]) -> list[list[str]]:
    lines = [[name, str(value)] for name, value in result["stamp"].items()]
    for roof in result["roofs"]:
        gbs = roof["GB/s"]
        where = f"memory, {roof['threads']} × {roof['device']}"
        lines.append([where, f"{gbs['median']:.4g} GB/s ({gbs['low']:.4g}–{gbs['high']:.4g}, {gbs['how']})"])
    return lines + [[f"setting: {name}", str(value)] for name, value in result["settings"].items()]


CHANGES = ["comparison", "first", "second", "second / first", ""]
MACHINE = ("device", "CPU", "instruction set", "GPU", "versions", "rivals")


def changes(found: Sequence[Change]) -> list[list[str]]:
    lines = []
    for change in found:
        verdict = ("faster" if change.ratio > 1 else "slower") if change.significant else "within spread"
        lines.append(
            [change.name, f"{change.before.median:.4g}", f"{change.after.median:.4g}", f"{change.ratio:.3f}", verdict]
        )
    return lines


def other_machine(first: Mapping[str, str], second: Mapping[str, str]) -> list[str]:
    """Where two runs were not made on one machine, or not with the same versions, what differs.

    >>> other_machine({"CPU": "A", "GPU": "none"}, {"CPU": "B", "GPU": "none"})
    ['The runs differ in more than this package. CPU: A; then B.']
    """
    differ = [
        f"{name}: {first.get(name, NONE)}; then {second.get(name, NONE)}."
        for name in MACHINE
        if first.get(name) != second.get(name)
    ]
    return [" ".join(["The runs differ in more than this package.", *differ])] if differ else []
