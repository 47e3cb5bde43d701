"""The steps of `gpu-report`, each with a limit of its own: none can take another with it."""

from __future__ import annotations

import collections
import importlib.util
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any, NamedTuple

from .. import cuda
from . import gpu_tasks, results, runner, sanitizer, worker, workloads
from .backends import IMPLEMENTATIONS, TORCH_PROCESS, Backend
from .workloads import OURS, Workload

COMPLETE, FAILED, LATE, MISSING, STOPPED = "complete", "failed", "timed out", "missing", "interrupted"
SECONDS = 0.3  # a comparison
AGAIN = 8  # comparisons that may fail one after the other, or tasks that end their process, before a step gives up
WORKERS = max(1, min(16, os.cpu_count() or 1))  # of pytest: most of a test's time is its kernel's compilation
TESTS = "gpu and not slow"  # the others compile thousands of kernels: minutes, in a call of their own
CLOCKS_EVERY = 20.0  # seconds between two looks at the clocks beside the ratios
OUTCOME = re.compile(r"(?:^|\s)(PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)(?:\s|$)")
TEST = re.compile(r"\S+::\S+")
SUMMARY = re.compile(r"(ERROR SUMMARY|RACECHECK SUMMARY): (\d+).*")
FOUND = 99  # the exit code of a sanitizer that found something
LAST = 200  # lines of pytest that are kept where a test fails
LOG = 4000  # characters of what it wrote that are kept
HOMES = ("/usr/local/cuda/bin", "/opt/cuda/bin")  # where the toolkit is when it is not on the path
BAD = ("wrong", "failed")

Row = dict[str, Any]


class Outcome(NamedTuple):
    """What became of a step: its status, and a line about it."""

    status: str
    note: str = ""


class Clock:
    """Seconds until a deadline, less than none behind it."""

    def __init__(self, seconds: float) -> None:
        self._end = monotonic() + seconds

    def left(self) -> float:
        return self._end - monotonic()


@dataclass
class StageContext:
    """What a step is given: where its rows go, its seconds, whom to tell what is running."""

    name: str
    record: results.Record
    seconds: float
    said: Callable[[str], None] = lambda news: None
    selected: Sequence[Backend] = ()
    checkout: Path | None = None
    rows: int = 0
    bad: list[str] = field(default_factory=list)

    def keep(self, row: Row) -> None:
        self.rows += 1
        self.bad += [name for kind in BAD for name in row.get(kind, {})]
        self.record.keep({"step": self.name, **row})

    def conclude(self, status: str = "", reason: str = "", left: int = 0) -> Outcome:
        """What became of the step, from its rows and its end."""
        parts = [f"{self.rows} done", f"{len(self.bad)} of them failed" if self.bad else "", reason]
        parts.append(f"no time for {left} more" if left else "")
        return Outcome(status or (FAILED if self.bad else COMPLETE), "; ".join(filter(None, parts)))


class Clocks:
    """What the driver reports of the GPU's clocks, right behind a comparison: beside the first, then every so often.

    A GPU that is too hot or takes too much power lowers its clocks, which not all products feel alike.
    """

    pool: runner.WorkerPool | None = None

    def __init__(self) -> None:
        self._next = Clock(0.0)

    def seen(self) -> Row:
        if self.pool is None or self._next.left() > 0:
            return {}
        self._next = Clock(CLOCKS_EVERY)
        try:
            return {"clocks": self.pool.clocks()}
        except worker.WorkerFailed as reason:
            return {"clocks": {"nvidia-smi": str(reason)}}


Do = Callable[[StageContext], Outcome]


class Stage(NamedTuple):
    """A step, its share of the time, and the seconds that it needs at least."""

    name: str
    share: float
    do: Do
    least: float = 0


def compared(planned: Callable[[], Sequence[Workload]], rivals: bool = False) -> Do:
    """The comparisons that have no row yet, until the time is up."""

    def do(given: StageContext) -> Outcome:
        todo = given.record.left(planned(), given.name)
        selected = [backend for backend in given.selected if rivals or backend.name in IMPLEMENTATIONS]
        left, failed, clocks = Clock(given.seconds).left, 0, Clocks()

        def begun(pool: runner.WorkerPool) -> None:
            given.said(todo[0].name)
            clocks.pool = pool

        for row in runner.rows(todo, selected, SECONDS, False, left, begun):
            row = forgiving(row) if rivals else row
            given.keep(row | clocks.seen())
            given.said(workloads.of_row(row).name)
            failed = failed + 1 if "failed" in row and "seconds" not in row else 0
            if failed > AGAIN:
                return given.conclude(FAILED, "it gave up")
        return given.conclude(left=len(todo) - given.rows)

    return do


