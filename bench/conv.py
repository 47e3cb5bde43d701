"""`python -m bench conv`: torch's convolutions beside this package's, by layers of known models, against their targets.

Exit codes: 0, 1 a result is wrong, 2 what was asked for cannot be done, 130 interrupted.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .. import machine
from ..cli_common import EXIT_INTERRUPTED, EXIT_MISMATCH, UsageError, complain, require_isa
from ..console import Console, make_console, progress, table
from . import backends, conv_calls, conv_layers, results, runner, stats, worker
from .conv_calls import BACKENDS, DIRECTIONS, Comparison
from .conv_layers import Layer, Target
from .options import interrupted_by_sigterm, listed, positive, some_of, threads
from .workloads import CPU_DTYPES, OURS, TORCH

KIND = "conv"
HELP = "torch's convolutions and their gradients beside this package's, by layers of known models"
THREADS = tuple(range(1, 1 + min(2, machine.usable_cores())))
BATCHES = (1, 8)
SECONDS, QUICK = 0.3, 0.02  # a comparison
LIMIT, QUICK_LIMIT = 4.0, 0.2  # seconds of one call of torch: what would take longer is left out
TIMES, MEMORY, LENGTHS = "times", "memory", "lengths"  # the steps, by which rows are told apart
CALLS = 6  # of torch in a comparison that is as slow as LIMIT: three rounds, and those before them

Row = dict[str, Any]
Task = tuple[str, str, worker.Message]  # step, name, message


def add_options(parser: argparse.ArgumentParser) -> None:
    option, models = parser.add_argument, tuple(conv_layers.MODELS)
    option("--threads", type=threads, default=THREADS, metavar="N,N", help=f"default: {listed(THREADS)}")
    for name, known in (("--dtypes", CPU_DTYPES), ("--models", models)):
        option(name, type=some_of(known), default=known, metavar="X,X", help=f"default: {listed(known)}")
    option("--seconds", type=positive, help=f"a comparison; default: {SECONDS}, {QUICK} with --quick")
    option("--limit", type=positive, help=f"of a call of torch, about; default: {LIMIT}, {QUICK_LIMIT} with --quick")
    option("--quick", action="store_true", help="a few layers on one thread, batch 1, a minute: to see it run")
    option("--no-pin", dest="pin", action="store_false", help="let one thread move between cores")
    option("--out", type=Path, help="folder of the rows; default: bench/results, and none with --quick")
    option("--no-save", dest="save", action="store_false", help="keep no rows")
    option("--resume", action="store_true", help="go on with the unfinished run of the folder")
    option("--layers", action="store_true", help="print every comparison too")
    option("--from", dest="source", type=Path, metavar="FILE", help="print these rows; measure nothing")


def run(command: argparse.Namespace) -> int:
    console = make_console()
    if command.source:
        return conclude(console, results.load(command.source, KIND), command.layers)
    require_isa()
    settings = settings_of(command)
    planned, left_out = plan(settings)
    if not planned:
        raise UsageError("there is nothing to measure: every call of torch would take longer than --limit")
    place = results.folder(command.out) if command.save and (command.out or not command.quick) else None
    tasks = [*times(planned), *memory(planned), *lengths(settings)]
    result = results.begin(KIND, results.stamp("cpu", backends.chosen([TORCH], "cpu")), settings, len(tasks), left_out)
    record = results.Record.begin(place, result, command.resume)
    with interrupted_by_sigterm() as interrupted:
        measure(record, tasks, console)
    if interrupted:
        complain(f"{KIND}: interrupted after {len(record.result['rows'])} of {len(tasks)} measurements")
    if record.result["rows"]:
        path = record.finish(not interrupted, ending(settings))
        if place:
            console.print(f"rows: {path.name}")
    status = conclude(console, record.result, command.layers)
    return EXIT_INTERRUPTED if interrupted else status


def settings_of(command: argparse.Namespace) -> dict[str, Any]:
    """What a run that goes on must have been begun with."""
    quick = command.quick
    return {
        "threads": list(command.threads)[: 1 if quick else None], "dtypes": list(command.dtypes),
        "models": list(command.models), "batches": list(BATCHES[: 1 if quick else None]),
        "seconds": command.seconds or (QUICK if quick else SECONDS),
        "limit": command.limit or (QUICK_LIMIT if quick else LIMIT), "quick": quick, "pinned": command.pin,
    }  # fmt: skip


def ending(settings: dict[str, Any]) -> str:
    """Of the file's name: what is not everything never takes the place of what is."""
    if settings["quick"]:
        return "quick"
    every = list(THREADS), list(CPU_DTYPES), list(conv_layers.MODELS)
    return "" if (settings["threads"], settings["dtypes"], settings["models"]) == every else "part"


