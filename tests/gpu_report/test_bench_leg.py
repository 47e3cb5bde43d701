"""`matmul-grad bench --device cuda` on the GPU that is none: its rows, its time, its end."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from matmul_grad.bench import backends, calls, commands, roofline, run_files, runner, session, shapes, timer, workloads
from matmul_grad.bench.shapes import SETS

Bench = Callable[..., tuple[int, Any]]


@pytest.fixture
def bench(gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    class Here:
        def __init__(self, module: str, *arguments: str, environment: Any) -> None:
            assert "--device=cuda" in arguments and "--process=torch" in arguments
            self._player = session.BackendSession(gpu)

        def ask(self, task: Any, seconds: float | None = None) -> Any:
            return json.loads(json.dumps(self._player.answer(task)))

        def __enter__(self) -> Here:
            return self

        def __exit__(self, *error: Any) -> None:
            pass

    monkeypatch.setattr(runner, "Worker", Here)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(calls, "BATCH", 1e-4)
    monkeypatch.setattr(roofline, "LARGE", 64)
    monkeypatch.setattr(roofline, "LEAST", 1 << 20)
    monkeypatch.setattr(roofline, "PAST", 0)
    monkeypatch.setattr(run_files, "write", lambda result, place: None)

    def run(*options: str) -> tuple[int, Any]:
        status = commands.main(["--device=cuda", "--seconds=0.001", f"--out={tmp_path}", *options], "bench")
        (path,) = tmp_path.glob("bench*.json")
        return status, json.loads(path.read_text(encoding="utf-8"))

    return run


def test_device_time_and_call_time_stand_apart(bench: Bench, gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SETS, "small", ((33, 17, 65),))
    monkeypatch.setattr(timer, "MOST", 3)  # rounds, one for each of the times
    gpu.times = [[3e-6, 1e-6, 2e-6]]
    status, written = bench("--suite=small", "--dtype=f32", "--rivals=torch", "--pass=forward,step")
    assert status == 0 and written["stamp"]["driver_version"] == "1.2" and written["stamp"]["device"] == "cuda"
    for row in written["rows"]:
        device = row["device seconds"]["matmul_grad"]
        assert device["median"] == 2e-6 and 1e-6 <= device["low"] < 2e-6 < device["high"] <= 3e-6
        assert row["device ratio"]["torch"] == {"low": 1.0, "median": 1.0, "high": 1.0}
        assert row["seconds"]["matmul_grad"]["median"] != 2e-6 and row["ratio"]["torch"]["low"] > 0
        assert row["peak"]["median"] == pytest.approx(2 * 64**3 / 2e-6 / 1e9)
    assert written["roofs"][0]["device"] == "cuda"


def test_graphs_go_round_past_the_cache(bench: Bench, gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SETS, "small", ((128, 128, 128),))
    _, written = bench("--suite=small", "--dtype=f32", "--rivals=torch", "--pass=wgrad")
    (row,) = written["rows"]
    assert row["copies"] == -(-2 * gpu.l2 // (3 * 128 * 128 * 4)) == 11
    assert 11 in {len({id(call) for call in graph}) for graph in gpu.graphs}


def test_memory_is_the_gpus(bench: Bench, gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SETS, "small", ((16, 16, 16),))
    gpu.memory, gpu.peaks = [1000], [5000]
    _, written = bench("--suite=small", "--dtype=f32", "--rivals=torch", "--pass=dgrad")
    assert written["rows"][0]["peak bytes"] == {"torch": 4000, "matmul_grad": 4000}


def test_quick_suite_ends_in_five_minutes(bench: Bench, gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock on which a comparison takes 10 seconds: 27 fit, and the next run goes on behind them."""
    now = [0.0]
    measure = runner.WorkerPool.measure

    def slowly(self: Any, workload: Any, seconds: float) -> Any:
        now[0] += 10.0
        return measure(self, workload, seconds)

    monkeypatch.setattr(runner.WorkerPool, "measure", slowly)
    monkeypatch.setattr(commands, "monotonic", lambda: now[0])
    monkeypatch.setattr(workloads, "QUICK_GPU", tuple((n, n, n) for n in (8, 16, 24, 32)))
    monkeypatch.setattr(shapes, "QUICK_GPU", ())
    status, written = bench("--rivals=torch")
    assert status == 0 and now[0] == 280.0 and not written["whole"]
    assert (len(written["rows"]), written["planned"]) == (27, 4 * 2 * 6)
    status, written = bench("--rivals=torch", "--resume")
    assert status == 0 and len(written["rows"]) == 48 and written["whole"]


def test_packages_of_a_gpu_take_part_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: object())
    selected = backends.chosen(backends.NAMES, "cuda")
    names = [backend.name for backend in selected]
    assert names == ["torch", "matmul_grad", "flag_gems", "triton tutorial", "quack", "torch.compile"]
    planned, _ = workloads.plan("quick", "cuda", ["bf16", "f32"], workloads.PASSES, [1], 1e5)
    takes = {backend.name: sum(backend.takes(workload) for workload in planned) for backend in selected}
    assert takes == {
        "torch": 96, "matmul_grad": 96, "flag_gems": 48, "triton tutorial": 24, "quack": 24, "torch.compile": 2
    }  # fmt: skip


def test_tidy_after_an_error_that_stays(bench: Bench, gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A broken context: the comparison failed, the run says so."""
    monkeypatch.setitem(SETS, "small", ((16, 16, 16),))
    ready = session.BackendSession._make_ready

    def breaking(self: Any, *arguments: Any) -> Any:
        gpu.broken = True
        try:
            return ready(self, *arguments)
        finally:
            gpu.broken = False

    monkeypatch.setattr(session.BackendSession, "_make_ready", breaking)
    status, written = bench("--suite=small", "--dtype=f32", "--rivals=torch", "--pass=dgrad")
    assert status == 1
    assert "illegal memory access" in written["rows"][0]["failed"]["matmul_grad"]