def forgiving(row: Row) -> Row:
    """Another package that is wrong or fails is left out: that is no failure of this one."""
    found = {kind: dict(row.get(kind, {})) for kind in ("skipped", *BAD)}
    for kind in BAD:
        for name in [name for name in found[kind] if name != OURS]:
            found["skipped"][name] = f"{kind}: {found[kind].pop(name)}"
    return {name: value for name, value in (row | found).items() if value or name not in found}


def asked(
    given: StageContext,
    tasks: Mapping[str, worker.Message],
    process: str = TORCH_PROCESS,
    environment: Mapping[str, str] | None = None,
    wrapper: Sequence[str] = (),
    silence: float = runner.GPU_SILENCE,
) -> Outcome:
    """A row for each of the tasks by name; one that ends its process is a failed row, and another process follows."""
    clock, ended = Clock(given.seconds), 0
    with runner.WorkerPool((), "cuda", 1, False, clock.left, environment, wrapper) as pool:
        for done, (name, task) in enumerate(tasks.items()):
            if clock.left() <= 0:
                return given.conclude(left=len(tasks) - done)
            given.said(name)
            try:
                answer = pool.ask(process, task, silence)
            except worker.WorkerExited as reason:
                if clock.left() < 1:
                    return given.conclude(LATE, f"stopped in {name}")
                answer, ended = {"failed": f"its process ended: {reason}", "log": reason.stderr}, ended + 1
            ended += bool(answer.pop("ended", False))
            kinds = {kind: {OURS: answer.pop(kind)} for kind in ("skipped", *BAD) if kind in answer}
            given.keep({"name": name, **answer, **kinds})
            if ended > AGAIN:
                return given.conclude(FAILED, f"{ended} of its processes ended early")
    return given.conclude()


def environment(given: StageContext) -> Outcome:
    """What the GPU reports of itself, at rest and while it multiplies, becomes part of the stamp."""
    with runner.WorkerPool((), "cuda", 1, False, Clock(given.seconds).left) as pool:
        try:
            facts = pool.facts()
        except worker.WorkerFailed as reason:
            return Outcome(FAILED, str(reason))
    given.record.result["stamp"] = facts | given.record.result["stamp"]
    return Outcome(COMPLETE)


def launches(given: StageContext) -> Outcome:
    """The launch costs; in the step "native" with `mm` registered natively."""
    tasks = {f"{dtype} {n}×{n}": {"do": "launch", "n": n, "dtype": dtype} for dtype, n in gpu_tasks.LAUNCHES}
    return asked(given, tasks, environment={cuda.VARIABLE: "1"} if given.name == "native" else None)


def compiled(given: StageContext) -> Outcome:
    """The kernels of the ratios, by several processes, into the cache that Triton keeps."""
    return asked(given, {"kernels": {"do": "compile", "seconds": given.seconds}}, silence=float("inf"))


def small_set() -> dict[str, worker.Message]:
    return {name: {"do": "sanitized", "name": name} for name in sanitizer.cases()}


def sanitized(given: StageContext) -> Outcome:
    return asked(given, small_set(), process="tasks")


def under_tool(given: StageContext) -> Outcome:
    """The small set under the tool of compute-sanitizer that has the step's name.

    racecheck has found hazards in correct kernels that multiply from memory which TMA fills: its hazards are reported,
    and are no failure.
    """
    command = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=os.pathsep.join(HOMES))
    if command is None:
        return Outcome(MISSING, "compute-sanitizer is not on this machine")
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        options = [f"--tool={given.name}", "--target-processes=application-only", f"--error-exitcode={FOUND}"]
        if given.name == "memcheck":  # libraries ask for functions that are not there, and take no for an answer
            options.append("--report-api-errors=no")
        wrapper = command, *options, f"--log-file={log}"
        caching = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        outcome = asked(given, small_set(), "tasks", caching, wrapper, silence=float("inf"))
        text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    summaries = [(match[0], int(match[2])) for match in SUMMARY.finditer(text)]
    row: Row = {"name": given.name, "products": given.rows, "summary": [line for line, _ in summaries]}
    if any(count for _, count in summaries):
        row |= {"log": text[:LOG]} | ({} if given.name == "racecheck" else {"failed": {OURS: "see log"}})
    given.keep(row)
    failed = "failed" in row or (not summaries and outcome.status == COMPLETE)
    last = summaries[-1][0] if summaries else "it wrote no summary"
    return Outcome(FAILED if failed else outcome.status, f"{outcome.note}; {last}")


