"""`matmul-grad bench`: measure, go on, report, compare two runs.

Exit codes: 0 all is right (and nothing below --fail-below), 1 something is not, 2 what was asked for cannot be done,
130 interrupted.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from time import monotonic
from typing import Any

from .. import testing
from ..cli_common import (
    EXIT_INTERRUPTED,
    EXIT_MISMATCH,
    EXIT_USAGE,
    Parser,
    UsageError,
    complain,
    require,
    require_cuda,
    require_isa,
    run_command,
)
from ..console import Console, make_console, table
from . import backends, results, runner, stats, tables, workloads
from .backends import Backend
from .options import interrupted_by_sigterm, positive, some_of, threads
from .workloads import OURS, PASSES, SUITES, TORCH, Workload

DTYPES = {"cpu": ("f32", "f64"), "cuda": ("bf16", "f32")}
SECONDS = {"cpu": 0.6, "cuda": 0.3}  # a comparison, all backends together
MAX_GFLOP = {"cpu": 40.0, "cuda": 1e5}
MINUTES = 5.0  # of the quick suite on a GPU
REPORT, REPORT_SHARE = 25.0, 0.2  # seconds, and the most of --minutes, that drawing and writing may take
VERBS = ("run", "compare", "report")
RIVALS = f"none, or some of {', '.join(backends.NAMES)}; default: those installed"


def main(arguments: Sequence[str], program: str) -> int:
    """``bench run …`` may leave out ``run``."""
    verb = arguments[0] if arguments and arguments[0] in VERBS else "run"
    rest = arguments[1:] if arguments[:1] == [verb] else arguments
    parser = Parser(prog=f"{program} {verb}", description=HELP[verb], epilog=EPILOG if verb == "run" else None)
    OPTIONS[verb](parser)
    return run_command(program, lambda: int(DO[verb](parser.parse_args(rest))))


def run_options(parser: argparse.ArgumentParser) -> None:
    option = parser.add_argument
    option("--suite", choices=SUITES, default="quick", help="of shapes; default: quick")
    option("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    option("--dtype", type=some_of(tuple(testing.DTYPES)), metavar="X,X", help="default: f32,f64; bf16,f32 on a GPU")
    option("--threads", type=threads, default=(1,), metavar="N,N", help="default: 1")
    option("--pass", dest="passes", type=some_of(PASSES), default=PASSES, metavar="X,X", help="default: all four")
    option("--rivals", type=some_of(("none", *backends.NAMES)), metavar="X,X", help=RIVALS)
    option("--out", type=Path, metavar="DIR", help="default: a folder of bench/results, or of this one")
    option("--seconds", type=positive, help="a comparison; default: 0.6, 0.3 on a GPU")
    option("--minutes", type=positive, help="stop then; default: 5 for the quick suite on a GPU, else never")
    option("--max-gflop", type=positive, help="leave out larger products; default: 40 on CPU")
    option("--no-pin", dest="pin", action="store_false", help="let threads move between cores")
    option("--resume", action="store_true", help="go on with the unfinished run of the folder")
    option("--fail-below", type=positive, metavar="RATIO", help="exit with 1 if a geometric mean to torch is below")


def compare_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("first", type=Path, metavar="A.json")
    parser.add_argument("second", type=Path, metavar="B.json")
    help = "exit with 1 if B over A is below, in the mean or significantly in one comparison"
    parser.add_argument("--fail-below", type=positive, metavar="RATIO", help=help)


def report_options(parser: argparse.ArgumentParser) -> None:
    option = parser.add_argument
    option("file", type=Path, metavar="FILE", help="a bench.json")
    option("--out", type=Path, metavar="DIR", help="default: the file's folder")
    option("--readme", nargs="?", type=Path, const=Path("docs/results.md"), metavar="PAGE", help="rewrite its section")
    option("--busy", action="store_true", help="write figures of a machine that was not at rest into PAGE too")


def run(command: argparse.Namespace) -> int:
    """Everything that was not measured yet, then the files and the tables of it."""
    left = clock(command)
    selected, planned, settings, larger = prepare(command)
    require("matplotlib")
    from . import html

    stamp = results.stamp(command.device, selected)
    name = f"{results.BENCH}-{command.device}-{results.slug(stamp)}"
    place = results.folder(command.out or results.folder(None) / name)
    result = results.begin(results.BENCH, stamp, settings, len(planned), larger)
    record = results.Record.begin(place, result, command.resume)
    console, begun = make_console(), len(record.result["rows"])
    with interrupted_by_sigterm() as interrupted:
        runner.measure(record, planned, selected, console, left)
    todo = len(record.left(planned))
    if not record.result["rows"]:
        complain(f"bench: {'interrupted' if interrupted else 'the time was up'} before anything was measured")
        return EXIT_INTERRUPTED if interrupted else EXIT_USAGE
    path = record.finish(not todo)
    html.write_all(record.result, path.parent)
    conclude(console, record.result)
    done = len(record.result["rows"])
    console.print(f"{done} of {len(planned)} comparisons measured{f', {done - begun} of them now' if begun else ''}")
    console.print(f"rows: {path}", soft_wrap=True)
    console.print(f"report: {path.with_name('bench.html')}", soft_wrap=True)
    if todo:
        console.print(f"{todo} comparisons are left: --resume goes on with them")
    return EXIT_INTERRUPTED if interrupted else verdict(record.result, command.fail_below)


def prepare(command: argparse.Namespace) -> tuple[list[Backend], list[Workload], dict[str, Any], int]:
    """Who takes part in what; the settings are what a run that goes on must have in common with its beginning."""
    require_isa()
    device = command.device
    if device == "cuda":
        require_cuda("--device cuda")
    for name in command.rivals or ():
        backend = backends.BY_NAME.get(name)
        if backend and device not in backend.devices:
            raise UsageError(f"--rivals {name}: it does not run on {device}")
        if backend and not backend.installed:
            raise UsageError(f"--rivals {name}: {backend.package} is missing: pip install {backend.package}")
    selected = backends.chosen(command.rivals or backends.NAMES, device)
    dtypes, limit = command.dtype or DTYPES[device], command.max_gflop or MAX_GFLOP[device]
    counts = command.threads if device == "cpu" else (1,)
    planned, larger = workloads.plan(command.suite, device, dtypes, command.passes, counts, limit)
    if not planned:
        raise UsageError(f"--max-gflop {limit:g}: all of the suite {command.suite} is larger")
    settings = {
        "suite": command.suite, "device": device, "dtypes": list(dtypes), "passes": list(command.passes),
        "threads": list(counts), "rivals": [backend.name for backend in selected if backend.name != OURS],
        "seconds": command.seconds or SECONDS[device], "max gflop": limit, "pinned": command.pin,
    }  # fmt: skip
    return selected, planned, settings, larger


def clock(command: argparse.Namespace) -> Callable[[], float]:
    """Seconds that are left for comparisons: the last of --minutes are for the files and pictures."""
    minutes = command.minutes or (MINUTES if (command.device, command.suite) == ("cuda", "quick") else float("inf"))
    end = monotonic() + 60 * minutes - min(REPORT, 60 * minutes * REPORT_SHARE)
    return lambda: end - monotonic()


def conclude(console: Console, result: dict[str, Any]) -> None:
    for text in tables.notes(result):
        console.print(text)
    for where, lines in tables.summaries(result["rows"]).items():
        console.print(f"\n{where}")
        table(console, tables.SUMMARY[:-1], [line[:-1] for line in lines], left=3)
    console.print("Another's time over this package's: above 1 this package is faster; in brackets the quartiles.")
    console.print(tables.verdict(result["rows"]))


def verdict(result: dict[str, Any], least: float | None) -> int:
    """1 where something is wrong, or a geometric mean of ratios to torch is below ``least``."""
    status = 0
    for line in stats.troubles(result["rows"]):
        complain(f"bench: {line}")
        status = EXIT_MISMATCH
    for group, found in stats.summaries(result["rows"]).items():
        for summary in found:
            if least is not None and summary.backend == TORCH and summary.mean.median < least:
                what = f"{group.product} {group.dtype}, {group.where}"
                complain(f"bench: {what}: {summary.mean.median:.3f} of torch, below {least:g}")
                status = EXIT_MISMATCH
    return status


def compare(command: argparse.Namespace) -> int:
    """The comparisons that two runs have in common, and what differs by more than its spread."""
    first, second = load(command.first), load(command.second)
    found = stats.changes(first["rows"], second["rows"])
    if not found:
        raise UsageError(f"compare: {command.first} and {command.second} have no comparison in common")
    console = make_console()
    table(console, tables.CHANGES, tables.changes(found))
    for line in tables.other_machine(first["stamp"], second["stamp"]):
        console.print(line)
    mean, differ = stats.mean_change(found), sum(change.significant for change in found)
    console.print(f"geometric mean of second / first: {mean:.3f}; {differ} of {len(found)} beyond their spread.")
    console.print("A figure is our ratio to torch, or calls a second where torch was not timed: larger is faster.")
    console.print("Beyond the spread: what is between the quartiles of one run meets nothing of the other's.")
    for path, result in ((command.first, first), (command.second, second)):
        busy = stats.disturbed(result["rows"])
        if busy:
            console.print(f"{path}: other work ran during {len(busy)} of {len(result['rows'])} comparisons")
    least = command.fail_below
    low = [change for change in found if least and change.significant and change.ratio < least]
    for change in low:
        complain(f"bench: {change.name}: {change.ratio:.3f} of the first, below {least:g}")
    if least and mean < least:
        complain(f"bench: geometric mean: {mean:.3f} of the first, below {least:g}")
    return EXIT_MISMATCH if low or (least and mean < least) else 0


def load(path: Path) -> results.Result:
    """The comparisons of a run of any command."""
    result = results.load(path)
    return result | {"rows": stats.compared(result["rows"])}


def report(command: argparse.Namespace) -> int:
    """The files of a run again, and the section of docs/results.md."""
    require("matplotlib")
    from . import html, readme

    result = load(command.file)
    if command.readme and result["stamp"]["device"] != "cpu":
        raise UsageError(f"--readme: its section is of a CPU, and {command.file} of a GPU")
    if command.readme and not command.busy:
        busy = stats.disturbed(result["rows"])
        if busy:
            raise UsageError(f"--readme: other work ran here during {busy[0]}, in all {len(busy)} comparisons")
    place = results.writable(command.out or command.file.parent)
    html.write_all(result, place)
    print(f"report: {place / 'bench.html'}")
    if command.readme:
        readme.rewrite(command.readme, readme.block(result, readme.beside(place, command.readme)))
        print(f"table: {command.readme}")
    return 0


OPTIONS = {"run": run_options, "compare": compare_options, "report": report_options}
DO = {"run": run, "compare": compare, "report": report}
HELP = {
    "run": "times of this package, torch and others, proven right first; as JSON, CSV, Markdown, HTML and pictures",
    "compare": "two runs, comparison by comparison, and what differs by more than its spread",
    "report": "the files of a run again; with --readme the section of docs/results.md too",
}
EPILOG = "`bench compare A.json B.json` and `bench report FILE` are commands of their own."
