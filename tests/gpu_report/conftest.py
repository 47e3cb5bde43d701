"""A GPU that is none: products run on the CPU, device times and memory are what a test says."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from matmul_grad.bench import gpu_worker, process
from matmul_grad.bench.devices import Batch, Call, Gpu


class FakeGpu(Gpu):
    """``times``: of each graph in the order of recording, seconds a call, round by round and over again."""

    device = "cpu"

    def __init__(self) -> None:
        self.times: list[list[float]] = [[2e-6], [1e-6]]
        self.memory = [0]  # what allocated() says, one call after the other; the last one stays
        self.peaks = [0]
        self.free = 1 << 40
        self.l2 = 1 << 20
        self.graphs: list[Sequence[Call]] = []
        self.turns: list[int] = []
        self.waits = 0
        self.broken = False

    def ready(self) -> None:
        pass

    def wait(self) -> None:
        self.waits += 1
        if self.broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def tidy(self) -> None:
        self.wait()

    def cache_bytes(self) -> int:
        return self.l2

    def free_bytes(self) -> int:
        return self.free

    def seconds_a_call(self, call: Call, calls: int = 3) -> float:
        call()
        return 1e-3

    def graph(self, calls: Sequence[Call]) -> Batch:
        mine, times = len(self.graphs), self.times_of(calls)
        self.graphs.append(calls)

        def batch() -> float:
            self.turns.append(mine)
            return times[(self.turns.count(mine) - 1) % len(times)]

        return batch

    def times_of(self, calls: Sequence[Call]) -> list[float]:
        return self.times[len(self.graphs) % len(self.times)]

    def allocated(self) -> int:
        return self.memory.pop(0) if len(self.memory) > 1 else self.memory[0]

    def peak(self, call: Call) -> int:
        call()
        return self.peaks.pop(0) if len(self.peaks) > 1 else self.peaks[0]

    def facts(self) -> dict[str, str]:
        return {"GPU": "NVIDIA Fake 9000", "compute capability": "9.0", "driver_version": "1.2"}


class Launcher:
    """In place of ``process.run``: scripted by step, or the child itself in this process on the fake GPU."""

    def __init__(self, gpu: FakeGpu) -> None:
        self.gpu = gpu
        self.commands: list[list[str]] = []
        self.environments: list[Mapping[str, str]] = []
        self.scripts: dict[str, list[Callable[[Callable[[str], None]], process.ExitStatus]]] = {}

    def __call__(
        self,
        command: Sequence[str],
        heard: Callable[[str], None],
        *,
        seconds: float,
        silence: float = float("inf"),
        environment: Mapping[str, str] | None = None,
        folder: Path | None = None,
    ) -> process.ExitStatus:
        self.commands.append(list(command))
        self.environments.append(environment or {})
        name = command[command.index(gpu_worker.__name__) + 1] if gpu_worker.__name__ in command else "pytest"
        if self.scripts.get(name):
            return self.scripts[name].pop(0)(heard)
        if name == "pytest":
            return process.ExitStatus(0, "")
        start = next(int(part.split("=")[1]) for part in command if part.startswith("--start="))
        status = gpu_worker.serve(
            gpu_worker.tasks(name), self.gpu, start, 1e9, lambda message: heard(json.dumps(message))
        )
        return process.ExitStatus(status, "")


def says(
    *messages: Any, status: int | None = 0, said: str = ""
) -> Callable[[Callable[[str], None]], process.ExitStatus]:
    """A process that says these lines and ends."""

    def act(heard: Callable[[str], None]) -> process.ExitStatus:
        for message in messages:
            if isinstance(message, BaseException):
                raise message
            heard(message if isinstance(message, str) else json.dumps(message))
        return process.ExitStatus(status, said)

    return act


@pytest.fixture
def gpu() -> FakeGpu:
    return FakeGpu()


@pytest.fixture
def launcher(gpu: FakeGpu) -> Launcher:
    return Launcher(gpu)


@pytest.fixture(name="says")
def says_fixture() -> Callable[..., Any]:
    return says
