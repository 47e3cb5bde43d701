"""`matmul-grad gpu-report` from its options to its files, on the GPU that is none: no step takes another with it."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gpu_steps import given

from matmul_grad import cli
from matmul_grad.bench import (
    devices,
    gpu_report,
    gpu_tasks,
    results,
    runner,
    sanitizer,
    stages,
    worker,
    workloads,
)
from matmul_grad.bench.stages import COMPLETE, FAILED, LATE, STAGES
from matmul_grad.bench.workloads import on_gpu

TINY = [on_gpu(product, "bf16", (16, 16, 16)) for product in ("forward", "dgrad", "step")]
SOME = "--steps=ratios,launch,memory"
Run = Callable[..., tuple[int, Any]]


@pytest.fixture
def run(gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """The command with these options, in a folder of its own: its exit code and what it wrote."""
    monkeypatch.setattr(workloads, "gpu_targets", lambda: TINY)
    monkeypatch.setattr(workloads, "gpu_rivals", lambda: TINY[:1])
    monkeypatch.setattr(workloads, "gpu_memory", lambda: TINY[2:])
    monkeypatch.setattr(gpu_tasks, "LAUNCHES", (("f32", 8),))
    monkeypatch.setattr(sanitizer, "cases", lambda: {"a": lambda gpu: None, "b": lambda gpu: None})
    monkeypatch.setattr(gpu_tasks, "compile_all", lambda parts, seconds: {"products": len(parts)})
    monkeypatch.setattr(shutil, "which", lambda name, path=None: None)

    def act(*options: str) -> tuple[int, Any]:
        status = cli.main(["gpu-report", "--out", str(tmp_path / "out"), *options])
        return status, written(tmp_path)

    return act


def written(folder: Path) -> Any:
    (path,) = (folder / "out").glob("*.json")
    return json.loads(path.read_text(encoding="utf-8")) | {
        "files": sorted(path.name for path in (folder / "out").iterdir()),
        "page": path.with_suffix(".md").read_text(encoding="utf-8"),
    }


def statuses(found: Any) -> dict[str, str]:
    return {step["name"]: step["status"] for step in found["steps"]}


def test_some_steps(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    status, found = run(SOME)
    assert status == 0
    stem = f"{found['stamp']['date']}-gpu-report-nvidia-fake-9000-sm-90-part"
    assert found["files"] == [f"{stem}.json", f"{stem}.md"]
    assert statuses(found) == dict.fromkeys(("environment", "ratios", "launch", "memory"), "complete")
    assert (found["schema"], found["whole"], found["stamp"]["driver_version"]) == (1, False, "1.2")
    timed = [row for row in found["rows"] if row["step"] == "ratios"]
    assert [workloads.of_row(row) for row in timed] == TINY
    printed = capsys.readouterr()
    assert "bf16, fp16 dgrad" in printed.out
    assert printed.out.splitlines()[-1].endswith("-part.md")
    assert "ratios: complete: 3 done" in printed.err
    assert "Beside the comparisons: clocks.sm 1755 MHz to 1755 MHz, power.draw 612.5 W" in found["page"]
    assert "| bf16, fp16 dgrad | device | 1.000 |" in found["page"] and "| 1 of 1 |" in found["page"]


def test_a_commit_that_no_repository_tells_is_named_by_the_environment(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a machine that has the working tree without its repository."""
    monkeypatch.setenv(results.COMMIT, "1234abc")
    assert run("--steps=memory")[1]["stamp"]["commit"] == "1234abc"


def test_every_step(run: Run) -> None:
    status, found = run()
    assert status == 0 and found["whole"] and list(statuses(found)) == [step.name for step in STAGES]
    assert set(statuses(found).values()) == {"complete", "missing"}
    assert all("part" not in name and "unfinished" not in name for name in found["files"])