def plan(settings: dict[str, Any]) -> tuple[list[Comparison], int]:
    """The comparisons in the order of measuring, and how many were left out since torch would take too long."""
    models = conv_layers.QUICK if settings["quick"] else conv_layers.MODELS
    layers = [layer for name in settings["models"] for layer in models.get(name, ())]
    every = [
        Comparison(layer, direction, dtype, batch, count)
        for count, batch, dtype, layer, direction in itertools.product(
            settings["threads"], settings["batches"], settings["dtypes"], layers, DIRECTIONS
        )
    ]
    kept = [one for one in every if one.torch_seconds <= settings["limit"]]
    return kept, len(every) - len(kept)


def times(planned: Sequence[Comparison]) -> Iterator[Task]:
    return ((TIMES, one.name, {"time": one.row}) for one in planned)


def memory(planned: Sequence[Comparison]) -> Iterator[Task]:
    """Of each layer and direction in float32, with the largest batch and all threads: another dtype takes no more."""
    most = max(one.threads for one in planned), max(one.batch for one in planned)
    chosen = [one for one in planned if (one.threads, one.batch) == most and one.dtype == planned[0].dtype]
    return ((MEMORY, one.name, {"memory": one.row}) for one in chosen)


def lengths(settings: dict[str, Any]) -> Iterator[Task]:
    for layer, dtype in itertools.product(conv_layers.OF_LENGTHS, settings["dtypes"]):
        if conv_calls.instructions(dtype) or not settings["quick"]:
            name = f"{layer.name.rpartition(' at ')[0]}, {dtype}"
            yield LENGTHS, name, {"lengths": asdict(layer), "dtype": dtype}


def measure(record: results.Record, tasks: Sequence[Task], console: Console) -> None:
    """Keep a row for each task that has none. A process for each number of threads; another for memory."""
    done = {(row["step"], row["name"]) for row in record.result["rows"]}
    todo = [task for task in tasks if task[:2] not in done]
    settings = record.result["settings"]
    weights = [weight(task, settings["seconds"]) for task in todo]
    with progress(console, KIND, len(todo), sum(weights)) as shown:
        for (step, count), group in itertools.groupby(zip(todo, weights), lambda pair: process(pair[0])):
            options = [f"--threads={count}", *["--pin"] * (settings["pinned"] and step == TIMES)]
            pool = Pool(options, count)
            try:
                for (_, name, task), expected in group:
                    more = {"seconds": settings["seconds"]} if step == TIMES else {}
                    fields = task.get("time") or task.get("memory") or {"dtype": task["dtype"]}
                    record.keep({"step": step, "name": name, **fields, **pool.ask(task | more)})
                    shown(name, expected)
            finally:
                pool.close()


def process(task: Task) -> tuple[str, int]:
    """The step, and the threads of the process that does it."""
    step, _, message = task
    return step, int(message["time"]["threads"]) if step == TIMES else 1


def weight(task: Task, seconds: float) -> float:
    """About how many seconds it takes."""
    step, _, message = task
    if step == MEMORY:
        return 2.0
    if step == LENGTHS:
        one = Layer(**message["lengths"] | {"size": conv_layers.LENGTHS[-1:]})
        return 2.0 + 2 * len(conv_layers.LENGTHS) * Comparison(one, DIRECTIONS[0], message["dtype"]).torch_seconds
    slowest = conv_calls.of_fields(message["time"]).torch_seconds
    return 2 * seconds + CALLS * slowest + 0.1


class Pool:
    """One process, begun again where a task ended it."""

    def __init__(self, options: Sequence[str], count: int) -> None:
        self._options, self._environment = options, runner.environment(count)
        self._worker: worker.Worker | None = None

    def ask(self, task: worker.Message) -> worker.Message:
        """Its answer; what failed is an answer too."""
        if self._worker is None:
            module = f"{__package__}.conv_session"
            self._worker = worker.Worker(module, *self._options, environment=self._environment)
        try:
            answer = self._worker.ask(task, runner.SILENCE)
        except worker.WorkerExited as reason:
            self._worker, answer = None, {"failed": str(reason).partition(", at {")[0]}
        return answer | ({"failed": {OURS: answer["failed"]}} if "failed" in answer else {})

    def close(self) -> None:
        if self._worker is not None:
            self._worker.__exit__(None)


