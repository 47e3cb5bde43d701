"""Cell by cell: every contender made ready and proven right in its process, then timed in turns. Rows come out.

Processes whose libraries have threads of their own take turns REST apart: idle threads stay awake for a moment in the
hope of more, and would take the cores from whoever is next.
"""

from __future__ import annotations

import contextlib
import functools
import statistics
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import asdict
from time import sleep
from typing import Any

from . import baseline, timer, worker
from . import process as processes
from .backends import PEAK, TORCHS, Contender
from .session import CALL, DEVICE
from .worker import Worker
from .workloads import Cell

REST = 0.1  # idle threads of OpenBLAS spin for 2²⁶ cycles before they sleep, GNU's OpenMP less
TRIES = 3  # of a comparison on one thread, for a moment when nothing else runs
PEAK_FLOPS = "flops of a call of the peak"
SILENCE = 600.0  # seconds without an answer: a kernel that never ends
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
        **processes.paths(),
    }


class Ensemble:
    """The processes of the contenders, with one number of threads; one that ended is begun again when it is needed."""

    def __init__(
        self,
        members: Sequence[Contender],
        device: str,
        threads: int,
        pin: bool,
        left: Left = lambda: float("inf"),
    ) -> None:
        self.device, self.threads = device, threads
        self._members, self._pin, self._left = members, pin, left
        self._players: dict[str, Worker] = {}
        self._stack = contextlib.ExitStack()
        self._last = ""  # whose turn it was

    def __enter__(self) -> Ensemble:
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def ask(self, process: str, task: worker.Message) -> worker.Message:
        if process not in self._players:
            options = [f"--process={process}", f"--device={self.device}", f"--threads={self.threads}"]
            player = Worker(
                f"{__package__}.session", *options, *["--pin"] * self._pin, environment=environment(self.threads)
            )
            self._players[process] = self._stack.enter_context(player)
        if self.threads > 1 and process != self._last:
            sleep(REST)
        self._last = process
        try:
            return self._players[process].ask(task, min(SILENCE, max(0.0, self._left()) + GRACE))
        except worker.Ended:
            del self._players[process]
            raise

    def roof(self) -> Row:
        """The bandwidth of memory, on this number of threads."""
        gbs = self.ask(TORCHS, {"bandwidth": True})
        return {"device": self.device, "threads": self.threads, "GB/s": gbs}

    def facts(self) -> dict[str, str]:
        """What the device says of itself."""
        return self.ask(TORCHS, {"facts": True})["facts"]

    def measure(self, cell: Cell, seconds: float) -> Row:
        """The row of a cell; ``seconds`` for all contenders together, more where they are slow."""
        row: Row = {**asdict(cell), "flops": cell.flops, "bytes": cell.moved}
        ready = self._prepare(cell, row)
        clocks = (DEVICE, CALL) if self.device != "cpu" else (CALL,)
        for clock in clocks if ready else ():
            self._time(ready, clock, seconds / len(clocks), row)
        row.pop(PEAK_FLOPS, None)
        return row

    def _prepare(self, cell: Cell, row: Row) -> dict[str, str]:
        """Who can be timed, and in which process; what there is to say of the others stands in the row then."""
        ready: dict[str, str] = {}
        mine = [member for member in self._members if member.takes(cell)]
        for process in dict.fromkeys(member.process for member in mine):
            names = [member.name for member in mine if member.process == process]
            names += [PEAK] if process == TORCHS else []
            try:
                answer = self.ask(process, {"prepare": asdict(cell), "names": names})
            except worker.Failed as reason:
                answer = {"failed": str(reason)}
            if "contenders" not in answer:  # it is the cell that it cannot do
                (kind, why), names = next(iter(answer.items())), [name for name in names if name != PEAK]
                answer = {"contenders": {name: {"wrong" if kind == "unfit" else kind: why} for name in names}}
            row["copies"] = answer.get("copies", row.get("copies", 0))
            row["beyond"] = max(answer.get("beyond", 0), row.get("beyond", 0))
            for name, found in answer["contenders"].items():
                if not {"wrong", "failed", "skipped"} & set(found):
                    ready[name] = process
                if name == PEAK:
                    row[PEAK_FLOPS] = found["flops"]
                    continue
                for what, value in found.items():
                    row.setdefault(what, {})[name] = value
        return ready

    def _time(self, ready: Mapping[str, str], clock: str, seconds: float, row: Row) -> None:
        """In turns until a moment when nothing else ran, TRIES times at most; the last try counts."""
        for _ in range(TRIES):
            shares: list[float] = []
            batches = {
                name: functools.partial(self._turn, name, process, clock, shares) for name, process in ready.items()
            }
            try:
                times = timer.time_interleaved(batches, seconds)
            except worker.Failed as reason:
                row.setdefault("failed", {})[self._last] = str(reason)
                return
            had = statistics.mean(shares)
            if had >= timer.AT_REST or self.threads > 1 or self.device != "cpu":
                break
            if sum(map(sum, times.values())) > 2 * seconds:
                break  # too long to be tried again
        row |= {"rounds": len(next(iter(times.values()))), "share of core": round(had, 3)}
        row |= summary(times, clock, row)

    def _turn(self, name: str, process: str, clock: str, shares: list[float]) -> float:
        answer = self.ask(process, {"time": name, "clock": clock})
        shares.append(answer["share"])
        return float(answer["seconds"])


