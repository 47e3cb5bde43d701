"""`python -m bench cpu-ratio`: every target of the CPU beside the figure of now and the one last committed.

Exit codes: 0 no figure fell, 1 one fell or a product is wrong, 2 what was asked for cannot be done, 130 interrupted.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .. import machine
from ..cli_common import EXIT_INTERRUPTED, EXIT_MISMATCH, UsageError, complain, require_isa
from ..console import Console, make_console, table
from . import backends, results, runner, stats, tables, targets, workloads
from .options import interrupted_by_sigterm, listed, positive, some_of, threads

KIND = results.CPU_RATIO
HELP = "torch and OpenBLAS beside this package on CPU: targets, figures, and the last committed ones"
THREADS = tuple(range(1, 1 + min(2, machine.usable_cores())))
SECONDS = 0.3  # a comparison, all backends together: the whole run takes a quarter of an hour on Zen 3
QUICK = 0.05


def add_options(parser: argparse.ArgumentParser) -> None:
    option = parser.add_argument
    option("--threads", type=threads, default=THREADS, metavar="N,N", help=f"default: {listed(THREADS)}")
    for name, known in (("--dtypes", workloads.CPU_DTYPES), ("--rows", workloads.CPU_PARTS)):
        option(name, type=some_of(known), default=known, metavar="X,X", help=f"default: {listed(known)}")
    option("--seconds", type=positive, help=f"a comparison; default: {SECONDS}, {QUICK} with --quick")
    option("--quick", action="store_true", help="few shapes, a minute: to see it run, compared with nothing")
    option("--no-pin", dest="pin", action="store_false", help="let one thread move between cores")
    option("--out", type=Path, help="folder of the rows; default: bench/results, and none with --quick")
    option("--no-save", dest="save", action="store_false", help="keep no rows")
    option("--resume", action="store_true", help="go on with the unfinished run of the folder")
    option("--shapes", action="store_true", help="print every comparison too")
    option("--from", dest="source", type=Path, metavar="FILE", help="print these rows; measure nothing")


def run(command: argparse.Namespace) -> int:
    console = make_console()
    if command.source:
        return conclude(console, load(command.source), command.shapes)
    require_isa()
    planned = workloads.cpu_targets(command.rows, command.dtypes, command.threads, command.quick)
    if not planned:
        raise UsageError(
            f"--rows {listed(command.rows)} --dtypes {listed(command.dtypes)}: there is nothing to measure"
        )
    others = [workloads.TORCH, workloads.CAST, *(["numpy"] if "openblas" in command.rows else [])]
    selected = backends.chosen(others, "cpu")
    place = None
    if command.save and (command.out or not command.quick):
        place = results.folder(command.out)
    settings = {
        "threads": list(command.threads), "dtypes": list(command.dtypes), "rows": list(command.rows),
        "seconds": command.seconds or (QUICK if command.quick else SECONDS), "quick": command.quick,
        "pinned": command.pin,
    }  # fmt: skip
    result = results.begin(KIND, results.stamp("cpu", selected), settings, len(planned))
    record = results.Record.begin(place, result, command.resume)
    with interrupted_by_sigterm() as interrupted:
        runner.measure(record, planned, selected, console, name=KIND)
    if interrupted:
        complain(f"{KIND}: interrupted after {len(record.result['rows'])} comparisons")
    if record.result["rows"]:
        path = record.finish(not interrupted, ending(command))
        if place:
            console.print(f"rows: {path.name}")
    status = conclude(console, record.result, command.shapes)
    return EXIT_INTERRUPTED if interrupted else status


def ending(command: argparse.Namespace) -> str:
    """Of the file's name: what is not everything never takes the place of what is."""
    everything = THREADS, workloads.CPU_DTYPES, workloads.CPU_PARTS
    if command.quick:
        return "quick"
    return "" if (command.threads, command.dtypes, command.rows) == everything else "part"


def load(path: Path) -> results.Result:
    try:
        return results.load(path, KIND)
    except UsageError as reason:
        raise UsageError(f"--from {reason}") from reason


def conclude(console: Console, result: dict[str, Any], shapes: bool) -> int:
    """Print the table, what is wrong and what fell; the exit code."""
    quick, rows = result["settings"].get("quick"), result["rows"]
    committed = None if quick else results.committed(result["stamp"], KIND)
    found = targets.entries(targets.of_cpu(result["stamp"]), rows, committed["rows"] if committed else ())
    if shapes:
        table(console, tables.PAIRS, tables.pairs(rows), 3)
    table(console, tables.TARGETS, tables.target_lines(found))
    if extra := tables.extra_lines(rows):
        table(console, tables.EXTRA, extra)
    for line in tables.cpu_notes(result):
        console.print(line)
    if committed:
        console.print(f"committed: {committed['stamp']['date']} {committed['stamp'].get('commit', '')}".rstrip())
    elif not quick:
        console.print("committed: no earlier run of this machine")
    bad = stats.troubles(rows) + [f"fell: {line}" for line in targets.falls(found)]
    for line in bad:
        complain(f"{KIND}: {line}")
    return EXIT_MISMATCH if bad else 0
