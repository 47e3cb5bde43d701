"""The Markdown of `gpu-report`: what it ran on, what became of each step, figures and targets, then every row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..markdown import table
from . import baseline, gpu_stats
from .gpu_session import Row
from .gpu_stats import CALL, DEVICE, Figure

NONE = "–"
PROTOCOL = "interleaved rounds in turning order; medians and quartiles of a call"
READING = f"""\
Every ratio is torch's median time over this package's, on the same operands and in turns in one run: above 1 this
package is faster. Device time: a CUDA graph of several calls between two events, whose operands go round over more
than twice the L2 cache. Call time: calls from Python one after the other, until the GPU is done. Launch cost: the
host's share of a call, which never waits for the GPU. {PROTOCOL.capitalize()}. Operands are standard
normal; each product was held against float64 before it was timed, and has no time where it was wrong."""


def markdown(result: dict[str, Any]) -> str:
    """The whole page."""
    stamp, rows = result["stamp"], result["rows"]
    parts = [f"# GPU report: {stamp.get('GPU', 'unknown GPU')}, {stamp['date']}"]
    if not result["whole"]:
        parts.append("**Not a whole run.** What is missing stands under Steps.")
    parts += ["## Figures", summary(rows), READING]
    bad = gpu_stats.troubles(rows)
    if bad:
        parts += ["## Wrong or failed", "\n".join(f"- {line}" for line in bad)]
    parts += ["## Steps", steps(result["steps"])]
    for title, table_of in (("Launch costs", launches), ("Memory", memory), ("Comparisons", comparisons)):
        shown = table_of(rows)
        if shown:
            parts += [f"## {title}", shown]
    skipped = sorted({f"- {row['step']}, {row['name']}: {row['skipped']}" for row in rows if "skipped" in row})
    if skipped:
        parts += ["## Left out", "\n".join(skipped)]
    parts += ["## Machine", table(["", ""], [[name, value] for name, value in stamp.items()], left=2)]
    return "\n\n".join(parts) + "\n"


def summary(rows: Sequence[Row]) -> str:
    lines = []
    for line, device, call, count, planned in gpu_stats.entries(rows):
        share = f"{count} of {planned}"
        lines.append([line.name, *cells(device), *cells(call), share])
    columns = ["ratio to torch.mm", "device time", "target", "", "call time", "target", "", "comparisons"]
    return table(columns, lines)


def cells(figure: Figure) -> tuple[str, str, str]:
    value = NONE if figure.value is None else f"{figure.value:.3f}"
    note = f" ({figure.note})" if figure.note else ""
    return value + note, NONE if figure.target is None else f"{figure.target:.2f}", figure.met


def steps(done: Sequence[dict[str, Any]]) -> str:
    lines = [[step["name"], step["status"], f"{step['seconds']:.0f} s", step["note"]] for step in done]
    return table(["step", "", "", ""], lines, left=4)


def launches(rows: Sequence[Row]) -> str:
    """The host's microseconds a call; the target is one of this package's public product."""
    lines = []
    for row in rows:
        if row["step"] not in ("launch", "native") or "seconds" not in row:
            continue
        product = row["name"] + ", native" * (row["step"] == "native")
        for name, seconds in row["seconds"].items():
            median, between = seconds["median"], f"{seconds['low'] * 1e6:.2f}–{seconds['high'] * 1e6:.2f}"
            met = gpu_stats.launch_met(median) if name == "matmul_grad.mm" else ""
            lines.append([product, name, f"{median * 1e6:.2f}", between, met])
    columns = ["product", "called", "µs of the host", "quartiles", f"≤ {gpu_stats.HOST_SECONDS * 1e6:.0f} µs"]
    return table(columns, lines, left=2) if lines else ""


def memory(rows: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        if row["step"] == "memory" and "bytes" in row:
            shown = [mebibytes(row["bytes"][who][what]) for who in WHO for what in ("peak", "kept")]
            lines.append([row["name"], *shown, gpu_stats.memory_met(row)])
    columns = [
        "MiB above the operands",
        "peak",
        "kept",
        "torch's peak",
        "kept",
        f"≤ torch's + {gpu_stats.WORKSPACE >> 20}",
    ]
    return table(columns, lines) if lines else ""


WHO = (baseline.OURS, baseline.TORCH)


def mebibytes(count: int) -> str:
    return f"{count / 2**20:.1f}"


def comparisons(rows: Sequence[Row]) -> str:
    lines = []
    for row in filter(gpu_stats.compared, rows):
        theirs, ours = (who(row), baseline.OURS)
        device = row[DEVICE]["seconds"]
        times = [f"{device[name]['median'] * 1e6:.2f}" for name in (theirs, ours)]
        rate = row["flops"] / device[ours]["median"] / 1e12
        ratios = [f"{row[clock]['ratio']:.3f}" for clock in (DEVICE, CALL)]
        lines.append([row["name"], row["kernel"], theirs, *times, f"{rate:.1f}", *ratios])
    columns = ["product", "kernel", "against", "its µs", "our µs", "TFLOP/s", "device ratio", "call ratio"]
    return table(columns, lines, left=3) if lines else ""


def who(row: Row) -> str:
    """Whom a row compares this package with."""
    return next(name for name in row[DEVICE]["seconds"] if name != baseline.OURS)


def last_words(result: dict[str, Any]) -> list[str]:
    """A few lines for the terminal: the figures that have a target, and what went wrong."""
    lines = []
    for entry in gpu_stats.entries(result["rows"]):
        for clock, found in ((DEVICE, entry.device), (CALL, entry.call)):
            if found.value is not None and found.met:
                shown = f"{found.value:.3f} (target {found.target:.2f}, {found.met})"
                lines.append(f"{entry.line.name}, {clock} time: {shown}")
    return lines + gpu_stats.troubles(result["rows"])