def gpu_tests(given: StageContext) -> Outcome:
    """The tests that need a GPU, where there are tests."""
    tests = given.checkout / "tests" if given.checkout else None
    if tests is None or not tests.is_dir():
        return Outcome(MISSING, "no tests at hand: this is not a checkout")
    if importlib.util.find_spec("pytest") is None:
        return Outcome(MISSING, "pytest is not installed")
    found = sorted(path for path in tests.rglob("test_*.py") if "mark.gpu" in path.read_text(encoding="utf-8"))
    outcomes: dict[str, str] = {}
    last: collections.deque[str] = collections.deque(maxlen=LAST)

    def heard(line: str) -> None:
        last.append(line)
        outcome, test = OUTCOME.search(line), TEST.search(line)
        if outcome and test:
            outcomes[test[0]] = outcome[1]
            given.said(test[0])

    required = {"MATMUL_GRAD_REQUIRE_GPU": "1"}
    ended = worker.run(pytest(found), heard, seconds=given.seconds, environment=required, folder=tests.parent)
    counts = collections.Counter(outcomes.values())
    bad = [test for test, outcome in outcomes.items() if outcome in ("FAILED", "ERROR")]
    row: Row = {"name": f"pytest -m '{TESTS}'", "counts": {k.lower(): v for k, v in counts.items()}}
    note = ", ".join(f"{count} {name.lower()}" for name, count in counts.items()) or "no test ran"
    if ended.status == 0:
        given.keep(row)
        return Outcome(COMPLETE, note)
    reason = f"{len(bad)} of the tests failed" if bad else ended.reason
    given.keep(row | {"failed": {OURS: reason}, "tests": bad, "log": "\n".join(last)})
    return Outcome(LATE if ended.status is None and not bad else FAILED, f"{note}; {reason}")


def pytest(files: Sequence[Path]) -> list[str]:
    """The project's settings name an option of pytest-timeout: without it they are left aside."""
    options = ["-m", TESTS, "-v", "-rN", "--tb=short", "-p", "no:cacheprovider"]
    if importlib.util.find_spec("pytest_timeout") is None:
        options += ["-c", os.devnull, "--rootdir=.", "--import-mode=importlib"]
    if importlib.util.find_spec("xdist") is not None:
        options += ["-n", str(WORKERS), "-p", "no:benchmark"]  # which has nothing to time here, and warns beside xdist
    return worker.python("-m", "pytest", *options, *map(str, files))


# Shares of eight minutes, in seconds. What a step leaves goes to those behind it. Figures come before what takes long
# and decides nothing about them; the environment may have to wait for a cold import and the first context.
STAGES = (
    Stage("environment", 30, environment, least=60),
    Stage("sanitized", 30, sanitized),
    Stage("compile", 40, compiled),
    Stage("ratios", 165, compared(lambda: workloads.gpu_targets())),
    Stage("launch", 10, launches),
    Stage("native", 10, launches),
    Stage("memory", 10, compared(lambda: workloads.gpu_memory())),
    Stage("rivals", 25, compared(lambda: workloads.gpu_rivals(), rivals=True)),
    Stage("memcheck", 40, under_tool),
    Stage("racecheck", 20, under_tool),
    Stage("tests", 100, gpu_tests),
)


def limit(step: Stage, left: float, steps: Sequence[Stage] = STAGES) -> float:
    """Seconds for a step: its share of those that are left, among the steps that are, or as many as it needs at least.

    >>> round(limit(STAGES[1], 450)), round(limit(STAGES[-1], 60)), round(limit(STAGES[0], 480))
    (30, 60, 60)
    """
    share = left * step.share / sum(other.share for other in steps[steps.index(step) :])
    return min(left, max(share, step.least))
