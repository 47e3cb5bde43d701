"""This package beside NumPy's OpenBLAS, each in a process of its own, which alternate.

In one process their two pools of threads would fight for the cores: each keeps its threads awake for a moment after a
product, in the hope of another. So the turns lie REST apart, and one process waits while the other works.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
from collections.abc import Callable
from time import monotonic, sleep
from typing import Any, NamedTuple

import numpy
import torch

from .. import strict
from . import baseline, ratio_correctness, ratio_worker, timer, worker
from .ratio_workloads import RatioWorkload

NUMPY = "numpy"
NAMES = (NUMPY, baseline.OURS)
REST = 0.1  # seconds before a turn: idle threads of OpenBLAS spin for 2²⁶ cycles before they sleep, GNU's OpenMP less
LONGER = 4  # times as long a comparison as with torch, most of which is rest
BATCH = 5 * timer.BATCH  # the caches are the other's when a turn begins, so it has a call to warm up, and lasts


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--backend", choices=NAMES, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--pin", action="store_true")
    command = parser.parse_args()
    if command.pin:
        worker.stay_on_one_core()
    torch.set_num_threads(command.threads if command.backend == baseline.OURS else 1)
    with strict():
        worker.serve(BackendSession(command.backend).answer)


class Turn(NamedTuple):
    """Whose turn it was, and when, on the clock that all processes of a machine share."""

    name: str
    start: float
    end: float


class Match:
    """The two processes, and every turn that they took."""

    def __init__(self, threads: int, seconds: float, pin: bool) -> None:
        self.turns: list[Turn] = []
        self._threads, self._seconds = threads, seconds
        options = [f"--threads={threads}", *["--pin"] * pin]
        self._stack = contextlib.ExitStack()
        self._workers = {
            name: self._stack.enter_context(
                worker.Worker(
                    "matmul_grad.bench.ratio_openblas",
                    f"--backend={name}",
                    *options,
                    environment={"OPENBLAS_NUM_THREADS": str(threads)},
                )
            )
            for name in NAMES
        }

    def __enter__(self) -> Match:
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def compare(self, workload: RatioWorkload) -> dict[str, Any]:
        for name in NAMES:
            self._take(name, {"prepare": vars(workload)})
        shares: list[float] = []

        def batch(name: str) -> float:
            answer = self._take(name, {})
            shares.append(answer["share"])
            return answer["seconds"]

        times = timer.time_interleaved({name: functools.partial(batch, name) for name in NAMES}, LONGER * self._seconds)
        return ratio_worker.row(workload, self._threads, times, NUMPY, sum(shares) / len(shares))

    def _take(self, name: str, task: worker.Message) -> worker.Message:
        sleep(REST)
        answer = self._workers[name].ask(task)
        self.turns.append(Turn(name, answer["start"], answer["end"]))
        return answer


class BackendSession:
    """In its process: the product at hand, and how many calls make a batch of it."""

    def __init__(self, backend: str) -> None:
        self._backend = backend
        self._call: Callable[[], object] = timer.nothing
        self._calls = 1

    def answer(self, task: worker.Message) -> worker.Message:
        start, share = monotonic(), timer.share_of_core()
        if "prepare" in task:
            self._prepare(RatioWorkload(**task["prepare"]))
            return {"start": start, "end": monotonic()}
        self._call()
        seconds = timer.batch(self._call, self._calls, timer.nothing)
        return {"seconds": seconds, "share": share(), "start": start, "end": monotonic()}

    def _prepare(self, workload: RatioWorkload) -> None:
        if self._backend == NUMPY:
            left, other = (operand.numpy() for operand in ratio_correctness.assert_product(by_numpy, workload.case))
            self._call = lambda: left @ other
        else:
            ours = baseline.IMPLEMENTATIONS[baseline.OURS]
            x, y = ratio_correctness.assert_product(ours, workload.case)
            self._call = lambda: ours(x, y)
        self._call()
        self._calls = max(1, round(BATCH / timer.batch(self._call, 1, timer.nothing)))


def by_numpy(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(a.numpy() @ b.numpy())


def library() -> str:
    """What NumPy multiplies with."""
    blas = numpy.show_config(mode="dicts")["Build Dependencies"]["blas"]
    return f"numpy {numpy.__version__}, {blas['name']} {blas['version']}"


if __name__ == "__main__":
    main()
