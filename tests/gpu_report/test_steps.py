"""A step that dies, hangs or finds nothing to run with takes neither its rows nor the other steps with it."""

from __future__ import annotations

import importlib.util
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from matmul_grad.bench import gpu_worker, process, stages
from matmul_grad.bench.stages import COMPLETE, FAILED, LATE, MISSING, STAGES, StageContext

ROWS = {"begin": 0, "of": 99, "name": "a"}, {"row": {"name": "a", "x": 1}}


def given(launcher: Any, **more: Any) -> tuple[StageContext, list[Any], list[str]]:
    rows: list[Any] = []
    news: list[str] = []
    return StageContext(60.0, rows.append, news.append, launcher, **more), rows, news


def starts(launcher: Any) -> list[str]:
    return [part for command in launcher.commands for part in command if part.startswith("--start")]


def test_rows_of_a_step(launcher: Any, says: Any) -> None:
    launcher.scripts["ratios"] = [says(*ROWS, "noise", {"left": 7})]
    order, rows, news = given(launcher)
    begin = time.time()
    assert stages.tasks_of("ratios")(order) == (COMPLETE, "1 done; no time for 7 more")
    assert rows == [{"step": "ratios", "name": "a", "x": 1}] and news == ["a"]
    assert launcher.commands[0][:4] == [sys.executable, "-m", gpu_worker.__name__, "ratios"]
    until = float(launcher.commands[0][-1].removeprefix("--until="))
    assert begin + 54.9 < until < time.time() + 55.1


@pytest.mark.parametrize("end", [{"status": -11}, {"status": None}, {"status": 1, "said": "Boom: x\n"}], ids=str)
def test_a_task_that_ends_the_process_is_passed_over(end: Any, launcher: Any, says: Any) -> None:
    dies = says(*ROWS, {"begin": 1, "of": 99, "name": "b"}, **end)
    launcher.scripts["ratios"] = [dies, says({"begin": 2, "of": 99, "name": "c"}, {"row": {"name": "c"}})]
    order, rows, _ = given(launcher)
    assert stages.tasks_of("ratios")(order) == (FAILED, "3 done; 1 of them failed")
    assert starts(launcher) == ["--start=0", "--start=2"]
    assert [row["name"] for row in rows] == ["a", "b", "c"]
    reason = {-11: "killed by SIGSEGV", None: "its time was up", 1: "status 1: Boom: x"}[end["status"]]
    assert rows[1]["failed"] == f"its process ended: {reason}"


def test_a_broken_context_is_left_behind(launcher: Any, says: Any) -> None:
    broken = says(ROWS[0], {"row": {"name": "a", "failed": "CUDA error"}}, status=gpu_worker.BROKEN)
    launcher.scripts["ratios"] = [broken, says()]
    order, rows, _ = given(launcher)
    assert stages.tasks_of("ratios")(order).status == FAILED
    assert starts(launcher) == ["--start=0", "--start=1"] and len(rows) == 1


def test_no_process_behind_the_last_task(launcher: Any, says: Any) -> None:
    launcher.scripts["ratios"] = [says({"begin": 0, "of": 1, "name": "a"}, status=-6, said="Boom\n")]
    order, rows, _ = given(launcher)
    assert stages.tasks_of("ratios")(order) == (FAILED, "1 done; 1 of them failed")
    assert len(launcher.commands) == 1 and rows[0]["log"] == "Boom\n"


def test_native_launches_are_asked_for_in_the_environment(launcher: Any, says: Any) -> None:
    launcher.scripts["launch"] = [says(*ROWS)]
    order, rows, _ = given(launcher)
    assert stages.natively(order).status == COMPLETE
    assert launcher.environments == [{"MATMUL_GRAD_NATIVE_CUDA": "1"}]
    assert {row["step"] for row in rows} == {"native"}


