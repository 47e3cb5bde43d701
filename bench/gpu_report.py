"""`matmul-grad gpu-report`: the steps one after the other, and the two files that they end in.

Exit codes: 0 complete; 1 a step failed or a product is wrong; 2 what was asked for cannot be done; 130 interrupted.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from time import monotonic
from typing import Any

from .. import cli_common
from ..console import make_console, table
from . import backends, results, stages, stats, tables, targets, workloads
from .options import interrupted_by_sigterm, listed, minutes, running
from .stages import STAGES, Stage, StageContext

HELP = "tests, sanitizer and times of the GPU kernels, in --minutes; written as JSON and Markdown"
MINUTES = 8.0
EVERY = tuple(step.name for step in STAGES)

Say = Callable[[str], None]


def add_options(parser: argparse.ArgumentParser) -> None:
    option = parser.add_argument
    option("--minutes", type=minutes, default=MINUTES, help=f"in all, at most; default: {MINUTES:.0f}")
    option("--out", type=Path, metavar="DIR", help="default: bench/results in a checkout, else this folder")
    option("--steps", type=some, default=STAGES, metavar="X,X", help=f"default: {names(STAGES)}")
    option("--resume", action="store_true", help="go on with the unfinished run of the folder")


def names(some: Sequence[Stage]) -> str:
    return listed(step.name for step in some)


def some(text: str) -> tuple[Stage, ...]:
    """Steps by name, in their own order; the environment is always one."""
    wanted = set(text.split(","))
    if wanted <= {step.name for step in STAGES}:
        return tuple(step for step in STAGES if step.name in wanted | {STAGES[0].name})
    raise argparse.ArgumentTypeError(f"some of {names(STAGES)}, got {text}")


def planned(steps: Collection[str]) -> dict[str, list[workloads.Workload]]:
    """The comparisons of those of the steps that compare."""
    every = {"ratios": workloads.gpu_targets, "rivals": workloads.gpu_rivals, "memory": workloads.gpu_memory}
    return {step: of_step() for step, of_step in every.items() if step in steps}


def figures(result: dict[str, Any]) -> list[targets.Entry]:
    return targets.entries(targets.GPU, result["rows"], planned=planned(result["settings"].get("steps", EVERY)))


def run(command: argparse.Namespace) -> int:
    cli_common.require_cuda("gpu-report")
    place, selected = results.folder(command.out), backends.chosen(backends.NAMES, "cuda")
    steps = [step.name for step in command.steps]
    settings = {"steps": steps, "seconds": stages.SECONDS, "pinned": False}
    compared = planned(steps)
    result = results.begin(
        results.GPU_REPORT, results.stamp("cuda", selected), settings, sum(map(len, compared.values()))
    )
    record = results.Record.begin(place, result | {"steps": []}, command.resume)
    with running("gpu-report") as shown, interrupted_by_sigterm() as interrupted:
        walk(record, command, selected, shown)
    if interrupted:
        done = {step["name"] for step in record.result["steps"]}
        for step in command.steps:
            if step.name not in done:
                ended(record, step, stages.Outcome(stages.STOPPED), 0.0)
    left = sum(len(record.left(some, step)) for step, some in compared.items())
    path = finish(record, not interrupted, "" if command.steps == STAGES else "part", left)
    measured = [entry for entry in figures(record.result) if entry.figure]
    table(make_console(), [*tables.TARGETS, "comparisons"], tables.target_lines(measured))
    for line in stats.troubles(record.result["rows"]):
        print(line)
    print(f"written: {path}")
    if interrupted:
        print("--resume goes on from here")
        return cli_common.EXIT_INTERRUPTED
    return cli_common.EXIT_MISMATCH if is_bad(record.result) else 0


def is_bad(result: dict[str, Any]) -> bool:
    statuses = {step["status"] for step in result["steps"]}
    return bool(statuses & {stages.FAILED, stages.LATE} or stats.troubles(result["rows"]))


def walk(record: results.Record, command: argparse.Namespace, selected: Sequence[backends.Backend], shown: Say) -> None:
    """Every step that is not complete, within its limit. Its comparisons go on; its other rows are made again."""
    clock = stages.Clock(60 * command.minutes)
    complete = {step["name"] for step in record.result["steps"] if step["status"] == stages.COMPLETE}
    for step in command.steps:
        if step.name in complete:
            continue
        record.result["steps"] = [known for known in record.result["steps"] if known["name"] != step.name]
        record.result["rows"] = [
            row for row in record.result["rows"] if row.get("step") != step.name or "product" in row
        ]
        shown(step.name)
        seconds, start = stages.limit(step, max(0.0, clock.left()), command.steps), monotonic()
        said = functools.partial(tell, shown, step.name)
        given = StageContext(step.name, record, seconds, said, selected, results.checkout())
        try:
            outcome = step.do(given)
        except cli_common.UsageError:
            raise
        except Exception as error:  # a step that cannot even be run takes no other with it
            outcome = stages.Outcome(stages.FAILED, f"{type(error).__name__}: {error}")
        ended(record, step, outcome, monotonic() - start)
        print(f"{step.name}: {outcome.status}{outcome.note and ': ' + outcome.note}", file=sys.stderr)


def ended(record: results.Record, step: Stage, outcome: stages.Outcome, seconds: float) -> None:
    """On disk after every step."""
    status, note = outcome
    record.result["steps"].append({"name": step.name, "status": status, "seconds": round(seconds, 1), "note": note})
    record.write()
    results.write(record.path(results.UNFINISHED, ".md"), tables.report(record.result, figures(record.result)))


def finish(record: results.Record, ended: bool, ending: str, left: int) -> Path:
    """The last write, under the name that stays."""
    path = record.finish(ended, ending, left).with_suffix(".md")
    results.write(path, tables.report(record.result, figures(record.result)))
    if ended:
        record.path(results.UNFINISHED, ".md").unlink(missing_ok=True)
    return path


def tell(shown: Say, step: str, news: str) -> None:
    shown(f"{step}: {news}")
