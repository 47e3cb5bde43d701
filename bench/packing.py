"""`python -m bench cpu-paths`: what packing repays, around the limits that kernels/cpu/config.py sets.

Each product is run by two compiled configurations, timed interleaved: one reads an operand in place, one packs it.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .. import testing
from ..console import Console, make_console, table, track
from ..kernels.cpu import driver
from ..kernels.cpu.config import BlockConfig
from ..kernels.native import direct
from . import results, timer

KIND = results.CPU_PATHS
HELP = "reading operands in place against packing them, one thread"
ROWS = (1, 2, 4, 6, 8, 12, 18, 24, 36, 48, 72, 96, 144, 192)
WIDE, DEEP = 784, 768  # rows of B are no multiple of config.ALIASED bytes apart
ALIASED_WIDE = 1024
ALWAYS = 1 << 20


class Case(NamedTuple):
    """One product, the field of BlockConfig that limits what is read in place, and how often an element is used."""

    field: str
    dtype: str
    layout: str
    m: int
    n: int
    k: int
    uses: int


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seconds", type=float, default=0.3, help="a comparison; default: 0.3")
    parser.add_argument("--out", type=Path, help="folder of the rows; default: bench/results")
    parser.add_argument("--no-save", dest="save", action="store_false", help="keep no rows")


def run(command: argparse.Namespace) -> int:
    console = make_console()
    with timer.threads(1), timer.on_one_core():
        known = [*cases()]
        rows = [compare(case, command.seconds) for case in track(console, KIND, known, len(known))]
    if command.save:
        result = results.begin(KIND, results.stamp("cpu", []), {"seconds": command.seconds}, len(rows)) | {"rows": rows}
        console.print(f"rows: {results.Record(results.folder(command.out), result).finish(True).name}")
    show(console, rows)
    return 0


def cases() -> Iterator[Case]:
    for dtype in ("float32", "float64"):
        block = driver.config(dtype)
        for m in ROWS:
            yield Case("direct_rows", dtype, "NN", m, WIDE, DEEP, -(-m // block.mr))
            yield Case("aliased_rows", dtype, "NN", m, ALIASED_WIDE, DEEP, -(-m // block.mr))
        for panels in (1, 2, 3, 4, 6):
            yield Case("direct_panels", dtype, "TN", WIDE, panels * block.nr, DEEP, panels)
    for dtype in ("float32", "float64", "bfloat16", "float16"):
        for m in ROWS:
            yield Case("transposed_rows", dtype, "NT", m, WIDE, DEEP, m)


def limited(block: BlockConfig, field: str, limit: int) -> BlockConfig:
    fields: dict[str, Any] = {field: limit}
    return dataclasses.replace(block, **fields)


def compare(case: Case, seconds: float) -> dict[str, object]:
    dtype = getattr(torch, case.dtype)
    a, b = testing.normal(case.m, case.k, dtype, seed=1), testing.normal(case.k, case.n, dtype, seed=2)
    a, b = (
        testing.lay_out(x, "column" if order == "T" else "row") for x, order in zip((a, b), case.layout, strict=True)
    )
    block = driver.config(case.dtype)
    ways = {"in place": limited(block, case.field, ALWAYS), "packed": limited(block, case.field, 0)}
    out = a.new_empty(case.m, case.n)
    expected = direct.multiply(block, a, b, out.clone())
    for way, chosen in ways.items():
        testing.assert_same_bits(direct.multiply(chosen, a, b, out), expected, f"{case} {way}")

    def work(chosen: BlockConfig) -> Callable[[], object]:
        return lambda: direct.multiply(chosen, a, b, out)

    times = timer.interleaved({way: work(chosen) for way, chosen in ways.items()}, seconds)
    row: dict[str, object] = case._asdict()
    row["limit"] = getattr(block, case.field)
    row["seconds"] = {way: timer.quartiles(rounds)._asdict() for way, rounds in times.items()}
    row["ratio"] = timer.ratio(times["packed"], times["in place"])
    return row


def show(console: Console, rows: list[dict]) -> None:
    shown = [
        [
            f"{row['field']} ≤ {row['limit']}",
            f"{row['dtype']} {row['layout']} {row['m']}×{row['n']}×{row['k']}",
            str(row["uses"]),
            *(f"{row['seconds'][way]['median'] * 1e6:.4g}" for way in ("in place", "packed")),
            f"{row['ratio']:.2f}",
            "in place" if row["uses"] <= row["limit"] else "packed",
        ]
        for row in rows
    ]
    columns = ["limit", "product", "uses", "in place µs", "packed µs", "ratio", "chosen"]
    table(console, columns, shown, left=2)
    console.print("ratio = packed / in place: above 1, reading in place is faster")
