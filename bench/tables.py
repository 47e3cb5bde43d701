"""What the bench prints and writes in words: summaries, workloads, changes between two runs."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..markdown import table
from . import stats, targets
from .stats import NONE, Change
from .targets import Entry
from .workloads import CAST, OURS, TORCH

READING = """\
Every ratio is another's time over this package's, in rounds taken by turns in one run: above 1 this package is faster;
in brackets what lies between the quartiles of the rounds. A share of the peak is of multiply-adds on registers alone
(on a GPU of torch's product at 8192), timed in the same rounds; a share of the bandwidth is of what memory gave to
a copy or a sum, where each operand and each result is counted once. A step is forward and both gradients: through
autograd in torch and here, compiled in JAX, and three bare products in packages that know no gradient."""


def page(result: dict[str, Any]) -> str:
    """The Markdown of a run."""
    rows = stats.compared(result["rows"])
    summary = [[where, *line] for where, lines in summaries(rows).items() for line in lines]
    parts = [title("Bench", result["stamp"]), *notes(result)]
    parts += ["## Geometric means and worst cases", verdict(rows), table(["where", *SUMMARY], summary, left=4), READING]
    return "\n\n".join(parts + details(result)) + "\n"


def title(kind: str, stamp: Mapping[str, str]) -> str:
    machine = stamp["CPU"] if stamp.get("device", "cpu") == "cpu" else stamp.get("GPU", "unknown GPU")
    return f"# {kind}: {machine}, {stamp['date']}"


def details(result: dict[str, Any]) -> list[str]:
    """Every comparison, what was left out, and the machine."""
    rows, parts = stats.compared(result["rows"]), []
    if rows:
        parts += ["## Every comparison", table(cell_columns(rows), cell_lines(result), left=4)]
    skipped = left_out(result["rows"])
    if skipped:
        parts += ["## Left out", "\n".join(f"- {line}" for line in skipped)]
    return [*parts, "## Machine", table(["", ""], machine(result), left=2)]


def notes(result: dict[str, Any]) -> list[str]:
    """What a reader has to know before the figures."""
    rows, found = result["rows"], []
    if not result.get("whole"):
        found.append(f"**Not a whole run**: {len(stats.compared(rows))} of {result['planned']} comparisons.")
    troubles = stats.troubles(rows)
    if troubles:
        found.append("**Wrong, failed or suspect**\n\n" + "\n".join(f"- {line}" for line in troubles))
    busy = stats.disturbed(stats.compared(rows))
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
    ratios = [f"ratio to {name}" for name in names if name != OURS]
    rates = [f"GFLOP/s, {name}" for name in names]
    return ["where", "dtype", "pass", "layout, m×n×k", *rates, *ratios, "peak", "bandwidth", "first ms", "peak MiB"]


def cell_lines(result: dict[str, Any]) -> list[list[str]]:
    rows = stats.compared(result["rows"])
    names = stats.backends(rows)
    lines = []
    for row in rows:
        group = stats.group_of(row)
        rates = [say(stats.rate(row, name), "{:.4g}") for name in names]
        ratios = [say(stats.ratio(row, name), "{}") for name in names if name != OURS]
        shares = stats.share_of_peak(row), stats.share_of_bandwidth(result, row)
        first, most = row.get("first", {}).get(OURS), row.get("peak bytes", {}).get(OURS)
        ours = say(first and first * 1e3, "{:.3g}"), say(most if most is None else most / 2**20, "{:.1f}")
        lines.append(
            [group.where, group.dtype, group.product, stats.label(row), *rates, *ratios]
            + [say(share, "{:.0%}") for share in shares] + list(ours)
        )  # fmt: skip
    return lines


def say(value: Any, form: str | Callable[[Any], str]) -> str:
    if value is None:
        return NONE
    return form.format(value) if isinstance(form, str) else form(value)


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


PAIRS = ["m×n×k", "threads", "against", "its ms", "our ms", "GFLOP/s", "peak", "ratio"]


def pairs(rows: Sequence[stats.Row]) -> list[list[str]]:
    """Every comparison with every backend, in the order of measuring."""
    lines = []
    for row in rows:
        ours, rate, share = stats.seconds(row, OURS), stats.rate(row, OURS), stats.share_of_peak(row)
        what = " ".join(filter(None, (row["product"], row["dtype"], stats.label(row), row.get("mode", ""))))
        for name in stats.backends([row]):
            ratio, theirs = stats.ratio(row, name), stats.seconds(row, name)
            if ratio and ours and theirs:
                times = [f"{1e3 * seconds:.4g}" for seconds in (theirs, ours)]
                figures = [say(rate, "{:.1f}"), say(share, "{:.1%}"), f"{ratio.median:.3f}"]
                lines.append([what, str(row["threads"]), name, *times, *figures])
    return lines


TARGETS = ["", "threads", "target", "this run", "committed", ""]


def target_lines(found: Sequence[Entry]) -> list[list[str]]:
    """The figures that have targets; on a GPU the clock stands in place of the number of threads, and where time may be
    up before all is measured the number of comparisons behind each."""
    lines = []
    for entry in found:
        show, figure = entry.target.show, entry.figure
        numbers = (entry.least, figure and figure.value, entry.committed and entry.committed.value)
        name = f"{entry.target.name} {figure.note if figure else ''}".rstrip()
        lines.append([name, entry.column, *(say(value, show) for value in numbers), entry.verdict])
        if entry.planned:
            lines[-1].append(f"{len(figure.workloads) if figure else 0} of {entry.planned}")
    return lines


EXTRA = ["MiB beside the result", "threads", *(OURS, TORCH, CAST)]


def extra_lines(rows: Sequence[stats.Row]) -> list[list[str]]:
    """For each dtype and number of threads, the product for which a call of ours or of another takes the most."""
    most: dict[tuple[str, int], tuple[int, stats.Row]] = {}
    for row in rows if stats.tells_memory(rows) else ():
        found = [stats.extra_bytes(row, name) or 0 for name in row.get("peak bytes", ()) if row["product"] == "forward"]
        where, best = (row["dtype"], row["threads"]), max(found, default=-1)
        if best > most.get(where, (-1,))[0]:
            most[where] = best, row
    return [
        [f"{dtype} {stats.label(row)}", str(threads)]
        + [say(stats.extra_bytes(row, name), lambda count: f"{count / 2**20:.1f}") for name in EXTRA[2:]]
        for (dtype, threads), (_, row) in most.items()
    ]  # fmt: skip


def cpu_notes(result: dict[str, Any]) -> list[str]:
    """What stands below the table of the CPU's targets."""
    stamp, rows = result["stamp"], result["rows"]
    peaks = [f"{dtype} × {threads}: {rate:.1f}" for (dtype, threads), rate in targets.peaks(rows).items()]
    busy = stats.disturbed(rows)
    some = ", ".join(busy[:3]) + ", …" * (len(busy) > 3)
    return [
        *([f"FMA peak in GFLOP/s, dtype × threads: {', '.join(peaks)}"] if peaks else []),
        f"{stamp['CPU']}, {stamp['instruction set'].split()[0]}; {stamp['versions']}",
        "Ratios are geometric means of their time over ours: above 1 this package is faster. Their time is",
        "torch's but for OpenBLAS and casting. The share of peak is a mean over cubes from 1024 on.",
        f"Measured: {result['protocol']}.",
        *([f"other work ran here during {len(busy)} of {len(rows)} comparisons: {some}"] if busy else []),
    ]


GPU_READING = """\
Device time: a CUDA graph of several calls between two events, whose operands go round over more than twice the L2
cache. Call time: calls from Python one after the other, until the GPU is done. Launch cost: the host's share of a
call, which never waits for the GPU."""


def report(result: dict[str, Any], found: Sequence[Entry]) -> str:
    """The Markdown of `gpu-report`: figures and targets, what became of each step, then every row."""
    rows = result["rows"]
    parts = [title("GPU report", result["stamp"]), *notes(result)]
    parts += ["## Figures", table([*TARGETS, "comparisons"], target_lines(found)), READING, GPU_READING]
    steps = [[step["name"], step["status"], f"{step['seconds']:.0f} s", step["note"]] for step in result["steps"]]
    parts += [f"Beside the comparisons: {seen}."] if (seen := clocks(rows)) else []
    parts += ["## Steps", table(["step", "", "", ""], steps, left=4)]
    for head, columns, lines, left in (
        ("Launch costs", LAUNCHES, launches(rows), 2),
        ("Memory", MEMORY, memory(rows), 1),
    ):
        parts += [f"## {head}", table(columns, lines, left)] if lines else []
    return "\n\n".join(parts + details(result)) + "\n"


def clocks(rows: Sequence[stats.Row]) -> str:
    """The least and the most of what the driver reported beside the comparisons.

    >>> clocks([{"clocks": {"clocks.sm": "1755 MHz"}}, {"clocks": {"clocks.sm": "1410 MHz"}}, {}])
    'clocks.sm 1410 MHz to 1755 MHz'
    """
    found: dict[str, list[str]] = {}
    for row in rows:
        for name, value in row.get("clocks", {}).items():
            found.setdefault(name, []).append(value)
    ordered = {name: sorted(values, key=stats.leading_number) for name, values in found.items()}
    return ", ".join(f"{name} {values[0]} to {values[-1]}" for name, values in ordered.items())


LAUNCHES = ["product", "called", "µs of the host", "quartiles", f"≤ {targets.HOST_SECONDS * 1e6:.0f} µs"]


def launches(rows: Sequence[stats.Row]) -> list[list[str]]:
    """The host's microseconds a call; the target is one of this package's public product."""
    lines = []
    for row in rows:
        for name, seconds in row.get("host seconds", {}).items():
            median, between = seconds["median"], f"{seconds['low'] * 1e6:.2f}–{seconds['high'] * 1e6:.2f}"
            met = targets.host_met(median) if name == "matmul_grad.mm" else ""
            product = row["name"] + ", native" * (row["step"] == "native")
            lines.append([product, name, f"{median * 1e6:.2f}", between, met])
    return lines


MEMORY = ["MiB above the operands", "peak", "kept", "torch's peak", "kept", f"≤ torch's + {targets.WORKSPACE >> 20}"]


def memory(rows: Sequence[stats.Row]) -> list[list[str]]:
    lines = []
    for row in rows:
        if row.get("step") == "memory" and {OURS, TORCH} <= set(row.get("peak bytes", {})):
            parts = [row[what].get(who, 0) for who in (OURS, TORCH) for what in ("peak bytes", "kept bytes")]
            product = f"{row['product']} {row['dtype']} {stats.label(row)}"
            lines.append([product, *(f"{count / 2**20:.1f}" for count in parts), targets.memory_met(row)])
    return lines


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
