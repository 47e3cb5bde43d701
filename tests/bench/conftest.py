"""The bench without its processes: the sessions answer here, on the CPU or on a GPU that is none."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from matmul_grad import machine
from matmul_grad.bench import (
    backends,
    commands,
    gpu_tasks,
    html,
    memory,
    results,
    roofline,
    runner,
    session,
    stages,
    timer,
)
from matmul_grad.bench.backends import OfTorch
from matmul_grad.bench.devices import Batch, Call, Cpu, Gpu
from matmul_grad.bench.roofline import Device
from matmul_grad.bench.shapes import SETS, Shape


class Here:
    """In place of ``Worker``: the session itself; tasks and answers pass through JSON as they do between processes."""

    device: Device = Cpu()
    begun: ClassVar[list[tuple[tuple[str, ...], dict[str, str], Sequence[str]]]] = []
    before: ClassVar[Callable[[Any], None]] = staticmethod(lambda task: None)  # what a test does, or raises, at a task

    def __init__(
        self, module: str, *arguments: str, environment: Mapping[str, str], wrapper: Sequence[str] = ()
    ) -> None:
        type(self).begun.append((arguments, dict(environment), wrapper))
        self._session = session.BackendSession(type(self).device)

    def ask(self, task: Any, seconds: float | None = None) -> Any:
        type(self).before(task)
        return json.loads(json.dumps(self._session.answer(json.loads(json.dumps(task)))))

    def end(self) -> None:
        pass

    def __enter__(self) -> Here:
        return self

    def __exit__(self, *error: Any) -> None:
        pass


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Here]]:
    """Sessions in this process, on one thread, with little to time and little memory to measure."""
    monkeypatch.setattr(Here, "begun", [])
    monkeypatch.setattr(runner, "Worker", Here)
    monkeypatch.setattr(runner, "TRIES", 1)
    monkeypatch.setattr(timer, "BATCH", 1e-4)
    monkeypatch.setattr(roofline, "LEAST", 1 << 20)
    monkeypatch.setattr(roofline, "PAST", 0)
    monkeypatch.setattr(roofline, "SECONDS", 0.01)
    monkeypatch.setattr(memory, "of_call", lambda name, workload: {"peak bytes": workload.given})
    monkeypatch.setattr(Cpu, "cache_bytes", lambda self: 1 << 20)
    with timer.threads(1):
        yield Here


class FakeGpu(Gpu):
    """``times``: of each graph in the order of recording, seconds a call, round by round and over again."""

    device = "cpu"

    def __init__(self) -> None:
        self.times: list[list[float]] = [[2e-6], [1e-6]]
        self.memory = [0]  # what allocated() returns, one call after the other; the last one stays
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

    def clocks(self) -> dict[str, str]:
        return {"clocks.sm": "1755 MHz", "power.draw": "612.5 W", "temperature.gpu": "61"}

    def facts(self) -> dict[str, str]:
        return {"GPU": "NVIDIA Fake 9000", "compute capability": "9.0", "driver_version": "1.2"}


@pytest.fixture
def gpu(here: type[Here], monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    """What the sessions run on; torch and this package believe in it."""
    gpu = FakeGpu()
    monkeypatch.setattr(Here, "device", gpu)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(machine, "gpus", lambda: "NVIDIA Fake 9000 (sm_90)")
    monkeypatch.setattr(roofline, "LARGE", 64)
    monkeypatch.setattr(stages, "SECONDS", 0.0)
    monkeypatch.setattr(results, "checkout", lambda: None)
    for name in ("LAUNCH_SECONDS", "FIRST_SECONDS", "FINAL_SECONDS"):
        monkeypatch.setattr(gpu_tasks, name, 0.0)
    monkeypatch.setattr(gpu_tasks, "QUEUE", 3)
    gpu_tasks.drawn.cache_clear()
    return gpu


class Clock:
    """In place of perf_counter: each reading takes 10 µs, and ``now`` goes on by what a test adds to it."""

    now = 0.0

    def read(self) -> float:
        self.now += 1e-5
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Time that no other process can take from this one."""
    clock = Clock()
    monkeypatch.setattr(timer, "perf_counter", clock.read)
    return clock


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Any], None]:
    """Another product in place of torch's or of this package's."""

    def do(name: str, mm: Any) -> None:
        monkeypatch.setattr(backends, "IMPLEMENTATIONS", {**backends.IMPLEMENTATIONS, name: mm})

    return do


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, here: type[Here]) -> Callable[..., tuple[int, Any]]:
    """Run the command on some shapes: its exit code, and its rows; its pictures where they are wanted."""
    write = html.write_all

    def run(shapes: tuple[Shape, ...], *options: str, out: str = "out", drawn: bool = False) -> tuple[int, Any]:
        monkeypatch.setattr(html, "write_all", write if drawn else lambda result, place: None)
        monkeypatch.setitem(SETS, "small", shapes)
        fixed = ["--suite=small", "--seconds=0.001", "--rivals=torch", f"--out={tmp_path / out}", "--no-pin"]
        status = commands.main([*fixed, *options], "bench")
        written = next((tmp_path / out).glob("bench*.json"), None)
        return status, json.loads(written.read_text(encoding="utf-8")) if written else None

    return run


