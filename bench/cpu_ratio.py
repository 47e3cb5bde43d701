"""`python -m bench cpu-ratio`: every target of the CPU beside the figure of now and the one last committed.

Exit codes: 0 no figure fell, 1 one fell or a product is wrong, 2 what was asked for cannot be done, 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

from ..cli_common import EXIT_INTERRUPTED, EXIT_MISMATCH, UsageError, require_isa
from ..console import Console, make_console, progress
from . import ratio_openblas, ratio_results, ratio_stats, ratio_tables, ratio_workloads, results, timer, worker
from .options import positive, some_of, threads
from .ratio_workloads import RatioWorkload

KIND = "cpu-ratio"
HELP = "torch and OpenBLAS beside this package on CPU: targets, figures, and the last committed ones"
THREADS = tuple(range(1, 1 + min(2, os.cpu_count() or 1)))
SECONDS = 0.5  # a comparison: a quarter of an hour in all on two cores of Zen 4
QUICK = 0.05


def add_options(parser: argparse.ArgumentParser) -> None:
    option = parser.add_argument
    option("--threads", type=threads, default=THREADS, metavar="N,N", help=f"default: {listed(THREADS)}")
    for name, known in (("--dtypes", ratio_workloads.DTYPES), ("--rows", ratio_workloads.PARTS)):
        option(name, type=some_of(known), default=known, metavar="X,X", help=f"default: {listed(known)}")
    option("--seconds", type=positive, help=f"a comparison; default: {SECONDS}, {QUICK} with --quick")
    option("--quick", action="store_true", help="few shapes, a minute: to see it run, compared with nothing")
    option("--no-pin", dest="pin", action="store_false", help="let one thread move between cores")
    option("--out", type=Path, help="folder of the rows; default: bench/results, and none with --quick")
    option("--no-save", dest="save", action="store_false", help="keep no rows")
    option("--shapes", action="store_true", help="print every comparison too")
    option("--from", dest="source", type=Path, metavar="FILE", help="print these rows; measure nothing")


def listed(values: Collection[object]) -> str:
    return ",".join(map(str, values))


def run(command: argparse.Namespace) -> int:
    console = make_console()
    if command.source:
        return conclude(console, load(command.source), command.shapes)
    require_isa()
    sessions = planned(command)
    folder = output(command)
    result = begin(command)
    interrupted = False
    try:
        measure(console, command, sessions, result["rows"])
    except worker.WorkerFailed as reason:
        print(f"{KIND}: {reason}", file=sys.stderr)
        return EXIT_MISMATCH
    except KeyboardInterrupt:
        print(f"{KIND}: interrupted after {len(result['rows'])} comparisons", file=sys.stderr)
        interrupted = True
    everything = not command.quick and (command.threads, command.dtypes, command.rows) == (
        THREADS, ratio_workloads.DTYPES, ratio_workloads.PARTS,
    )  # fmt: skip
    result["whole"] = everything and not interrupted
    if folder and result["rows"]:
        # What is not whole never takes the place of what is.
        endings = {"interrupted": interrupted, "quick": command.quick, "part": not everything}
        ending = next((ending for ending, holds in endings.items() if holds), "")
        console.print(f"rows: {ratio_results.save(result, folder, KIND, ending).name}")
    status = conclude(console, result, command.shapes)
    return EXIT_INTERRUPTED if interrupted else status


class Session(NamedTuple):
    """The comparisons with one number of threads: those with torch, then those with OpenBLAS."""

    threads: int
    with_torch: list[RatioWorkload]
    with_openblas: list[RatioWorkload]


def planned(command: argparse.Namespace) -> list[Session]:
    sessions = []
    for count in command.threads:
        jobs = ratio_workloads.jobs(command.rows, command.dtypes, count, command.quick)
        apart = [workload for workload in jobs if workload.part == "openblas"]
        sessions.append(Session(count, [workload for workload in jobs if workload not in apart], apart))
    if not any(session.with_torch or session.with_openblas for session in sessions):
        raise UsageError(
            f"--rows {listed(command.rows)} --dtypes {listed(command.dtypes)}: there is nothing to measure"
        )
    return sessions


def output(command: argparse.Namespace) -> Path | None:
    """Where the rows go: found out before they are measured."""
    if not command.save or (command.quick and not command.out):
        return None
    return results.writable(command.out or ratio_results.RESULTS)


def begin(command: argparse.Namespace) -> ratio_results.Result:
    stamp = ratio_results.stamp() | {
        "threads": listed(command.threads),
        "seconds a comparison": str(seconds(command)),
        "OpenBLAS": ratio_openblas.library(),
    }
    return {"stamp": stamp, "protocol": timer.PROTOCOL, "quick": command.quick, "rows": []}


def seconds(command: argparse.Namespace) -> float:
    return command.seconds or (QUICK if command.quick else SECONDS)


def measure(
    console: Console, command: argparse.Namespace, sessions: Sequence[Session], rows: list[ratio_stats.Row]
) -> None:
    """Append a row for each comparison: what is there when it is interrupted is good."""
    each = seconds(command)
    total = sum(workload.weight(each, s.threads) for s in sessions for workload in s.with_torch + s.with_openblas)
    number = sum(len(s.with_torch) + len(s.with_openblas) for s in sessions)
    with progress(console, KIND, number, total) as shown:
        for count, with_torch, with_openblas in sessions:
            pin = command.pin and count == 1
            if with_torch:
                options = [f"--threads={count}", f"--seconds={each}", *["--pin"] * pin]
                with worker.Worker("matmul_grad.bench.ratio_worker", *options) as torch_worker:
                    for workload in with_torch:
                        shown(named(workload, count), 0.0)
                        rows.append(torch_worker.ask(vars(workload)))
                        shown(named(workload, count), workload.weight(each, count))
            if with_openblas:
                with ratio_openblas.Match(count, each, pin) as match:
                    for workload in with_openblas:
                        shown(named(workload, count), 0.0)
                        rows.append(match.compare(workload))
                        shown(named(workload, count), workload.weight(each, count))


def named(workload: RatioWorkload, count: int) -> str:
    return f"{workload.case.id}, {ratio_tables.threads(count)}"


def load(path: Path) -> ratio_results.Result:
    """Rows that were saved."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        for row in result["rows"]:
            ratio_stats.key(row)
        return result
    except OSError as reason:
        raise UsageError(f"--from {path}: {reason.strerror}") from reason
    except (ValueError, KeyError, TypeError) as reason:
        raise UsageError(f"--from {path}: these are not rows of {KIND}") from reason


def conclude(console: Console, result: ratio_results.Result, shapes: bool) -> int:
    """Print the table and what fell; the exit code."""
    committed = None if result["quick"] else ratio_results.committed(result["stamp"], KIND)
    entries = ratio_stats.entries(result["rows"], committed["rows"] if committed else ())
    ratio_tables.show(console, result, entries, committed, shapes)
    fell = ratio_tables.falls(entries)
    for line in fell:
        print(f"{KIND}: fell: {line}", file=sys.stderr)
    return EXIT_MISMATCH if fell else 0
