"""`matmul-grad tune`: problem after problem, each winner written as it is found; begun again, it goes on.

Exit codes: 0 done, or the time was up; 1 a problem has no winner; 2 what was asked for cannot be done; 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .. import cli_common, machine, testing
from ..kernels.gpu import tuned_configs
from . import results, runner, worker
from .backends import TORCH_PROCESS
from .options import interrupted_by_sigterm, minutes, running, some_of
from .shapes import GPU_CORE, GPU_EVERY, GPU_LAYERS, Shape
from .stages import Clock
from .workloads import NUMBERS, Workload, on_gpu

HELP = "time every candidate tile for some problems on this GPU, and keep the winners for later calls"
MINUTES = 8.0
GAIN = 1.02  # that a winner must have over the default: less is noise, and the default is the simpler answer
AGAIN = 20  # candidates that may end their process before a run gives up
SUITES = {"core": GPU_CORE, "layers": GPU_LAYERS, "all": GPU_EVERY}
SAME = ("GPU", "compute capability", "triton", "matmul-grad")  # what other winners may come of

News = Callable[[str], None]


def add_options(parser: argparse.ArgumentParser) -> None:
    option = parser.add_argument
    known = tuple(NUMBERS)
    option(
        "--dtype", type=some_of(known), default=("bf16",), metavar="X,X", help=f"of {','.join(known)}; default: bf16"
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--shapes", type=shape, nargs="+", metavar="M,N,K", help="each in forward, dgrad and wgrad")
    which.add_argument("--suite", choices=sorted(SUITES), help="default: core")
    option("--minutes", type=minutes, default=MINUTES, help=f"at most; default: {MINUTES:.0f}")
    option("--out", type=Path, metavar="FILE", help="the table; default: the one that is read at each call")


def shape(text: str) -> Shape:
    with contextlib.suppress(ValueError):
        m, n, k = (int(part) for part in text.split(","))
        if min(m, n, k) >= 1:
            return m, n, k
    raise argparse.ArgumentTypeError(f"three sizes of at least 1, as 128,4096,4096, got {text}")


def planned(command: argparse.Namespace) -> list[Workload]:
    """The problems: of each shape the forward product and both gradients, in every dtype."""
    found = [
        on_gpu(product, *NUMBERS[name][:1], sizes, precision=NUMBERS[name][1])
        for sizes in command.shapes or SUITES[command.suite or "core"]
        for name in command.dtype
        for product in testing.PRODUCTS
    ]
    return list(dict.fromkeys(found))


def run(command: argparse.Namespace) -> int:
    cli_common.require_cuda("tune")
    table, problems = Table(writable(command.out or tuned_configs.user_path())), planned(command)
    with running("tune") as news, interrupted_by_sigterm() as interrupted:
        tuner = Tuner(table, news, 60 * command.minutes)
        with tuner.pool:
            tuner.run(problems)
    if interrupted:
        return cli_common.EXIT_INTERRUPTED
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


class Tuner:
    """Asks a process for candidates, tries each, has the correct ones timed, and keeps the winner."""

    def __init__(self, table: Table, news: News, seconds: float) -> None:
        self._table, self._news, self._clock = table, news, Clock(seconds)
        self.pool = runner.WorkerPool((), "cuda", 1, False, self._clock.left)
        self.found = self.known = self.failed = self.left = self._ended = 0

    def run(self, problems: Sequence[Workload]) -> None:
        """The problems in order, until the time is up."""
        try:
            facts = self.pool.facts()
        except worker.WorkerFailed as reason:
            raise cli_common.UsageError(f"tune: no measurement can be begun: {reason}") from reason
        self._table.begin(facts | {name: machine.version(name) for name in ("triton", "matmul-grad")} | results.now())
        for done, workload in enumerate(problems):
            if self._clock.left() <= 0 or self._ended > AGAIN:
                self.left = len(problems) - done
                return
            try:
                self.tune(workload, f"problem {done + 1} of {len(problems)}")
            except worker.WorkerFailed as reason:
                if self._clock.left() <= 0:
                    self.left = len(problems) - done
                    return
                self.failed += 1
                say(f"{workload.name}: failed: {reason}")

    def ask(self, what: str, workload: Workload, **more: Any) -> worker.Message:
        try:
            answer = self.pool.ask(TORCH_PROCESS, {"do": what, "workload": asdict(workload), **more})
        except worker.WorkerExited:
            self._ended += 1
            raise
        self._ended += bool(answer.get("ended"))
        return answer

    def tune(self, workload: Workload, where: str = "") -> None:
        """A problem: every candidate that is correct, timed; the winner beside `choose`'s default, the first."""
        found = self.ask("problem", workload)
        if "skipped" in found:
            say(f"{workload.name}: skipped: {found['skipped']}")
            return
        if "candidates" not in found:
            raise worker.WorkerFailed(found["failed"])
        if found["key"] in self._table.keys:
            self.known += 1
            return
        tiles = found["candidates"]
        self._news(f"{where}: {workload.name}, {len(tiles)} candidates")
        with contextlib.suppress(worker.WorkerExited):  # the next process finds what was compiled
            self.ask("compile candidates", workload, tiles=tiles)
        good = [index for index, tile in enumerate(tiles) if self.is_good(workload, tile)]
        if not good:
            raise worker.WorkerFailed(f"none of {len(tiles)} candidates is right")
        answer = self.ask("candidates timed", workload, tiles=[tiles[index] for index in good])
        if "timed" not in answer:
            raise worker.WorkerFailed(answer.get("failed") or answer.get("skipped"))
        seconds = {good[index]: taken for index, taken in answer["timed"]}
        best = min(seconds, key=lambda index: seconds[index])
        winner = 0 if 0 in seconds and seconds[0] <= GAIN * seconds[best] else best
        row = {"name": workload.name, "kernel": found["kernels"][winner], "seconds": seconds[winner]}
        row |= {"default": tiles[0], "default seconds": seconds.get(0)}
        row |= {"candidates": len(tiles), "timed": len(good), **results.now()}
        self._table.put(found["key"], tiles[winner], row)
        self.found += 1
        gain = f", {seconds[0] / seconds[winner]:.3f} × the default" if 0 in seconds else ""
        say(f"{workload.name}: {row['kernel']}, {seconds[winner] * 1e6:.2f} µs{gain}")

    def is_good(self, workload: Workload, tile: dict[str, Any]) -> bool:
        """Whether a candidate compiles, runs and is correct; one that ends the process is dropped as any other."""
        if self._ended > AGAIN or self._clock.left() <= 0:
            raise worker.WorkerFailed("too many of its candidates ended their process, or the time was up")
        try:
            answer = self.ask("candidate", workload, tile=tile)
        except worker.WorkerExited as reason:
            answer = {"failed": f"its process ended: {reason}"}
        why = answer.get("failed") or answer.get("skipped")
        why = f"wrong, {answer['wrong']}" if "wrong" in answer else why
        if why:
            say(f"{workload.name}: dropped {short(tile)}: {why}")
        return not why


