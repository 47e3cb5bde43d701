"""The steps of `gpu-report`: each in a process of its own, with a limit of its own; none can take another with it."""

from __future__ import annotations

import collections
import importlib.util
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import NamedTuple

from .. import cuda
from . import gpu_worker, process
from .gpu_session import Row

COMPLETE, FAILED, LATE, MISSING, STOPPED = "complete", "failed", "timed out", "missing", "interrupted"
SILENCE = 60.0  # seconds without a word from a child: a kernel that never ends
AGAIN = 8  # processes more that a step may take, where tasks break theirs
WORKERS = max(1, min(8, (os.cpu_count() or 1) // 2))  # of pytest: most of a test's time is its kernel's compilation
OUTCOME = re.compile(r"(?:^|\s)(PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)(?:\s|$)")
TEST = re.compile(r"\S+::\S+")
SUMMARY = re.compile(r"(ERROR SUMMARY|RACECHECK SUMMARY): (\d+).*")
FOUND = 99  # the exit code of a sanitizer that found something
LAST = 200  # lines of pytest that are kept where a test fails
LOG = 4000  # characters of what it said that are kept
HOMES = ("/usr/local/cuda/bin", "/opt/cuda/bin")  # where the toolkit is when it is not on the path

Said = Callable[[str], None]
Keep = Callable[[Row], None]


class Outcome(NamedTuple):
    """What became of a step: its status, and a line about it."""

    status: str
    note: str = ""


@dataclass
class StageContext:
    """What a step is given: its seconds, whom to give rows and news, how to start a process."""

    seconds: float
    keep: Keep
    said: Said
    run: process.Run = process.run
    checkout: Path | None = None


Do = Callable[[StageContext], Outcome]


class Stage(NamedTuple):
    """A step, and its share of the time."""

    name: str
    share: float
    do: Do


@dataclass
class MessageHandler:
    """Follows the lines of a child: which task is running, what came out, what was left."""

    given: StageContext
    step: str
    index: int = -1
    of: int = 0
    running: str = ""
    rows: int = 0
    bad: int = 0
    left: int = 0
    other: list[str] = field(default_factory=list)

    def __call__(self, line: str) -> None:
        try:
            message = json.loads(line)
        except ValueError:
            self.other.append(line)
            return
        if "begin" in message:
            self.index, self.of, self.running = message["begin"], message["of"], message["name"]
            self.given.said(self.running)
        elif "left" in message:
            self.left = message["left"]
        else:
            self.running = ""
            self.take(message["row"])

    def take(self, row: Row) -> None:
        self.rows += 1
        self.bad += "wrong" in row or "failed" in row
        self.given.keep({"step": self.step, **row})


class Clock:
    """Seconds until a deadline."""

    def __init__(self, seconds: float) -> None:
        self._end = monotonic() + seconds

    def left(self) -> float:
        return max(0.0, self._end - monotonic())


def tasks_of(name: str, silence: float = SILENCE) -> Do:
    """A step of `child`."""
    return lambda given: conclude(*tasks(given, name, silence))


def tasks(
    given: StageContext,
    name: str,
    silence: float,
    wrapper: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    step: str = "",
) -> tuple[MessageHandler, str, str]:
    """Run a step of `child`, and again behind a task that breaks its process; ``wrapper`` is a command to run it in,
    ``step`` what its rows belong to where that is not ``name``.

    What was heard, and if it was stopped or did not end well, as what and why.
    """
    listener, clock, start = MessageHandler(given, step or name), Clock(given.seconds), 0
    for _ in range(1 + AGAIN):
        left = clock.left()
        arguments = f"--start={start}", f"--until={process.deadline(left):.1f}"
        command = [*wrapper, *process.python("-m", gpu_worker.__name__, name, *arguments)]
        ended = given.run(command, listener, seconds=left, silence=silence, environment=environment or {})
        if ended.status == 0:
            return listener, "", ""
        late = ended.status is None and clock.left() < 1
        if listener.running and not late:
            why = {"failed": f"its process ended: {ended.reason}", "log": ended.said}
            listener.take({"name": listener.running, **why})
        elif late:
            return listener, LATE, f"stopped in {listener.running or 'its beginning'}"
        elif ended.status != gpu_worker.BROKEN:
            return listener, FAILED, ended.reason
        listener.running, start = "", listener.index + 1
        if start == listener.of:
            return listener, "", ""
    return listener, FAILED, f"{1 + AGAIN} of its processes ended early"


def conclude(listener: MessageHandler, status: str = "", reason: str = "") -> Outcome:
    """What became of a step, from its rows and its end."""
    parts = [f"{listener.rows} done", f"{listener.bad} of them failed" if listener.bad else "", reason]
    parts.append(f"no time for {listener.left} more" if listener.left else "")
    return Outcome(status or (FAILED if listener.bad else COMPLETE), "; ".join(filter(None, parts)))


def sanitizer(tool: str) -> Do:
    """The small set under a tool of compute-sanitizer."""

    def do(given: StageContext) -> Outcome:
        command = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=os.pathsep.join(HOMES))
        if command is None:
            return Outcome(MISSING, "compute-sanitizer is not on this machine")
        with tempfile.TemporaryDirectory() as folder:
            log = Path(folder, "log")
            options = [f"--tool={tool}", "--target-processes=application-only", f"--error-exitcode={FOUND}"]
            if tool == "memcheck":  # libraries ask for functions that are not there, and take no for an answer
                options.append("--report-api-errors=no")
            wrapper = command, *options, f"--log-file={log}"
            caching = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
            listener, status, reason = tasks(given, "sanitized", float("inf"), wrapper, caching, tool)
            text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
        summaries = [(match[0], int(match[2])) for match in SUMMARY.finditer(text)]
        row: Row = {"step": tool, "name": tool, "products": listener.rows, "summary": [line for line, _ in summaries]}
        if any(count for _, count in summaries) or status == FAILED:
            row |= {"failed": reason or "see log", "log": text[:LOG]}
        elif not summaries and not status:
            status, reason = FAILED, "it wrote no summary"
        given.keep(row)
        outcome = conclude(listener, FAILED if "failed" in row else status, reason)
        return outcome._replace(note="; ".join([outcome.note, *(line for line, _ in summaries[-1:])]))

    return do


def gpu_tests(given: StageContext) -> Outcome:
    """The tests that need a GPU, where there are tests."""
    tests = given.checkout / "tests" if given.checkout else None
    if tests is None or not tests.is_dir():
        return Outcome(MISSING, "no tests at hand: this is not a checkout")
    if importlib.util.find_spec("pytest") is None:
        return Outcome(MISSING, "pytest is not installed")
    found = sorted(path for path in tests.rglob("test_*.py") if "mark.gpu" in path.read_text(encoding="utf-8"))
    results: dict[str, str] = {}
    last: collections.deque[str] = collections.deque(maxlen=LAST)

    def heard(line: str) -> None:
        last.append(line)
        outcome, test = OUTCOME.search(line), TEST.search(line)
        if outcome and test:
            results[test[0]] = outcome[1]
            given.said(test[0])

    environment = {"MATMUL_GRAD_REQUIRE_GPU": "1"}
    folder = tests.parent
    ended = given.run(pytest(found), heard, seconds=given.seconds, environment=environment, folder=folder)
    counts = collections.Counter(results.values())
    bad = [test for test, outcome in results.items() if outcome in ("FAILED", "ERROR")]
    row: Row = {"step": "tests", "name": "pytest -m gpu", "counts": {k.lower(): v for k, v in counts.items()}}
    note = ", ".join(f"{count} {name.lower()}" for name, count in counts.items()) or "no test ran"
    if ended.status == 0:
        given.keep(row)
        return Outcome(COMPLETE, note)
    reason = f"{len(bad)} of the tests failed" if bad else ended.reason
    given.keep(row | {"failed": reason, "tests": bad, "log": "\n".join(last)})
    return Outcome(LATE if ended.status is None and not bad else FAILED, f"{note}; {reason}")


def pytest(files: Sequence[Path]) -> list[str]:
    """The project's settings name an option of pytest-timeout: without it they are left aside."""
    options = ["-m", "gpu", "-v", "-rN", "--tb=short", "-p", "no:cacheprovider"]
    if importlib.util.find_spec("pytest_timeout") is None:
        options += ["-c", os.devnull, "--rootdir=.", "--import-mode=importlib"]
    if importlib.util.find_spec("xdist") is not None:
        options += ["-n", str(WORKERS), "-p", "no:benchmark"]  # which has nothing to time here, and warns beside xdist
    return process.python("-m", "pytest", *options, *map(str, files))


def rivals_of(given: StageContext) -> Outcome:
    """The other packages: one that takes its time to tune itself is no failure of this one."""
    outcome = tasks_of("rivals", float("inf"))(given)
    return outcome._replace(status=COMPLETE) if outcome.status == LATE else outcome


def natively(given: StageContext) -> Outcome:
    """The launch costs again, with `mm` registered natively."""
    return conclude(*tasks(given, "launch", SILENCE, environment={cuda.VARIABLE: "1"}, step="native"))


# Shares of eight minutes, in seconds. What a step leaves goes to those behind it.
STAGES = (
    Stage("environment", 15, tasks_of("environment")),
    Stage("tests", 100, gpu_tests),
    Stage("sanitized", 30, tasks_of("sanitized")),
    Stage("memcheck", 45, sanitizer("memcheck")),
    Stage("racecheck", 45, sanitizer("racecheck")),
    Stage("compile", 40, tasks_of("compile", float("inf"))),
    Stage("ratios", 145, tasks_of("ratios")),
    Stage("rivals", 30, rivals_of),
    Stage("launch", 10, tasks_of("launch")),
    Stage("native", 10, natively),
    Stage("memory", 10, tasks_of("memory")),
)


def limit(step: Stage, left: float, steps: Sequence[Stage] = STAGES) -> float:
    """Seconds for a step: its share of those that are left, among the steps that are.

    >>> round(limit(STAGES[0], 480)), round(limit(STAGES[-1], 60))
    (15, 60)
    """
    return left * step.share / sum(other.share for other in steps[steps.index(step) :])
