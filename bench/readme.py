"""The section on speed of docs/results.md, from the rows of a run. No figure of it is typed: all that stands between
its markers is this module's."""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..cli_common import UsageError
from ..markdown import between, markers, table
from . import plots, stats
from .backends import IMPLEMENTATIONS
from .shapes import CUBES
from .workloads import CALL, OURS, PASSES, STEP, TORCH

NAME = "bench"  # of the section
BEGIN, END = markers(NAME)
SHOWN = ("throughput", "ratios")  # of the pictures

Row = dict[str, Any]


def block(result: dict[str, Any], shown: Sequence[tuple[str, str]] = ()) -> str:
    """What stands between the markers; ``shown`` are pictures, as what they show and where they lie."""
    stamp, rows = result["stamp"], [row for row in result["rows"] if row.get("threads", 1) == 1]
    found = {
        (row["product"], row["dtype"], row["n"]): row
        for row in rows
        if row["m"] == row["n"] == row["k"] and row.get("layout", "NN") == "NN"
        if set(IMPLEMENTATIONS) <= set(row.get("seconds", {}))
    }
    parts = [
        f"Measured {stamp['date']} on {stamp['CPU']} ({stamp['instruction set'].split()[0]}), one thread; "
        f"{stamp['versions']}. Times of torch over times of this package, so above 1 it is faster; square "
        f"matrices; {result['protocol']}.",
        cubes(found),
    ]
    others = against_all(result["rows"])
    parts += [others] if others else []
    parts += [f"![{what}]({where})" for what, where in shown]
    parts += [calls(found)]
    return "\n\n".join(filter(None, parts))


def cubes(found: dict[tuple[str, str, int], Row]) -> str:
    """GFLOP/s and ratios of the cubes, and their geometric means."""
    lines = []
    known = {n for n, *_ in CUBES}
    for dtype in dict.fromkeys(dtype for _, dtype, _ in found):
        sizes = sorted(n for n in known if all((product, dtype, n) in found for product in PASSES))
        ratios = {(product, n): ratio(found[product, dtype, n]) for product in PASSES for n in sizes}
        for n in sizes:
            rates = [f"{stats.rate(found['forward', dtype, n], name):.0f}" for name in IMPLEMENTATIONS]
            lines.append([dtype, str(n), *rates, *(f"{ratios[product, n]:.2f}" for product in PASSES)])
        if sizes:
            means = [statistics.geometric_mean(ratios[product, n] for n in sizes) for product in PASSES]
            lines.append([dtype, "geometric mean", "", "", *(f"{mean:.2f}" for mean in means)])
    head = ["dtype", "n", "GFLOP/s, torch", "GFLOP/s, ours", *PASSES[:-1], "whole step"]
    return table(head, lines).replace("|  |  |", "| | |")


def against_all(rows: Sequence[Row]) -> str:
    """Every shape of the run, against everyone that was timed."""
    lines = [
        [group.where, group.dtype, group.product, s.backend, f"{s.mean.median:.2f}", f"{s.worst:.2f}", s.worst_cell]
        for group, found in stats.summaries(rows).items()
        for s in found
    ]
    head = ["where", "dtype", "pass", "against", "geometric mean", "worst", "at m×n×k"]
    return f"All shapes of the run:\n\n{table(head, lines, left=4)}" if lines else ""


def ratio(row: Row) -> float:
    """The median of torch's time over ours."""
    return float(row["ratio"][TORCH]["median"])


def calls(found: dict[tuple[str, str, int], Row]) -> str:
    """What a call costs where there is next to nothing to multiply; nothing, where that was not measured."""
    texts = []
    for product, words in (("forward", "the product"), (STEP, "the whole step")):
        if (product, "f32", CALL) not in found:
            return ""
        seconds = found[product, "f32", CALL]["seconds"]
        ours, theirs = (seconds[name]["median"] * 1e6 for name in (OURS, TORCH))
        texts.append(f"{words} takes {ours:.1f} µs (torch: {theirs:.1f} µs)")
    return f"At {CALL}×{CALL} in f32, where the time is all overhead, {', '.join(texts)}."


def beside(place: Path, page: Path) -> list[tuple[str, str]]:
    """The pictures that were drawn in ``place``, as ``page`` can refer to them."""
    paths = [(plots.TITLES[name], place / plots.FOLDER / f"{name}.svg") for name in SHOWN]
    return [(what, os.path.relpath(path, page.parent)) for what, path in paths if path.is_file()]


def rewrite(page: Path, text: str) -> None:
    """Put ``text`` between the markers, which must be there once."""
    try:
        whole = page.read_text(encoding="utf-8")
    except OSError as reason:
        raise UsageError(f"{page}: {reason.strerror}") from reason
    try:
        page.write_text(between(whole, NAME, text), encoding="utf-8")
    except ValueError as reason:
        raise UsageError(f"{page} must hold {BEGIN} and {END} once each") from reason