def test_not_more_processes_than_that(launcher: Any, says: Any) -> None:
    launcher.scripts["ratios"] = [says({"begin": i, "of": 99, "name": str(i)}, status=-6) for i in range(99)]
    order, rows, _ = given(launcher)
    status, note = stages.tasks_of("ratios")(order)
    assert status == FAILED and "9 of its processes ended early" in note and len(rows) == 9


def test_a_child_that_never_begins(launcher: Any, says: Any) -> None:
    launcher.scripts["ratios"] = [says(status=1, said="ImportError: no torch\n")]
    order, rows, _ = given(launcher)
    assert stages.tasks_of("ratios")(order) == (FAILED, "0 done; status 1: ImportError: no torch")
    assert rows == []


def test_a_step_whose_time_is_up_keeps_its_rows(launcher: Any, says: Any) -> None:
    launcher.scripts["ratios"] = [says(*ROWS, {"begin": 1, "of": 99, "name": "b"}, status=None)]
    order, rows, _ = given(launcher)
    order.seconds = 0.0
    assert stages.tasks_of("ratios")(order) == (LATE, "1 done; stopped in b")
    assert [row["name"] for row in rows] == ["a"]


def test_a_rival_may_take_its_time(launcher: Any, says: Any) -> None:
    launcher.scripts["rivals"] = [says({"begin": 0, "of": 2, "name": "torch.compile"}, status=None)]
    order, rows, _ = given(launcher)
    order.seconds = 0.0
    assert stages.rivals_of(order) == (COMPLETE, "0 done; stopped in torch.compile")
    assert rows == []


def sanitize(launcher: Any, log: str, monkeypatch: pytest.MonkeyPatch, status: int = 0) -> tuple[Any, list[Any]]:
    def run(heard: Any) -> process.ExitStatus:
        for line in ('{"begin": 0, "of": 99, "name": "a"}', '{"row": {"name": "a"}}'):
            heard(line)
        if log:
            (option,) = (part for part in launcher.commands[-1] if part.startswith("--log-file="))
            Path(option.partition("=")[2]).write_text(log)
        return process.ExitStatus(status, "")

    monkeypatch.setattr(shutil, "which", lambda name, path=None: "/bin/compute-sanitizer")
    launcher.scripts["sanitized"] = [run]
    order, rows, _ = given(launcher)
    return stages.sanitizer("memcheck")(order), rows


