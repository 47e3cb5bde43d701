"""On the GPU that is none: `bench --device cuda`, what a row is made of, what is refused, the plans of `gpu-report`."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from dtypes import ACCELERATED

import matmul_grad
from matmul_grad.bench import (
    backends,
    commands,
    gpu_calls,
    gpu_tasks,
    html,
    runner,
    sanitizer,
    session,
    shapes,
    targets,
    timer,
    worker,
    workloads,
)
from matmul_grad.bench.shapes import SETS
from matmul_grad.bench.workloads import INVARIANT, Workload, on_gpu

Bench = Callable[..., tuple[int, Any]]


@pytest.fixture
def bench(gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.setattr(html, "write_all", lambda result, place: None)

    def run(*options: str) -> tuple[int, Any]:
        options = ("--device=cuda", "--seconds=0.001", "--rivals=torch", f"--out={tmp_path}", *options)
        status = commands.main(options, "bench")
        (path,) = tmp_path.glob("bench*.json")
        return status, json.loads(path.read_text(encoding="utf-8"))

    return run


@pytest.fixture
def measure(gpu: Any) -> Callable[[Workload], Any]:
    """A row of torch and this package."""

    def run(workload: Workload) -> Any:
        with runner.WorkerPool(backends.chosen(["torch"], "cuda"), "cuda", 1, False) as pool:
            return pool.measure(workload, 0.0)

    return run


def test_device_time_and_call_time_stand_apart(bench: Bench, gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SETS, "small", ((33, 17, 65),))
    monkeypatch.setattr(timer, "MOST", 3)  # rounds, one for each of the times
    gpu.times = [[3e-6, 1e-6, 2e-6]]
    status, written = bench("--suite=small", "--dtype=f32", "--pass=forward,step")
    assert status == 0 and written["stamp"]["driver_version"] == "1.2" and written["stamp"]["device"] == "cuda"
    for row in written["rows"]:
        device = row["device seconds"]["matmul_grad"]
        assert device["median"] == 2e-6 and 1e-6 <= device["low"] < 2e-6 < device["high"] <= 3e-6
        assert row["device ratio"]["torch"] == {"low": 1.0, "median": 1.0, "high": 1.0}
        assert row["seconds"]["matmul_grad"]["median"] != 2e-6 and row["ratio"]["torch"]["low"] > 0
        assert row["peak"]["median"] == pytest.approx(2 * 64**3 / 2e-6 / 1e9)
    assert written["roofs"][0]["device"] == "cuda"


def test_graphs_go_round_past_the_cache(measure: Any, gpu: Any) -> None:
    row = measure(on_gpu("wgrad", "f32", (128, 128, 128)))
    assert row["copies"] == -(-2 * gpu.l2 // (3 * 128 * 128 * 4)) == 11
    assert 11 in {len({id(call) for call in graph}) for graph in gpu.graphs}
    assert gpu.turns[:6] == [0, 1, 2, 1, 2, 0]  # torch, this package and the peak alternate


def test_memory_tells_the_peak_from_what_is_kept(measure: Any, gpu: Any) -> None:
    gpu.memory, gpu.peaks = [1000, 1032, 1032, 1040, 1040, 1040], [1632, 1540]
    row = measure(on_gpu("step", "f32", (9, 8, 7)))
    assert row["kept bytes"] == {"torch": 32, "matmul_grad": 8}
    assert row["peak bytes"] == {"torch": 592, "matmul_grad": 500}


def test_quick_suite_ends_in_five_minutes(bench: Bench, gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock on which a comparison takes 10 seconds: 27 fit, and the next run goes on behind them."""
    now = [0.0]
    measure = runner.WorkerPool.measure

    def slowly(self: Any, workload: Any, seconds: float) -> Any:
        now[0] += 10.0
        return measure(self, workload, seconds)

    monkeypatch.setattr(runner.WorkerPool, "measure", slowly)
    monkeypatch.setattr(commands, "monotonic", lambda: now[0])
    monkeypatch.setattr(shapes, "QUICK_GPU", tuple((n, n, n) for n in (8, 16, 24, 32)))
    status, written = bench()
    assert status == 0 and now[0] == 280.0 and not written["whole"]
    assert (len(written["rows"]), written["planned"]) == (27, 4 * 2 * 6)
    status, written = bench("--resume")
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
    special = [workload for workload in workloads.gpu_targets() if (workload.mode, workload.batch) != ("", 1)]
    assert special and not any(backend.takes(special[0]) for backend in selected[2:])