@pytest.fixture
def library() -> Callable[..., OfTorch]:
    return lambda name: backends.BY_NAME[name].library()


def about(value: float) -> dict[str, float]:
    return {"low": 0.95 * value, "median": value, "high": 1.05 * value}


def row(
    ratio: float = 1.25, product: str = "forward", dtype: str = "f32", layout: str = "NN", n: int = 64, **more: Any
) -> dict[str, Any]:
    """One that was measured on n × n × n: ours takes a second a GFLOP, torch ``ratio`` times that."""
    names = {"torch": ratio, "matmul_grad": 1.0}
    return {
        "product": product, "dtype": dtype, "layout": layout, "m": n, "n": n, "k": n, "threads": 1, "device": "cpu",
        "flops": 2 * n**3, "bytes": 12 * n * n, "copies": 1 if n <= 48 else 9, "beyond": 1 << 28, "rounds": 5,
        "share of core": 1.0, "peak": about(2.0),
        "seconds": {name: about(2e-9 * n**3 * slower) for name, slower in names.items()},
        "ratio": {"torch": about(ratio)},
        "first": dict.fromkeys(names, 0.01), "peak bytes": dict.fromkeys(names, 4 * n * n),
        "bits": {"torch": "aa", "matmul_grad": "bb"}, **more,
    }  # fmt: skip


def result(rows: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    stamp = {
        "date": "2026-01-02", "time": "12:00:00", "CPU": "Some <CPU>, 2 cores", "instruction set": "avx2 of avx2",
        "versions": "torch 1", "GPU": "none", "device": "cpu", "rivals": "torch 1",
    }  # fmt: skip
    roofs = [{"device": "cpu", "threads": 1, "GB/s": {"how": "copy", "low": 9.0, "median": 10.0, "high": 11.0}}]
    settings = {"suite": "small", "device": "cpu", "max gflop": 40.0}
    return {
        "schema": 1, "kind": "bench", "stamp": stamp, "settings": settings, "whole": True, "protocol": "turns",
        "planned": len(rows), "larger": 0, "roofs": roofs, "rows": rows, **more,
    }  # fmt: skip


@pytest.fixture(name="row", scope="session")
def row_fixture() -> Callable[..., dict[str, Any]]:
    return row


@pytest.fixture(name="result", scope="session")
def result_fixture() -> Callable[..., dict[str, Any]]:
    return result


@pytest.fixture
def ratio_row() -> Callable[..., dict[str, Any]]:
    """Without a peak, but where one is given."""

    def make(value: float, dtype: str = "f32", layout: str = "NN", **more: Any) -> dict[str, Any]:
        found = row(value, more.pop("product", "forward"), dtype, layout, more.pop("n", 64))
        del found["peak"]
        return found | more

    return make
