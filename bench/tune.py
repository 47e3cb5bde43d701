"""`matmul-grad tune`: problem after problem, each winner written as it is found; begun again, it goes on.

Exit codes: 0 done, or the time was up; 1 a problem has no winner; 2 what was asked for cannot be done; 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from .. import cli_common, testing
from . import gpu_calls, gpu_workloads, process, tune_worker
from . import gpu_report as reporting
from . import gpu_worker as children
from .options import some_of
from .shapes import Shape
from .stages import Clock
from .tune_results import Table

HELP = "time every candidate tile for some problems on this GPU, and keep the winners for later calls"
MINUTES = 8.0
SILENCE = 60.0  # seconds without a word: a candidate that never ends, or a compiler
AGAIN = 20  # processes more, where candidates end theirs
NUMBERS = {
    "bf16": ("bf16", "ieee"), "f16": ("f16", "ieee"), "f32": ("f32", "ieee"), "tf32": ("f32", "tf32"),
    "tf32x3": ("f32", "tf32x3"), "f64": ("f64", "ieee"),
}  # fmt: skip
SUITES = {"core": gpu_workloads.CORE, "layers": gpu_workloads.LAYERS, "all": gpu_workloads.EVERY}


def add_options(parser: argparse.ArgumentParser) -> None:
    option = parser.add_argument
    option(
        "--dtype",
        type=some_of(tuple(NUMBERS)),
        default=("bf16",),
        metavar="X,X",
        help=f"of {','.join(NUMBERS)}; default: bf16",
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--shapes", type=shape, nargs="+", metavar="M,N,K", help="each in forward, dgrad and wgrad")
    which.add_argument("--suite", choices=sorted(SUITES), help="default: core")
    option("--minutes", type=reporting.minutes, default=MINUTES, help=f"at most; default: {MINUTES:.0f}")
    option("--out", type=Path, metavar="FILE", help="the table; default: the one that is read at each call")


def shape(text: str) -> Shape:
    with contextlib.suppress(ValueError):
        m, n, k = (int(part) for part in text.split(","))
        if min(m, n, k) >= 1:
            return m, n, k
    raise argparse.ArgumentTypeError(f"three sizes of at least 1, as 128,4096,4096, got {text}")


def planned(command: argparse.Namespace) -> list[gpu_workloads.GpuWorkload]:
    """The problems: of each shape the forward product and both gradients, in every dtype."""
    found = []
    for m, n, k in command.shapes or SUITES[command.suite or "core"]:
        for dtype, precision in (NUMBERS[name] for name in command.dtype):
            for product in testing.PRODUCTS:
                found.append(gpu_workloads.GpuWorkload("products", product, dtype, m, n, k, precision))
    return list(dict.fromkeys(found))


def run(command: argparse.Namespace, launcher: process.Run = process.run) -> int:
    """Everything; ``launcher`` starts the processes."""
    if not torch.cuda.is_available():
        raise cli_common.UsageError(f"tune: torch {torch.__version__} finds no CUDA device here")
    table = Table(writable(command.out or gpu_calls.user_path()))
    with reporting.terminated_as_interrupted(), progress(len(planned(command))) as news:
        tuner = Tuner(table, planned(command), launcher, news)
        tuner.run(60 * command.minutes)
    print(f"{tuner.found} measured, {tuner.known} known before; written: {table.path}")
    if tuner.left:
        print(f"no time for {tuner.left} more: the same command goes on from here")
    return cli_common.EXIT_MISMATCH if tuner.failed else 0


def writable(path: Path) -> Path:
    """Found out before anything is measured."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as reason:
        raise cli_common.UsageError(f"tune: {path}: {reason.strerror}") from reason
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise cli_common.UsageError(f"tune: {path}: cannot be written")
    return path