def test_run_that_leaves_comparisons_out_is_not_whole(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = {"step": float("inf")}
    monkeypatch.setattr(workloads.Workload, "weight", lambda self, *_, **more: weight.get(self.product, 0.0))
    status, found = run()
    assert status == 0 and not found["whole"] and found["planned"] == 5
    assert "**Not a whole run**: 3 of 5 comparisons." in found["page"]
    assert all("unfinished" not in name for name in found["files"])


def test_planned_is_what_the_steps_compare(run: Run) -> None:
    _, found = run("--steps=ratios,memory")
    assert found["planned"] == len(found["rows"]) == 4
    assert "against quack" not in found["page"] and "| bf16, fp16 dgrad |" in found["page"]


def test_step_that_cannot_even_be_run(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(given: Any) -> Any:
        raise OSError("no memory to fork")

    replaced = tuple(step._replace(do=broken) if step.name == "launch" else step for step in STAGES)
    monkeypatch.setattr(gpu_report, "STAGES", replaced)
    status, found = run("--steps=launch,memory")
    assert status == 1 and statuses(found) == {"environment": "complete", "launch": "failed", "memory": "complete"}
    assert found["steps"][1]["note"] == "OSError: no memory to fork"


def test_files_are_there_before_the_end(run: Run, here: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After each step, and while rows come in: what ends this without a word loses one comparison."""
    seen: list[int] = []

    def look(task: Any) -> None:
        if "prepare" in task:
            found = written(tmp_path)
            seen.append(len(found["rows"]))
            assert all("unfinished" in name for name in found["files"]) and "# GPU report" in found["page"]

    monkeypatch.setattr(here, "before", look)
    assert run(SOME)[0] == 0
    assert seen == [0, 1, 2, 4]


def dies_at(here: Any, monkeypatch: pytest.MonkeyPatch, *numbers: int) -> None:
    """The processes that are given these tasks end."""
    count = itertools.count()

    def die(task: Any) -> None:
        if next(count) in numbers:
            raise worker.WorkerExited("killed by SIGSEGV", "Boom\n")

    monkeypatch.setattr(here, "before", die)


TASKS = {name: {"do": "x", "name": name} for name in "abc"}


def test_a_task_that_ends_its_process_is_passed_over(gpu: Any, here: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(gpu_tasks.TASKS, "x", lambda gpu, name: {"got": name})
    dies_at(here, monkeypatch, 1)
    context, rows = given("launch", gpu)
    assert stages.asked(context, TASKS) == (FAILED, "3 done; 1 of them failed")
    assert [(row["name"], row.get("got")) for row in rows] == [("a", "a"), ("b", None), ("c", "c")]
    assert rows[1]["failed"] == {"matmul_grad": "its process ended: killed by SIGSEGV"} and rows[1]["log"] == "Boom\n"
    assert len(here.begun) == 2


def test_not_more_processes_than_that(gpu: Any, here: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    dies_at(here, monkeypatch, *range(99))
    context, rows = given("launch", gpu)
    status, note = stages.asked(context, {str(i): {"do": "x"} for i in range(99)})
    assert status == FAILED and "9 of its processes ended early" in note and len(rows) == 9


def test_a_comparison_that_ends_its_process_is_a_failed_row(
    gpu: Any, here: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    dies_at(here, monkeypatch, 0)
    context, rows = given("ratios", gpu)
    outcome = stages.compared(lambda: TINY[:2])(context)
    assert outcome.status == FAILED and "seconds" in rows[1]
    assert set(rows[0]["failed"]) == {"torch", "matmul_grad"} and len(here.begun) == 2


def test_step_whose_time_is_up_keeps_its_rows(gpu: Any, here: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(gpu_tasks.TASKS, "x", lambda gpu, name: {"got": name})
    context, rows = given("launch", gpu)
    left = iter([60.0, 60.0, 0.0, 0.0, 0.0])
    monkeypatch.setattr(stages.Clock, "left", lambda self: next(left))
    assert stages.asked(context, TASKS) == (COMPLETE, "1 done; no time for 2 more") and len(rows) == 1
    dies_at(here, monkeypatch, 0)
    left = iter([60.0, 0.0, 0.0])
    context, rows = given("launch", gpu)
    assert stages.asked(context, TASKS) == (LATE, "0 done; stopped in a") and rows == []
    context, rows = given("ratios", gpu, seconds=-10.0)
    monkeypatch.undo()
    assert stages.compared(lambda: TINY)(context) == (COMPLETE, "0 done; no time for 3 more")


def test_comparison_cut_off_by_the_end_of_its_step_has_no_row(
    gpu: Any, here: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(stages, "monotonic", lambda: now[0])

    def cut_off(task: Any) -> None:
        now[0] += 60.0 + runner.GRACE
        raise worker.WorkerExited("its time was up")

    monkeypatch.setattr(here, "before", cut_off)
    context, rows = given("ratios", gpu, seconds=60.0)
    assert stages.compared(lambda: TINY)(context) == (COMPLETE, "0 done; no time for 3 more") and rows == []


def test_step_gives_up_after_comparisons_in_a_row_that_failed(
    gpu: Any, here: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = [on_gpu("forward", "bf16", (8, 8, n)) for n in range(8, 8 + 3 * stages.AGAIN)]
    dies_at(here, monkeypatch, *range(99))
    context, rows = given("ratios", gpu)
    outcome = stages.compared(lambda: planned)(context)
    assert outcome.status == FAILED and "it gave up" in outcome.note and len(rows) == stages.AGAIN + 1

    def die(task: Any) -> None:  # at every other workload
        if task.get("prepare", {}).get("k", 1) % 2 == 0:
            raise worker.WorkerExited("killed by SIGSEGV")

    monkeypatch.setattr(here, "before", die)
    context, rows = given("ratios", gpu)
    assert "it gave up" not in stages.compared(lambda: planned)(context).note and len(rows) == len(planned)


def test_resumed_step_has_its_tasks_once(run: Run, here: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_tasks, "LAUNCHES", (("f32", 8), ("f32", 16)))

    def stop(task: Any) -> None:
        if task.get("n") == 16:
            raise KeyboardInterrupt

    monkeypatch.setattr(here, "before", stop)
    assert run("--steps=ratios,launch")[0] == 130
    monkeypatch.setattr(here, "before", lambda task: None)
    status, found = run("--steps=ratios,launch", "--resume")
    assert status == 0
    assert [row["name"] for row in found["rows"] if row["step"] == "launch"] == ["f32 8×8", "f32 16×16"]
    assert [workloads.of_row(row) for row in found["rows"] if row["step"] == "ratios"] == TINY


def test_native_launches_are_asked_for_in_the_environment(gpu: Any, here: Any) -> None:
    for name in ("launch", "native"):
        assert stages.launches(given(name, gpu)[0]).status == COMPLETE
    assert [environment.get("MATMUL_GRAD_NATIVE_CUDA") for _, environment, _ in here.begun] == [None, "1"]


def test_another_package_that_is_wrong_is_left_out(gpu: Any, plant: Any) -> None:
    plant("torch", lambda a, b: a @ b + 1)
    context, (row,) = given("rivals", gpu), [None]
    outcome = stages.compared(lambda: TINY[:1], rivals=True)(context[0])
    (row,) = context[1]
    assert outcome.status == COMPLETE and row["skipped"]["torch"].startswith("wrong: ") and "wrong" not in row


def test_figures_come_before_tools_and_tests() -> None:
    names = [step.name for step in STAGES]
    assert names[:5] == ["environment", "sanitized", "compile", "ratios", "launch"]
    assert names[-3:] == ["memcheck", "racecheck", "tests"]


@pytest.mark.parametrize("minutes", [1, 9])
def test_environment_has_a_minute_at_least(minutes: int) -> None:
    """A cold import, a context and the products of a GPU that nvidia-smi looks at."""
    for others in ((), STAGES[4:6], STAGES[1:]):
        assert stages.limit(STAGES[0], 60.0 * minutes, (STAGES[0], *others)) >= 60


def test_clocks_stand_beside_the_ratios(gpu: Any, here: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the first comparison, and of the next one after a while."""
    now = [0.0]
    monkeypatch.setattr(stages, "monotonic", lambda: now[0])
    planned = [on_gpu("forward", "bf16", (8, 8, n)) for n in (8, 16, 24, 32)]
    each = stages.CLOCKS_EVERY / 2
    monkeypatch.setattr(here, "before", lambda task: now.__setitem__(0, now[0] + each * ("prepare" in task)))
    context, rows = given("ratios", gpu, seconds=600.0)
    assert stages.compared(lambda: planned)(context).status == COMPLETE
    assert [row.get("clocks", {}).get("clocks.sm") for row in rows] == ["1755 MHz", None, "1755 MHz", None]
    monkeypatch.setattr(gpu, "clocks", lambda: 1 / 0)
    context, rows = given("ratios", gpu, seconds=600.0)
    assert stages.compared(lambda: planned[:1])(context).status == COMPLETE
    assert "ZeroDivisionError" in rows[0]["clocks"]["nvidia-smi"] and "failed" not in rows[0]


def test_clocks_are_what_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(uuid="1-2")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    for reported, kept in (
        ({"clocks.sm": "1755 MHz", "driver_version": "1"}, {"clocks.sm": "1755 MHz"}),
        ({"nvidia-smi": "ended with status 9"},) * 2,
    ):
        monkeypatch.setattr(devices, "nvidia_smi", lambda _, reported=reported: reported)
        assert devices.Gpu().clocks() == kept


def test_shares_add_up_to_eight_minutes() -> None:
    assert sum(step.share for step in STAGES) == 480
    left = 100.0
    for step in STAGES:
        limit = stages.limit(step, left)
        assert 0 < limit <= left
        left -= limit
    assert left == pytest.approx(0)
