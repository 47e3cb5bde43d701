"""A child: a line before each task and one after it, whatever the task does."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
import torch
from limits import scaled

from matmul_grad.bench import gpu_calls, gpu_session, gpu_worker, process, sanitizer
from matmul_grad.bench.gpu_worker import Task
from matmul_grad.bench.gpu_workloads import GpuWorkload

Row = dict[str, Any]


def serve(tasks: list[Task], gpu: Any, start: int = 0, seconds: float = 60) -> tuple[int, list[Row]]:
    said: list[Row] = []
    return gpu_worker.serve(tasks, gpu, start, seconds, said.append), said


def raises(error: Exception) -> Task:
    def run(gpu: Any) -> Row:
        raise error

    return Task("x", run)


def test_a_line_before_and_a_line_after(gpu: Any) -> None:
    tasks = [Task(name, lambda gpu, name=name: {"got": name}) for name in "abc"]  # type: ignore[misc]  # mypy does not infer a lambda with a default
    status, said = serve(tasks, gpu, start=1)
    assert status == 0
    assert said == [
        {"begin": 1, "of": 3, "name": "b"}, {"row": {"name": "b", "got": "b"}},
        {"begin": 2, "of": 3, "name": "c"}, {"row": {"name": "c", "got": "c"}},
    ]  # fmt: skip


def test_time_is_up(gpu: Any) -> None:
    assert serve([raises(ValueError())] * 3, gpu, seconds=-1) == (0, [{"left": 3}])


@pytest.mark.parametrize(
    ("error", "row"),
    [
        (gpu_session.IncorrectResult("off by one"), {"wrong": "off by one"}),
        (gpu_session.Skipped("too large"), {"skipped": "too large"}),
        (gpu_calls.Missing("no bmm"), {"skipped": "no bmm"}),
        (torch.cuda.OutOfMemoryError("tried to allocate"), {"skipped": "out of device memory"}),
        (ValueError("first\nsecond"), {"failed": "ValueError: first"}),
        (ValueError(), {"failed": "ValueError: no message"}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_next_task_follows_one_that_raises(error: Exception, row: Row, gpu: Any) -> None:
    status, said = serve([raises(error), Task("next", lambda gpu: {})], gpu)
    assert status == 0
    log = said[1]["row"].pop("log", "")
    assert said[1] == {"row": {"name": "x", **row}}
    assert ("Traceback" in log) == ("failed" in row)
    assert said[3] == {"row": {"name": "next"}}


def test_broken_context_ends_the_process(gpu: Any) -> None:
    def run(gpu: Any) -> Row:
        gpu.broken = True
        raise RuntimeError("CUDA error")

    status, said = serve([Task("x", run), Task("next", lambda gpu: {})], gpu)
    assert status == gpu_worker.BROKEN
    assert said[-1]["row"]["failed"] == "RuntimeError: CUDA error"


def test_environment(gpu: Any) -> None:
    ((task),) = gpu_worker.tasks("environment")
    facts = task.run(gpu)["facts"]
    assert facts["GPU"] == "NVIDIA Fake 9000"
    assert facts["torch"] == torch.__version__ and facts["numba"] and facts["triton"] and facts["python"]


def test_every_step_has_tasks_with_names() -> None:
    for step in ("sanitized", "ratios", "rivals", "launch", "memory", "compile"):
        names = [task.name for task in gpu_worker.tasks(step)]
        assert len(set(names)) == len(names) > 0, step


def test_kernels_are_compiled_until_the_time_is_up(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_worker, "Gpu", lambda: gpu)
    part = [GpuWorkload("products", "forward", "f32", 8, 8, 8), GpuWorkload("bmm", "forward", "f32", 8, 8, 8)]
    monkeypatch.setattr(gpu_calls, "bmm", lambda: torch.mm)  # raises for batches: no reason to stop
    assert gpu_worker.compile_part([*part, part[0]], 60) == 2
    assert gpu_worker.compile_part(part, -1) == 0
    gpu.broken = True
    assert gpu_worker.compile_part(part, 60) == 0


def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def backward(grad: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return grad @ b.mT, a.mT @ grad

    monkeypatch.setattr(gpu_calls, "mm", lambda precision: torch.mm)
    monkeypatch.setattr(gpu_calls, "bmm", lambda: torch.bmm)
    monkeypatch.setattr(gpu_calls, "mm_backward", backward)


def test_small_set_meets_every_dtype_layout_and_path(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    on_cpu(monkeypatch)
    names = [sanitizer.check(case, gpu)["name"] for case in sanitizer.cases()]
    for number in ("bf16", "f16", "f32", "f32-tf32", "f32-tf32x3", "f64"):
        for layout in ("NN", "NT", "TN", "TT"):
            assert f"forward-{number}-128x256x192-{layout}" in names
        assert f"forward-{number}-1x160x96-NN" in names
    assert {"mm_backward-bf16", "bmm-f32"} < set(names[:10])


def test_small_set_sees_what_is_wrong(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    on_cpu(monkeypatch)
    right = gpu_calls.mm_backward
    monkeypatch.setattr(gpu_calls, "mm", lambda precision: lambda a, b: torch.mm(a, b) + 3)
    monkeypatch.setattr(gpu_calls, "bmm", lambda: lambda a, b: torch.bmm(a, b) * 1.1)
    monkeypatch.setattr(gpu_calls, "mm_backward", lambda *operands: right(*operands)[::-1])
    for case in sanitizer.cases():
        with pytest.raises((gpu_session.IncorrectResult, RuntimeError)):
            sanitizer.check(case, gpu)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a child does without a GPU")
def test_child_without_a_gpu_says_so_in_its_row() -> None:
    heard: list[str] = []
    ended = process.run(
        process.python("-m", gpu_worker.__name__, "environment", f"--until={time.time() + scaled(300)}"),
        heard.append,
        seconds=scaled(600),
    )
    messages = [json.loads(line) for line in heard]
    assert messages[0] == {"begin": 0, "of": 1, "name": "environment"}
    assert "failed" in messages[1]["row"] and "Traceback" in messages[1]["row"]["log"]
    assert ended.status == gpu_worker.BROKEN
