"""The runner: for each workload, every backend is prepared and checked in its process, then timed interleaved.

Batches of processes whose libraries have threads of their own lie REST apart: idle threads stay awake for a moment,
and would take the cores from the next process.
"""

from __future__ import annotations

import contextlib
import functools
import statistics
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import asdict
from time import sleep
from typing import Any

from ..console import Console, progress
from . import backends, memory, results, timer, worker
from .backends import PEAK, TORCH_PROCESS, Backend
from .timer import CALL_CLOCK, DEVICE_CLOCK
from .worker import Worker
from .workloads import OURS, Workload

REST = 0.1  # idle threads of OpenBLAS spin for 2²⁶ cycles before they sleep, GNU's OpenMP less
TRIES = 3  # of a comparison on one thread, for a moment when nothing else runs
PEAK_FLOPS = "flops of a call of the peak"
SILENCE = 600.0  # seconds without an answer: a kernel that never ends
GPU_SILENCE = 60.0  # the same on a GPU, but for a library that takes its time to tune itself
KINDS = ("skipped", "wrong", "failed")  # of an answer that is a reason
GRACE = 5.0  # seconds that a comparison may go on when the time is up

Row = dict[str, Any]
Left = Callable[[], float]


def environment(threads: int) -> dict[str, str]:
    """How many threads each library may have, as it is told before it starts.

    >>> environment(2)["OPENBLAS_NUM_THREADS"]
    '2'
    """
    eigen = "true" if threads > 1 else "false"
    return {
        "OPENBLAS_NUM_THREADS": str(threads),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_cpu_multi_thread_eigen={eigen}",
    }