def test_error_that_breaks_the_context_ends_the_process(
    measure: Any, here: Any, gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready = session.BackendSession._make_ready

    def breaking(self: Any, name: str, *arguments: Any) -> Any:
        gpu.broken = name == "matmul_grad"
        return ready(self, name, *arguments)

    monkeypatch.setattr(session.BackendSession, "_make_ready", breaking)
    row = measure(on_gpu("dgrad", "f32", (16, 16, 16)))
    assert "illegal memory access" in row["failed"]["matmul_grad"] and "Traceback" in row["log"]["matmul_grad"]
    assert "broke" in row["skipped"]["torch"] and "seconds" not in row
    gpu.broken = False
    monkeypatch.setattr(session.BackendSession, "_make_ready", ready)
    assert "failed" not in measure(on_gpu("dgrad", "f32", (16, 16, 16))) and len(here.begun) == 2


@pytest.mark.parametrize("clock", ["device", "call"])
def test_failure_while_timed_is_the_backends(
    clock: str, measure: Any, here: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(task: Any) -> None:
        if (task.get("time"), task.get("clock")) == ("matmul_grad", clock):
            raise worker.WorkerExited("killed by SIGSEGV")

    monkeypatch.setattr(here, "before", die)
    row = measure(on_gpu("forward", "f32", (16, 16, 16)))
    assert row["failed"] == {"matmul_grad": "killed by SIGSEGV"} and "seconds" not in row
    assert ("device seconds" in row) == (clock == "call")


@pytest.mark.parametrize(
    "task", [{"bandwidth": True}, {"facts": True}, {"time": "torch", "clock": "call"}, {}], ids=str
)
def test_whatever_breaks_the_context_is_answered_as_broken(
    task: Any, gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare = {"prepare": asdict(on_gpu("forward", "f32", (8, 8, 8))), "names": ["torch"]}
    backend_session = session.BackendSession(gpu)
    backend_session.answer(prepare)
    monkeypatch.setattr(session.roofline, "bandwidth", lambda device: device.wait())
    monkeypatch.setattr(gpu, "facts", gpu.wait)
    gpu.broken = True
    found = backend_session.answer(task or prepare)
    assert found["broken"] and "illegal memory access" in found["failed"]


@pytest.mark.parametrize("kind", ["wrong", "skipped", "failed"])
def test_answer_that_is_demanded_is_none_of_failure(kind: str, gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with runner.WorkerPool((), "cuda", 1, False) as pool:
        monkeypatch.setattr(pool, "ask", lambda process, task: {kind: "out of device memory"})
        with pytest.raises(worker.WorkerFailed, match="out of device memory"):
            pool.roof()


@pytest.mark.parametrize("product", ["forward", "dgrad", "wgrad"])
def test_batches(product: str, measure: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    workload = on_gpu(product, "f32", (5, 6, 7), batch=3)
    assert workload.name == f"{product}-f32-NN-3x5x6x7-cuda" and set(measure(workload)["seconds"]) == {
        "torch", "matmul_grad"
    }  # fmt: skip

    def wrong_at_the_end(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        c = torch.bmm(a, b)
        c[-1, -1, -1] += 1
        return c

    monkeypatch.setattr(backends.api, "bmm", wrong_at_the_end)
    assert "2 of the batch: on integers 1 of " in measure(workload)["wrong"]["matmul_grad"]


@contextlib.contextmanager
def mode(inside: list[bool], *, batch_invariant: bool) -> Iterator[None]:
    inside.append(batch_invariant)
    yield
    inside.append(False)


def test_batch_invariant_mode(measure: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is on while the workload is prepared and timed; rows whose bits change with m are wrong."""
    inside: list[bool] = []
    workload = on_gpu("step", "f32", (40, 8, 300), mode=INVARIANT)
    monkeypatch.setattr(matmul_grad, "deterministic", functools.partial(mode, inside))
    monkeypatch.setattr(matmul_grad, "mm", lambda a, b: (a.unsqueeze(-1) * b).sum(dim=1))
    assert "seconds" in measure(workload) and inside == [True]
    monkeypatch.setattr(matmul_grad, "mm", lambda a, b: torch.mm(a, b) * (1 + 2**-23 * (len(a) == 39)))
    assert "39 of 39 rows have other bits than with m = 40" in measure(workload)["wrong"]["matmul_grad"]


def test_float32_is_ieee_whatever_was_set(gpu: Any) -> None:
    setting: Any = torch.backends.cuda.matmul
    before = setting.fp32_precision
    try:
        setting.fp32_precision = "tf32"
        gpu.multiply_in_ieee()
        assert setting.fp32_precision == "ieee"
    finally:
        setting.fp32_precision = before


def test_precision_is_the_launchers(measure: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(gpu_calls, "mm", lambda precision: asked.append(precision) or torch.mm)
    assert set(measure(on_gpu("forward", "f32", (9, 8, 7), "tf32x3"))["seconds"]) == {"torch", "matmul_grad"}
    assert set(asked) == {"tf32x3"}


def test_launch_cost_never_waits_inside(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    monkeypatch.setattr(gpu, "wait", lambda: events.append("wait"))
    assert gpu_tasks.host_batch(lambda: events.append("call"), gpu)() > 0
    assert events == ["call"] * 3 + ["wait"] + ["call"] * gpu_tasks.QUEUE + ["wait"]
    row = gpu_tasks.launch_cost(gpu, 8, "f32")
    assert row["rounds"] >= 3 and "recipes" not in row
    assert {"torch.mm", "matmul_grad.mm", "torch.ops.matmul_grad.mm"} < set(row["host seconds"])


@pytest.mark.parametrize(
    ("refused", "status", "found"),
    [(0, "", ""), (2, "", "wrong: 2 of 7 recipes"), (0, "no libcuda", "skipped: no libcuda")],
)
def test_native_launches_tell_what_became_of_their_recipes(
    refused: int, status: str, found: str, gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_tasks.cuda, "status", lambda: status)
    monkeypatch.setattr(gpu_tasks.launch_table, "counts", lambda: (7, refused))
    monkeypatch.setenv(gpu_tasks.cuda.VARIABLE, "1")
    row = session.BackendSession(gpu).answer({"do": "launch", "n": 8, "dtype": "f32"})
    kind, _, why = found.partition(": ")
    assert row[kind].startswith(why) if found else (row["recipes"], row["refused"]) == (7, 0)


@pytest.mark.parametrize(
    ("error", "answer"),
    [
        (gpu_tasks.IncorrectResult("off by one"), {"wrong": "off by one"}),
        (backends.Skipped("too large"), {"skipped": "too large"}),
        (torch.cuda.OutOfMemoryError("tried to allocate"), {"skipped": "out of device memory"}),
        (ValueError("first\nsecond"), {"failed": "ValueError: first"}),
        (ValueError(), {"failed": "ValueError: no message"}),
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("broken", [False, True])
def test_task_that_raises_is_an_answer(
    error: Exception, answer: Any, broken: bool, gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def task(gpu: Any) -> Any:
        gpu.broken = broken
        raise error

    monkeypatch.setitem(gpu_tasks.TASKS, "x", task)
    found = session.BackendSession(gpu).answer({"do": "x"})
    assert ("Traceback" in found.pop("log", "")) == ("failed" in answer)
    assert found == answer | ({"broken": True} if broken and "failed" in answer else {})


CONVOLUTIONS = {
    "forward": lambda x, w, bias, *shared: torch.conv2d(x, w, bias, *shared),
    "dgrad": lambda grad, w, size, *shared: torch.nn.grad.conv2d_input(size, w, grad, *shared),
    "wgrad": lambda grad, x, size, *shared: torch.nn.grad.conv2d_weight(x, size, grad, *shared),
}


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_calls, "convolutions", lambda: CONVOLUTIONS)
    monkeypatch.setattr(gpu_calls, "mm", lambda precision: torch.mm)
    monkeypatch.setattr(gpu_calls, "mm_backward", lambda grad, a, b: (grad @ b.mT, a.mT @ grad))


def test_small_set_meets_every_dtype_layout_and_path(gpu: Any, on_cpu: None) -> None:
    names = list(sanitizer.cases())
    for name in names:
        if "-f16-" not in name or "f16" in ACCELERATED:
            assert sanitizer.check(gpu, name) == {}
    for number in ("bf16", "f16", "f32", "f32-tf32", "f32-tf32x3", "f64"):
        for layout in ("NN", "NT", "TN", "TT"):
            assert f"forward-{number}-{layout}-128x256x192-cuda" in names
        assert f"forward-{number}-NN-1x160x96-cuda" in names
    assert {f"grouped-{dtype}-{k}" for dtype in ("bf16", "f32", "f64") for k in (64, 67)} < set(names)
    assert {"mm_backward-bf16", "forward-f32-NN-6x65x80x64-cuda"} < set(names[:10])


def test_small_set_sees_what_is_wrong(gpu: Any, on_cpu: None, plant: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    right, grouped_mm = gpu_calls.mm_backward, matmul_grad.grouped_mm
    wrong = {name: lambda *of, call=call: call(*of) + 1 for name, call in CONVOLUTIONS.items()}
    monkeypatch.setattr(gpu_calls, "convolutions", lambda: wrong)
    plant("matmul_grad", lambda a, b: torch.mm(a, b) + 3)
    monkeypatch.setattr(gpu_calls, "mm", lambda precision: lambda a, b: torch.mm(a, b) + 3)
    monkeypatch.setattr(backends.api, "bmm", lambda a, b: torch.bmm(a, b) * 1.1)
    monkeypatch.setattr(matmul_grad, "grouped_mm", lambda *of, offs: grouped_mm(*of, offs=offs - 1))
    monkeypatch.setattr(gpu_calls, "mm_backward", lambda *operands: right(*operands)[::-1])
    for name in sanitizer.cases():
        with pytest.raises(gpu_tasks.IncorrectResult):
            sanitizer.check(gpu, name)


def test_kernels_are_compiled_until_the_context_breaks(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[int] = []
    monkeypatch.setattr(gpu_tasks, "Gpu", lambda: gpu)
    monkeypatch.setattr(gpu_tasks.os, "_exit", ended.append)
    monkeypatch.setattr(backends.api, "bmm", torch.mm)  # raises for batches: no reason to stop
    part = [(on_gpu("forward", "f32", (8, 8, 8), batch=batch), None) for batch in (1, 2)]
    assert gpu_tasks.compile_part([*part, part[0]]) == 2 and ended == []
    gpu.broken = True
    assert gpu_tasks.compile_part(part[:1]) == 0 and ended == [1]


def test_compilers_that_hang_or_end_are_left_behind(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    killed: list[int] = []

    class Process:
        def kill(self) -> None:
            killed.append(1)

    class Pool:
        def __init__(self, processes: int, mp_context: Any) -> None:
            self._processes = {1: Process(), 2: Process()}

        def map(self, function: Any, parts: Any, timeout: float) -> Iterator[int]:
            assert timeout == gpu_tasks.COMPILING < runner.GPU_SILENCE
            yield 1
            raise RuntimeError("a process ended")

        def shutdown(self, **options: Any) -> None:
            pass

    monkeypatch.setattr(gpu_tasks, "ProcessPoolExecutor", Pool)
    one = on_gpu("forward", "f32", (8, 8, 8))
    found = gpu_tasks.compile_all([[(one, None)]] * 3, gpu_tasks.COMPILING)
    assert (found["products"], found["of"], len(killed)) == (1, 3, 2)
    assert "a process ended" in capsys.readouterr().err


def test_plan_has_each_once_and_the_same_again() -> None:
    found = workloads.gpu_targets()
    names = [workload.name for workload in found]
    assert len(set(names)) == len(names) > 500
    assert found == workloads.gpu_targets() == [workloads.of_row(asdict(workload)) for workload in found]
    assert {workload.precision for workload in found if workload.product == "step"} == {"ieee"}
    assert {workload.product for workload in workloads.gpu_rivals()} == {"forward"}


def test_plan_has_sixteen_bits_on_every_shape_in_every_product() -> None:
    found = {(w.dtype, w.product, w.shape) for w in workloads.gpu_targets() if (w.mode, w.batch) == ("", 1)}
    listed = [(n, n, n) for n in (256, 512, 1024, 2048, 4096, 8192)]
    listed += [(m, n, k) for n, k in shapes.LAYERS_NK for m in (1, 8, 128, 2048)] + [*shapes.DEEPSEEK, *shapes.ODD]
    for dtype in ("bf16", "f16"):
        assert {(dtype, product, shape) for product in workloads.PASSES for shape in listed} < found


def test_a_short_run_has_seen_every_kind() -> None:
    """Every target, but those of other packages, has comparisons in the first third."""
    everything = workloads.gpu_targets()
    for target in targets.GPU:
        mine = everything[: len(everything) // 3] if target.step == "ratios" else workloads.gpu_rivals()
        assert any(map(target.takes, mine)), target.name