def test_sanitizer_that_finds_nothing(launcher: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    log = "========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n"
    outcome, rows = sanitize(launcher, log, monkeypatch)
    assert outcome == (COMPLETE, "1 done; ERROR SUMMARY: 0 errors")
    assert rows[0]["step"] == "memcheck" and rows[-1]["summary"] == ["ERROR SUMMARY: 0 errors"]
    command = launcher.commands[0]
    assert command[:2] == ["/bin/compute-sanitizer", "--tool=memcheck"] and "--error-exitcode=99" in command
    assert launcher.environments[0] == {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


@pytest.mark.parametrize("status", [0, 99])
@pytest.mark.parametrize(
    "summary", ["ERROR SUMMARY: 2 errors", "RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)"]
)
def test_sanitizer_that_finds_something(
    status: int, summary: str, launcher: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = f"========= Invalid __global__ read of size 16 bytes\n========= {summary}\n"
    outcome, rows = sanitize(launcher, log, monkeypatch, status)
    assert outcome.status == FAILED and summary in outcome.note
    assert "failed" in rows[-1] and "Invalid __global__ read" in rows[-1]["log"]


def test_sanitizer_that_says_nothing(launcher: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    outcome, _ = sanitize(launcher, "", monkeypatch)
    assert outcome == (FAILED, "1 done; it wrote no summary")


def test_no_sanitizer(launcher: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name, path=None: None)
    order, rows, _ = given(launcher)
    assert stages.sanitizer("racecheck")(order) == (MISSING, "compute-sanitizer is not on this machine")
    assert rows == [] and launcher.commands == []


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_cpu.py").write_text("import nowhere\n")
    (tmp_path / "tests" / "test_gpu.py").write_text("pytestmark = pytest.mark.gpu\n")
    return tmp_path


PLAIN = "tests/test_gpu.py::test_x[a-1] PASSED   [ 33%]", "tests/test_gpu.py::test_y SKIPPED (no) [ 66%]"
XDIST = ("[gw1] [ 99%] FAILED tests/test_gpu.py::test_z ",)


def test_tests_are_counted(launcher: Any, says: Any, checkout: Path) -> None:
    launcher.scripts["pytest"] = [says("=== test session starts", *PLAIN, "=== 1 passed")]
    order, rows, news = given(launcher, checkout=checkout)
    assert stages.gpu_tests(order) == (COMPLETE, "1 passed, 1 skipped")
    assert rows[0]["counts"] == {"passed": 1, "skipped": 1} and news[0] == "tests/test_gpu.py::test_x[a-1]"
    assert launcher.commands[0][-1] == str(checkout / "tests" / "test_gpu.py")
    assert launcher.environments[0] == {"MATMUL_GRAD_REQUIRE_GPU": "1"}


def test_failing_tests_are_named(launcher: Any, says: Any, checkout: Path) -> None:
    launcher.scripts["pytest"] = [says(*PLAIN, *XDIST, status=1)]
    order, rows, _ = given(launcher, checkout=checkout)
    assert stages.gpu_tests(order).status == FAILED
    assert rows[0]["tests"] == ["tests/test_gpu.py::test_z"] and "failed" in rows[0]
    assert XDIST[0] in rows[0]["log"]


def test_tests_whose_time_is_up(launcher: Any, says: Any, checkout: Path) -> None:
    launcher.scripts["pytest"] = [says(*PLAIN, status=None)]
    order, rows, _ = given(launcher, checkout=checkout)
    assert stages.gpu_tests(order) == (LATE, "1 passed, 1 skipped; its time was up")
    assert rows[0]["counts"]["passed"] == 1


def test_no_tests_at_hand(launcher: Any) -> None:
    order, _, _ = given(launcher)
    assert stages.gpu_tests(order) == (MISSING, "no tests at hand: this is not a checkout")


def hide(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in names else found(name, *rest))


def test_no_pytest(launcher: Any, checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hide(monkeypatch, "pytest")
    order, _, _ = given(launcher, checkout=checkout)
    assert stages.gpu_tests(order) == (MISSING, "pytest is not installed")


REAL = """
import pytest
pytestmark = pytest.mark.gpu
def test_good(): pass
@pytest.mark.parametrize("x", ["a b", "c"])
def test_bad(x): assert x == "c"
"""


@pytest.mark.parametrize("missing", [(), ("xdist",), ("pytest_timeout", "xdist")], ids=str)
def test_pytest_itself_is_understood(missing: tuple[str, ...], checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hide(monkeypatch, *missing)
    for name in ("PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT", "PYTEST_XDIST_TESTRUNUID", "PYTEST_ADDOPTS"):
        monkeypatch.delenv(name, raising=False)
    (checkout / "tests" / "test_gpu.py").write_text(REAL)
    settings = Path(__file__).parents[2] / "pyproject.toml"
    shutil.copy(settings, checkout)
    order, rows, _ = given(process.run, checkout=checkout)
    outcome = stages.gpu_tests(order)
    assert outcome.status == FAILED and rows[0]["counts"] == {"passed": 2, "failed": 1}, outcome
    assert len(rows[0]["tests"]) == 1 and "test_bad[a" in rows[0]["tests"][0]


def test_shares_add_up_to_eight_minutes() -> None:
    assert sum(step.share for step in STAGES) == 480
    left = 100.0
    for step in STAGES:
        limit = stages.limit(step, left)
        assert 0 < limit <= left
        left -= limit
    assert left == pytest.approx(0)