class WorkerPool:
    """The processes of the backends, with one number of threads; one that ended is begun again when it is needed."""

    def __init__(
        self,
        selected: Sequence[Backend],
        device: str,
        threads: int,
        pin: bool,
        left: Left = lambda: float("inf"),
        more: Mapping[str, str] | None = None,
        wrapper: Sequence[str] = (),
    ) -> None:
        """``more`` is for the environment of the processes, ``wrapper`` a command that they run under."""
        self.device, self.threads = device, threads
        self._selected, self._pin, self._left = selected, pin, left
        self._environment, self._wrapper = environment(threads) | dict(more or {}), wrapper
        self._silence = SILENCE if device == "cpu" or any(backend.tunes for backend in selected) else GPU_SILENCE
        self._workers: dict[str, Worker] = {}
        self._last = ""  # the process that was asked last
        self._timed = ""  # the backend that was timed last

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *error: Any) -> None:
        for name in list(self._workers):
            self._workers.pop(name).__exit__(*error)

    def ask(self, process: str, task: worker.Message, silence: float | None = None) -> worker.Message:
        """Its answer; a process that is of no use any more after that is ended."""
        if process not in self._workers:
            options = [f"--process={process}", f"--device={self.device}", f"--threads={self.threads}"]
            self._workers[process] = Worker(
                f"{__package__}.session", *options, *["--pin"] * self._pin,
                environment=self._environment, wrapper=self._wrapper,
            )  # fmt: skip
        if self.threads > 1 and process != self._last:
            sleep(REST)
        self._last = process
        try:
            answer = self._workers[process].ask(task, min(silence or self._silence, max(0.0, self._left()) + GRACE))
        except worker.WorkerExited:
            del self._workers[process]
            raise
        if answer.pop("broken", False):
            self._workers.pop(process).end()
            answer["ended"] = True
        return answer

    def demand(self, process: str, task: worker.Message) -> worker.Message:
        """An answer that is none of failure."""
        answer = self.ask(process, task)
        for kind in KINDS:
            if kind in answer:
                raise worker.WorkerFailed(answer[kind])
        return answer

    def roof(self) -> Row:
        """The bandwidth of memory, on this number of threads."""
        gbs = self.demand(TORCH_PROCESS, {"bandwidth": True})
        return {"device": self.device, "threads": self.threads, "GB/s": gbs}

    def facts(self) -> dict[str, str]:
        """What the device says of itself."""
        return self.demand(TORCH_PROCESS, {"facts": True})["facts"]

    def clocks(self) -> dict[str, str]:
        """Clocks, power and temperature at this moment."""
        return self.demand(TORCH_PROCESS, {"clocks": True})["clocks"]

    def measure(self, workload: Workload, seconds: float) -> Row:
        """The row of a workload; ``seconds`` for all backends together, more where they are slow."""
        row: Row = {**asdict(workload), "flops": workload.flops, "bytes": workload.moved}
        ready = self._prepare(workload, row)
        clocks = (DEVICE_CLOCK, CALL_CLOCK) if self.device != "cpu" else (CALL_CLOCK,)
        for clock in clocks if ready else ():
            if not self._time(ready, clock, seconds / len(clocks), row):
                break
        row.pop(PEAK_FLOPS, None)
        if memory.is_measured(workload):
            self._measure_memory([name for name in ready if name != PEAK], workload, row)
        return row

    def _measure_memory(self, names: Sequence[str], workload: Workload, row: Row) -> None:
        for name in names:
            if backends.BY_NAME[name].compiles:
                continue
            try:
                answer = self.ask(memory.PROCESS, {"memory": name, "of": asdict(workload)})
            except worker.WorkerFailed as reason:
                answer = {"failed": str(reason)}
            for what, value in answer.items():
                row.setdefault(what, {})[name] = value

    def _prepare(self, workload: Workload, row: Row) -> dict[str, str]:
        """Who can be timed, and in which process; what there is to say of the others stands in the row then."""
        ready: dict[str, str] = {}
        mine = [backend for backend in self._selected if backend.takes(workload)]
        for process in dict.fromkeys(backend.process for backend in mine):
            names = [backend.name for backend in mine if backend.process == process]
            names += [PEAK] if process == TORCH_PROCESS else []
            try:
                answer = self.ask(process, {"prepare": asdict(workload), "names": names})
            except worker.WorkerFailed as reason:
                answer = {"failed": str(reason)}
            if "backends" not in answer:  # it is the workload that it cannot do
                (kind, why), names = next(iter(answer.items())), [name for name in names if name != PEAK]
                answer = {"backends": {name: {kind: why} for name in names}}
            if answer.get("ended"):
                why = {"skipped": "another backend broke the GPU's context"}
                found = answer["backends"]
                answer["backends"] = {n: found[n] if "failed" in found.get(n, {}) else why for n in names if n != PEAK}
            row["copies"] = answer.get("copies", row.get("copies", 0))
            row["beyond"] = max(answer.get("beyond", 0), row.get("beyond", 0))
            for name, found in answer["backends"].items():
                if not set(KINDS) & set(found):
                    ready[name] = process
                if name == PEAK:
                    row |= {PEAK_FLOPS: found["flops"]} if "flops" in found else {}
                    continue
                for what, value in found.items():
                    row.setdefault(what, {})[name] = value
        return ready

    def _time(self, ready: Mapping[str, str], clock: str, seconds: float, row: Row) -> bool:
        """In turns until a moment when nothing else ran, TRIES times at most; the last try counts. False where a
        backend failed, which the row then names."""
        for _ in range(TRIES):
            shares: list[float] = []
            batches = {
                name: functools.partial(self._time_batch, name, process, clock, shares)
                for name, process in ready.items()
            }
            try:
                times = timer.time_interleaved(batches, seconds)
            except worker.WorkerFailed as reason:
                row.setdefault("failed", {})[self._timed] = str(reason)
                return False
            had = statistics.mean(shares)
            if had >= timer.AT_REST or self.threads > 1 or self.device != "cpu":
                break
            if sum(map(sum, times.values())) > 2 * seconds:
                break  # too long to be tried again
        row |= {"rounds": len(next(iter(times.values()))), "share of core": round(had, 3)}
        row |= summary(times, clock, row)
        return True

    def _time_batch(self, name: str, process: str, clock: str, shares: list[float]) -> float:
        self._timed = name
        answer = self.demand(process, {"time": name, "clock": clock})
        shares.append(answer["share"])
        return float(answer["seconds"])