@dataclass
class Tuner:
    """Starts children until every problem has its turn, and keeps what they say."""

    table: Table
    waiting: list[gpu_workloads.GpuWorkload]
    launcher: process.Run
    news: Callable[[str, int], None]
    found: int = 0
    known: int = 0
    failed: int = 0
    left: int = 0
    tried: dict[str, Any] | None = None
    at: gpu_workloads.GpuWorkload | None = None
    bad: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def run(self, seconds: float) -> None:
        clock = Clock(seconds)
        for _ in range(1 + AGAIN):
            if not self.waiting:
                return
            self.left, self.tried, self.at = 0, None, None
            ended = self.child(clock.left())
            if ended.status == 0 or clock.left() < 1:
                break
            self.blame(ended)
        self.left = len(self.waiting)

    def child(self, seconds: float) -> process.ExitStatus:
        plan = {"jobs": [asdict(workload) for workload in self.waiting], "known": self.table.keys, "bad": self.bad}
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "plan.json")
            path.write_text(json.dumps(plan), encoding="utf-8")
            command = process.python("-m", tune_worker.__name__, str(path), f"--until={process.deadline(seconds):.1f}")
            return self.launcher(command, self.heard, seconds=seconds, silence=SILENCE)

    def blame(self, ended: process.ExitStatus) -> None:
        """The candidate that was tried when the process ended is not tried again; without one, its problem is not."""
        if self.at is None:  # between two problems there is nothing that can fail, but at the first
            raise cli_common.UsageError(f"tune: no measurement can be begun: {ended.reason}")
        if self.tried is None:
            self.row({"name": self.at.name, "failed": ended.reason})
        elif self.tried not in self.bad.setdefault(self.at.name, []):
            self.bad[self.at.name].append(self.tried)
            if ended.status != children.BROKEN:  # then it said so itself
                self.say(f"{self.at.name}: dropped {short(self.tried)}: its process ended: {ended.reason}")

    def heard(self, line: str) -> None:
        try:
            message = json.loads(line)
        except ValueError:
            return
        if "facts" in message:
            self.table.begin(message["facts"])
        elif "begin" in message:
            self.at, self.tried = self.waiting_for(message["name"]), None
        elif "candidates" in message and self.at:
            self.news(f"{self.at.name}, {message['candidates']} candidates", 0)
        elif "try" in message:
            self.tried = message["try"]
        elif "dropped" in message:
            self.say(f"{self.at.name if self.at else ''}: dropped {short(message['dropped'])}: {message['why']}")
        elif "known" in message:
            self.known += 1
            self.finish(message["known"])
        elif "row" in message:
            self.row(message["row"])

    def row(self, row: dict[str, Any]) -> None:
        """A problem's end."""
        if "winner" in row:
            self.found += 1
            self.table.put(row)
            gain = f", {row['default seconds'] / row['seconds']:.3f} × the default" if row["default seconds"] else ""
            self.say(f"{row['name']}: {row['kernel']}, {row['seconds'] * 1e6:.2f} µs{gain}")
        else:
            self.failed += "failed" in row
            self.say(
                f"{row['name']}: {'failed' if 'failed' in row else 'skipped'}: {row.get('failed') or row['skipped']}"
            )
        self.finish(row["name"])

    def finish(self, name: str) -> None:
        self.waiting.remove(self.waiting_for(name))
        self.at = self.tried = None
        self.news(name, 1)

    def waiting_for(self, name: str) -> gpu_workloads.GpuWorkload:
        return next(workload for workload in self.waiting if workload.name == name)

    def say(self, line: str) -> None:
        print(line, file=sys.stderr)


def short(fields: dict[str, Any]) -> str:
    """A config in a few words.

    >>> short({"block_m": 128, "stages": 3})
    'block_m=128 stages=3'
    """
    return " ".join(f"{name}={value}" for name, value in fields.items())


@contextlib.contextmanager
def progress(count: int) -> Iterator[Callable[[str, int], None]]:
    """A bar on stderr on a terminal; elsewhere, and where rich is missing, the lines say enough."""
    console = cli_common.terminal()
    if console is None:
        yield lambda doing, done: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("tune", total=count)
        yield lambda doing, done: bar.update(task, description=doing, advance=done)