def conclude(console: Console, result: results.Result, layers: bool) -> int:
    """Print the tables and what is wrong; the exit code."""
    rows = result["rows"]
    timed = [row for row in rows if row["step"] == TIMES and "ratio" in row]
    if layers:
        table(console, COLUMNS, [line_of(row) for row in timed], 3)
    table(console, ["torch / ours", "threads", "target", *DIRECTIONS, "all", ""], figures(timed))
    if found := [row for row in rows if row["step"] == MEMORY and "peak bytes" in row]:
        table(console, ["most MiB beside a result", *BACKENDS], most_memory(found))
    if found := [row for row in rows if row["step"] == LENGTHS and "kept bytes" in row]:
        table(console, ["fifty lengths", *(f"{what}, {n}" for what in ("time", "MiB") for n in BACKENDS)], kept(found))
    for line in notes(result, timed):
        console.print(line, soft_wrap=True)
    bad = stats.troubles(rows)
    for line in bad:
        complain(f"{KIND}: {line}")
    return EXIT_MISMATCH if bad else 0


COLUMNS = ["layer", "", "dtype", "batch", "threads", "torch ms", "our ms", "GFLOP/s", "ratio"]


def line_of(row: Row) -> list[str]:
    theirs, ours = (row["seconds"][name]["median"] for name in (TORCH, OURS))
    what = [
        conv_calls.of_fields(row).layer.name,
        row["direction"],
        row["dtype"],
        str(row["batch"]),
        str(row["threads"]),
    ]
    return [*what, f"{1e3 * theirs:.4g}", f"{1e3 * ours:.4g}", f"{row['flops'] / ours / 1e9:.1f}", f"{ratio(row):.3f}"]


def ratio(row: Row) -> float:
    return float(row["ratio"][TORCH]["median"])


def figures(timed: Sequence[Row]) -> list[list[str]]:
    """A line for each target and number of threads: each direction, all of them, and whether the target is met."""
    lines = []
    for target, count in itertools.product(conv_layers.TARGETS, sorted({row["threads"] for row in timed})):
        mine = [row for row in timed if target.takes(row) and row["threads"] == count]
        if not mine:
            continue
        parts = [summary(target, [row for row in mine if row["direction"] == each]) for each in DIRECTIONS]
        value, least = summary(target, mine), target.of(conv_calls.instructions(target.dtype))
        verdict = "" if least is None or value is None else "met" if value >= least else "not met"
        least_text = "" if least is None else f"{least:g}"
        where = conv_calls.of_fields(min(mine, key=ratio)).layer.name if target.worst else verdict
        shown = ["–" if each is None else f"{each:.3f}" for each in (*parts, value)]
        lines.append([target.name, str(count), least_text, *shown, where])
    return lines


def summary(target: Target, rows: Sequence[Row]) -> float | None:
    """The geometric mean, or the worst."""
    if not rows:
        return None
    how: Callable[[list[float]], float] = min if target.worst else statistics.geometric_mean
    return how([ratio(row) for row in rows])


def most_memory(rows: Sequence[Row]) -> list[list[str]]:
    """For each direction the layer for which this package takes the most."""
    lines = []
    for direction in DIRECTIONS:
        if some := [row for row in rows if row["direction"] == direction]:
            most = max(some, key=lambda row: row["peak bytes"][OURS])
            lines.append([most["name"], *(f"{most['peak bytes'][name] / 2**20:.1f}" for name in BACKENDS)])
    return lines


def kept(rows: Sequence[Row]) -> list[list[str]]:
    """Time over that of as many calls of one length, and memory that the process holds after them."""
    return [
        [row["name"]]
        + [f"{row['each over one'][name]:.2f}" for name in BACKENDS]
        + [f"{row['kept bytes'][name] / 2**20:.1f}" for name in BACKENDS]
        for row in rows
    ]


def notes(result: results.Result, timed: Sequence[Row]) -> Iterator[str]:
    """What stands below the tables."""
    stamp, settings = result["stamp"], result["settings"]
    yield f"{stamp['CPU']}, {stamp['instruction set'].split()[0]}; {stamp['versions']}"
    yield "Geometric means of torch's time over ours: above 1 this package is faster. Gradients are autograd's."
    yield "Fifty lengths: the time of one call each over that of fifty calls of one length, by elements; memory kept."
    if result["larger"]:
        yield (
            f"torch's loops for 16 bits run at 1 to 3 GFLOP/s: {result['larger']} comparisons in which a call of it "
            f"would take more than {settings['limit']:g} s were left out, most of them of 16 bits."
        )
    if others := [row for row in timed if not row["runs on kernels"]]:
        yield f"{len(others)} comparisons fall back to torch here: {', '.join(sorted({r['dtype'] for r in others}))}."
    if settings["quick"]:
        yield "--quick: a few layers; the figures are of no use beside the targets."