def summary(times: Mapping[str, list[float]], clock: str, row: Row) -> Row:
    """Quartiles of each backend's time, of its ratio to ours by rounds, and of the peak.

    The two times of a round lie next to each other, so a ratio of theirs knows nothing of a drift of the machine's.

    >>> found = summary({"torch": [2.0, 4.0], "matmul_grad": [1.0, 4.0]}, "call", {})
    >>> found["seconds"]["torch"]["median"], found["ratio"]["torch"]
    (3.0, {'low': 1.25, 'median': 1.5, 'high': 1.75})
    """
    prefix = "" if clock == CALL_CLOCK else f"{clock} "
    found: Row = {}
    if PEAK in times and PEAK not in row:
        rates = [row[PEAK_FLOPS] / seconds / 1e9 for seconds in times[PEAK]]
        found[PEAK] = timer.summary(rates)
    measured = {name: rounds for name, rounds in times.items() if name != PEAK}
    found[f"{prefix}seconds"] = {name: timer.summary(rounds) for name, rounds in measured.items()}
    if OURS in measured:
        found[f"{prefix}ratio"] = {
            name: timer.summary(timer.ratios(rounds, times[OURS])) for name, rounds in measured.items() if name != OURS
        }
    return found


def rows(
    planned: Sequence[Workload],
    selected: Sequence[Backend],
    seconds: float,
    pin: bool,
    left: Left = lambda: float("inf"),
    begun: Callable[[WorkerPool], None] = lambda _: None,
) -> Generator[Row, None, None]:
    """A row for each workload, in order, until the next would take longer than is ``left``.

    A workload during which the time ends has no row. The processes are started anew where the number of threads
    changes, and ``begun`` is called with each pool first.
    """
    for (device, threads), some in groups(planned).items():
        with WorkerPool(selected, device, threads, pin, left) as pool:
            begun(pool)
            for workload in some:
                if weight(workload, selected, seconds) > left():
                    return
                row = pool.measure(workload, seconds)
                if left() <= -GRACE:
                    return
                yield row


def weight(workload: Workload, selected: Sequence[Backend], seconds: float) -> float:
    """About how many seconds the comparison takes."""
    return workload.weight(seconds, backends=sum(backend.takes(workload) for backend in selected))


def groups(planned: Sequence[Workload]) -> dict[tuple[str, int], list[Workload]]:
    found: dict[tuple[str, int], list[Workload]] = {}
    for workload in planned:
        found.setdefault((workload.device, workload.threads), []).append(workload)
    return found


def measure(
    run: results.Record,
    planned: Sequence[Workload],
    selected: Sequence[Backend],
    console: Console,
    left: Left = lambda: float("inf"),
    name: str = results.BENCH,
) -> None:
    """Keep a row for each workload that has none, until the time is up; with it the ceilings of the machine."""
    todo, settings = run.left(planned), run.result["settings"]

    def begun(pool: WorkerPool) -> None:
        known = {(roof["device"], roof["threads"]) for roof in run.result["roofs"]}
        if not known:
            run.result["stamp"] = pool.facts() | run.result["stamp"]  # which a run that goes on is held against
        if (pool.device, pool.threads) not in known:
            run.result["roofs"].append(pool.roof())

    found = rows(todo, selected, settings["seconds"], settings["pinned"], left, begun)
    weights = [weight(workload, selected, settings["seconds"]) for workload in todo]
    with contextlib.closing(found), progress(console, name, len(todo), sum(weights)) as shown:
        for workload, expected, row in zip(todo, weights, found):
            run.keep(row)
            shown(workload.name, expected)