def summary(times: Mapping[str, list[float]], clock: str, row: Row) -> Row:
    """Quartiles of each contender's time, of its ratio to ours by rounds, and of the peak.

    The two times of a round lie next to each other, so a ratio of theirs knows nothing of a drift of the machine's.

    >>> found = summary({"torch": [2.0, 4.0], "matmul_grad": [1.0, 4.0]}, "call", {})
    >>> found["seconds"]["torch"]["median"], found["ratio"]["torch"]
    (3.0, {'low': 1.25, 'median': 1.5, 'high': 1.75})
    """
    prefix = "" if clock == CALL else f"{clock} "
    found: Row = {}
    if PEAK in times and PEAK not in row:
        rates = [row[PEAK_FLOPS] / seconds / 1e9 for seconds in times[PEAK]]
        found[PEAK] = timer.summary(rates)
    measured = {name: rounds for name, rounds in times.items() if name != PEAK}
    found[f"{prefix}seconds"] = {name: timer.summary(rounds) for name, rounds in measured.items()}
    if baseline.OURS in measured:
        found[f"{prefix}ratio"] = {
            name: timer.summary([theirs / ours for theirs, ours in zip(rounds, times[baseline.OURS], strict=True)])
            for name, rounds in measured.items()
            if name != baseline.OURS
        }
    return found


def rows(
    cells: Sequence[Cell],
    members: Sequence[Contender],
    seconds: float,
    pin: bool,
    left: Left = lambda: float("inf"),
    begun: Callable[[Ensemble], None] = lambda _: None,
) -> Generator[Row, None, None]:
    """A row for each cell in their order until the next takes longer than is ``left``; a cell that it ends in has none.

    The processes are begun anew where the number of threads changes, and ``begun`` is called with each ensemble first.
    """
    for (device, threads), some in groups(cells).items():
        with Ensemble(members, device, threads, pin, left) as ensemble:
            begun(ensemble)
            for cell in some:
                if cell.weight(seconds, contenders=sum(member.takes(cell) for member in members)) > left():
                    return
                row = ensemble.measure(cell, seconds)
                if left() <= -GRACE:
                    return
                yield row


def groups(cells: Sequence[Cell]) -> dict[tuple[str, int], list[Cell]]:
    found: dict[tuple[str, int], list[Cell]] = {}
    for cell in cells:
        found.setdefault((cell.device, cell.threads), []).append(cell)
    return found