def say(line: str) -> None:
    print(line, file=sys.stderr)


def short(fields: dict[str, Any]) -> str:
    """A config in a few words.

    >>> short({"block_m": 128, "stages": 3})
    'block_m=128 stages=3'
    """
    return " ".join(f"{name}={value}" for name, value in fields.items())


class Table:
    """The file of winners: `choose` reads ``winners``, people read ``provenance``.

    {"version": 1, "provenance": {facts, "measured": {key: times}}, "winners": {key: the config's fields}}
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._whole: dict[str, Any] = {"version": tuned_configs.VERSION, "provenance": {"measured": {}}, "winners": {}}
        if path.exists():
            self._whole = read(path)

    @property
    def keys(self) -> list[str]:
        """The problems that are measured: they are not measured again."""
        return list(self._whole["winners"])

    def begin(self, facts: dict[str, str]) -> None:
        """On this GPU, with these versions; UsageError where the file's winners were found on others."""
        before = self._whole["provenance"]
        for name in SAME:
            if self.keys and before.get(name) != facts.get(name):
                found_on = f"winners of {name} {before.get(name)}, and this is {facts.get(name)}"
                raise cli_common.UsageError(f"tune: {self.path} holds {found_on}: remove it, or name another")
        self._whole["provenance"] = before | facts

    def put(self, key: str, winner: dict[str, Any], row: dict[str, Any]) -> None:
        """A problem's winner, on disk when this returns."""
        self._whole["winners"][key] = winner
        self._whole["provenance"]["measured"][key] = row
        results.write(self.path, json.dumps(self._whole, indent=1) + "\n")


def read(path: Path) -> dict[str, Any]:
    try:
        whole = json.loads(path.read_text(encoding="utf-8"))
        if whole["version"] != tuned_configs.VERSION:
            known = tuned_configs.VERSION
            raise cli_common.UsageError(f"tune: {path} is of version {whole['version']}, this reads {known}")
        for key, fields in whole["winners"].items():
            dict(fields)
            whole["provenance"]["measured"][key]
        return whole
    except OSError as reason:
        raise cli_common.UsageError(f"tune: {path}: {reason.strerror}") from reason
    except (ValueError, KeyError, TypeError) as reason:
        raise cli_common.UsageError(f"tune: {path} is not a table of winners") from reason
