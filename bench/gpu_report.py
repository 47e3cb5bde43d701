"""`matmul-grad gpu-report`: the steps one after the other, and the two files that they end in.

Exit codes: 0 complete; 1 a step failed or a product is wrong; 2 what was asked for cannot be done; 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from time import monotonic
from typing import Any

import torch

from .. import cli_common
from . import files, gpu_stats, gpu_tables, process, stages
from .files import checkout
from .gpu_session import Row
from .stages import STAGES, Stage, StageContext

KIND = "gpu-report"
HELP = "tests, sanitizer and times of the GPU kernels, in --minutes; written as JSON and Markdown"
MINUTES = 8.0
SCHEMA = 1
UNFINISHED = "unfinished"
EACH = 2.0  # seconds between two writes while rows come in

Say = Callable[[str], None]


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--minutes", type=minutes, default=MINUTES, help=f"in all, at most; default: {MINUTES:.0f}")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="default: bench/results in a checkout, else this folder"
    )
    parser.add_argument("--steps", type=some, default=STAGES, metavar="X,X", help=f"default: {listed(STAGES)}")


def listed(some: Sequence[Stage]) -> str:
    return ",".join(step.name for step in some)


def minutes(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < float(text) <= 24 * 60:
            return float(text)
    raise argparse.ArgumentTypeError(f"a number above 0, got {text}")


def some(text: str) -> tuple[Stage, ...]:
    """Steps by name, in their own order; the environment is always one."""
    wanted = set(text.split(","))
    if wanted <= {step.name for step in STAGES}:
        return tuple(step for step in STAGES if step.name in wanted | {STAGES[0].name})
    raise argparse.ArgumentTypeError(f"some of {listed(STAGES)}, got {text}")


def run(command: argparse.Namespace, launcher: process.Run = process.run) -> int:
    """Everything; ``launcher`` starts the processes."""
    if not torch.cuda.is_available():
        raise cli_common.UsageError(f"gpu-report: torch {torch.__version__} finds no CUDA device here")
    place = output(command.out)
    record = Record(place, whole=command.steps == STAGES)
    with terminated_as_interrupted(), progress(command.steps) as shown:
        interrupted = walk(record, command, launcher, shown)
    record.finish("interrupted" if interrupted else "" if record.result["whole"] else "part")
    for line in gpu_tables.last_words(record.result):
        print(line)
    print(f"written: {record.path('.md')}")
    if interrupted:
        return cli_common.EXIT_INTERRUPTED
    return cli_common.EXIT_MISMATCH if record.is_bad else 0


def output(wanted: Path | None) -> Path:
    """The folder of the files, found out before anything is measured."""
    here = checkout()
    folder = wanted or (here / "bench" / "results" if here else Path.cwd())
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as reason:
        raise cli_common.UsageError(f"--out {folder}: {reason.strerror}") from reason
    if not os.access(folder, os.W_OK):
        raise cli_common.UsageError(f"--out {folder}: cannot be written")
    return folder


class Record:
    """What was found so far, on disk after every step and while rows come in."""

    def __init__(self, folder: Path, whole: bool) -> None:
        self._folder, self._written, self._ending = folder, 0.0, UNFINISHED
        self.result: dict[str, Any] = {
            "schema": SCHEMA,
            "stamp": files.stamp(checkout()),
            "protocol": gpu_tables.PROTOCOL,
            "whole": whole,
            "steps": [],
            "rows": [],
        }

    @property
    def is_bad(self) -> bool:
        ended = {step["status"] for step in self.result["steps"]}
        return bool(ended & {stages.FAILED, stages.LATE} or gpu_stats.troubles(self.result["rows"]))

    def keep(self, row: Row) -> None:
        """A row; the facts of the machine become part of the stamp."""
        self.result["stamp"] |= row.get("facts", {})
        self.result["rows"].append(row)
        if monotonic() - self._written > EACH:
            self.write()

    def ended(self, name: str, outcome: stages.Outcome, seconds: float) -> None:
        status, note = outcome
        self.result["steps"].append({"name": name, "status": status, "seconds": round(seconds, 1), "note": note})
        self.write()

    def path(self, suffix: str) -> Path:
        """<date>-gpu-report-<GPU><-ending>, as the other files of bench/results."""
        stamp = self.result["stamp"]
        parts = stamp["date"], KIND, files.slug(stamp.get("GPU", "unknown gpu")), self._ending
        return self._folder / f"{'-'.join(filter(None, parts))}{suffix}"

    def write(self) -> None:
        files.write(self.path(".json"), files.as_json(self.result))
        files.write(self.path(".md"), gpu_tables.markdown(self.result))
        self._written = monotonic()

    def finish(self, ending: str) -> None:
        """The last write, under the name that stays."""
        unfinished = [self.path(suffix) for suffix in (".json", ".md")]
        self._ending = ending
        self.write()
        for path in unfinished:
            path.unlink(missing_ok=True)


def walk(record: Record, command: argparse.Namespace, launcher: process.Run, shown: Say) -> bool:
    """Every step within its limit; True where it was interrupted, and the rest left out."""
    clock, interrupted = stages.Clock(60 * command.minutes), False
    for step in command.steps:
        if interrupted:
            record.ended(step.name, stages.Outcome(stages.STOPPED, "not begun"), 0)
            continue
        shown(step.name)
        seconds, start = stages.limit(step, clock.left(), command.steps), monotonic()
        given = StageContext(seconds, record.keep, functools.partial(tell, shown, step.name), launcher, checkout())
        try:
            outcome = step.do(given)
        except KeyboardInterrupt:
            outcome, interrupted = stages.Outcome(stages.STOPPED), True
            record.result["whole"] = False
        except Exception as error:  # a step that cannot even be run takes no other with it
            outcome = stages.Outcome(stages.FAILED, f"{type(error).__name__}: {error}")
        record.ended(step.name, outcome, monotonic() - start)
        print(f"{step.name}: {outcome.status}{outcome.note and ': ' + outcome.note}", file=sys.stderr)
    return interrupted


def tell(shown: Say, step: str, news: str) -> None:
    shown(f"{step}: {news}")


@contextlib.contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM ends it as Ctrl-C does: children ended, files written."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def progress(planned: Sequence[Stage]) -> Iterator[Say]:
    """What is running, on stderr: a line that changes on a terminal, nothing elsewhere or where rich is missing."""
    console = cli_common.terminal()
    if console is None:
        yield lambda news: None
        return
    with console.status(f"{len(planned)} steps") as status:
        yield status.update
