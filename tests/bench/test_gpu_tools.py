"""The steps of `matmul-grad gpu-report` that run other programs: compute-sanitizer, and pytest on the GPU's tests."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import pytest
from gpu_steps import given
from limits import scaled

from matmul_grad.bench import sanitizer, stages, worker
from matmul_grad.bench.stages import COMPLETE, FAILED, LATE, MISSING


def sanitized(
    gpu: Any, log: str, monkeypatch: pytest.MonkeyPatch, here: Any, tool: str = "memcheck"
) -> tuple[Any, list[Any]]:
    def leave(task: Any) -> None:
        (option,) = (part for part in here.begun[-1][2] if part.startswith("--log-file="))
        if log:
            Path(option.partition("=")[2]).write_text(log, encoding="utf-8")

    monkeypatch.setattr(here, "before", leave)
    monkeypatch.setattr(sanitizer, "cases", lambda: {"a": lambda gpu: None})
    monkeypatch.setattr(shutil, "which", lambda name, path=None: "/bin/compute-sanitizer")
    context, rows = given(tool, gpu)
    return stages.under_tool(context), rows


def test_sanitizer_that_finds_nothing(gpu: Any, here: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    log = "========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n"
    outcome, rows = sanitized(gpu, log, monkeypatch, here)
    assert outcome == (COMPLETE, "1 done; ERROR SUMMARY: 0 errors")
    assert rows[0]["step"] == "memcheck" and rows[-1]["summary"] == ["ERROR SUMMARY: 0 errors"]
    ((arguments, environment, wrapper),) = here.begun
    assert wrapper[:2] == ("/bin/compute-sanitizer", "--tool=memcheck") and "--error-exitcode=99" in wrapper
    assert environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1" and "--process=tasks" in arguments


@pytest.mark.parametrize(
    ("tool", "summary"), [("memcheck", "ERROR SUMMARY: 2 errors"), ("memcheck", ""), ("racecheck", "")]
)
def test_sanitizer_that_finds_something_or_ends_without_a_summary(
    tool: str, summary: str, gpu: Any, here: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = f"========= Invalid __global__ read of size 16 bytes\n========= {summary}\n" if summary else ""
    outcome, rows = sanitized(gpu, log, monkeypatch, here, tool)
    assert outcome.status == FAILED and (summary or "it wrote no summary") in outcome.note
    assert ("failed" in rows[-1] and "Invalid __global__ read" in rows[-1]["log"]) == bool(summary)


def test_hazards_are_reported_and_no_failure(gpu: Any, here: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """racecheck finds some in correct kernels that multiply from memory which TMA fills."""
    summary = "RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)"
    outcome, rows = sanitized(gpu, f"========= a hazard\n========= {summary}\n", monkeypatch, here, "racecheck")
    assert outcome == (COMPLETE, f"1 done; {summary}")
    assert "failed" not in rows[-1] and "a hazard" in rows[-1]["log"] and rows[-1]["summary"] == [summary]


def test_no_sanitizer(gpu: Any, here: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name, path=None: None)
    context, rows = given("racecheck", gpu)
    assert stages.under_tool(context) == (MISSING, "compute-sanitizer is not on this machine")
    assert rows == [] and here.begun == []


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_cpu.py").write_text("import nowhere\n", encoding="utf-8")
    (tmp_path / "tests" / "test_gpu.py").write_text("pytestmark = pytest.mark.gpu\n", encoding="utf-8")
    return tmp_path


PLAIN = "tests/test_gpu.py::test_x[a-1] PASSED   [ 33%]", "tests/test_gpu.py::test_y SKIPPED (no) [ 66%]"
XDIST = ("[gw1] [ 99%] FAILED tests/test_gpu.py::test_z ",)


@pytest.mark.parametrize(
    ("lines", "status", "outcome"),
    [
        (PLAIN, 0, (COMPLETE, "1 passed, 1 skipped")),
        (PLAIN + XDIST, 1, (FAILED, "1 passed, 1 skipped, 1 failed; 1 of the tests failed")),
        (PLAIN, None, (LATE, "1 passed, 1 skipped; its time was up")),
    ],
)
def test_tests_are_counted(
    lines: tuple[str, ...], status: Any, outcome: Any, gpu: Any, checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[Any] = []

    def run(command: list[str], heard: Any, **more: Any) -> worker.ExitStatus:
        ran.append((command[-1], more["environment"]))
        for line in ("=== test session starts", *lines):
            heard(line)
        return worker.ExitStatus(status, "")

    monkeypatch.setattr(worker, "run", run)
    context, (row,) = given("tests", gpu, checkout=checkout), [None]
    assert stages.gpu_tests(context[0]) == outcome
    (row,) = context[1]
    assert row["counts"]["passed"] == 1
    assert row.get("tests", []) == (["tests/test_gpu.py::test_z"] if status == 1 else [])
    assert ran == [(str(checkout / "tests" / "test_gpu.py"), {"MATMUL_GRAD_REQUIRE_GPU": "1"})]


def hide(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in names else found(name, *rest))


def test_nothing_to_test_with(gpu: Any, checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert stages.gpu_tests(given("tests", gpu)[0]) == (MISSING, "no tests at hand: this is not a checkout")
    hide(monkeypatch, "pytest")
    assert stages.gpu_tests(given("tests", gpu, checkout=checkout)[0]) == (MISSING, "pytest is not installed")


REAL = """
import pytest
pytestmark = pytest.mark.gpu
def test_good(): pass
@pytest.mark.parametrize("x", ["a b", "c"])
def test_bad(x): assert x == "c"
@pytest.mark.slow
def test_of_thousands_of_kernels(): assert False
"""


@pytest.mark.parametrize(
    "missing", [(), pytest.param(("xdist",), marks=pytest.mark.slow), ("pytest_timeout", "xdist")], ids=str
)
def test_pytest_itself_is_understood(
    missing: tuple[str, ...], gpu: Any, checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hide(monkeypatch, *missing)
    for name in ("PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT", "PYTEST_XDIST_TESTRUNUID", "PYTEST_ADDOPTS"):
        monkeypatch.delenv(name, raising=False)
    (checkout / "tests" / "test_gpu.py").write_text(REAL, encoding="utf-8")
    shutil.copy(Path(__file__).parents[2] / "pyproject.toml", checkout)
    context, rows = given("tests", gpu, seconds=scaled(600.0), checkout=checkout)
    outcome = stages.gpu_tests(context)
    assert outcome.status == FAILED and rows[0]["counts"] == {"passed": 2, "failed": 1}, outcome
    assert len(rows[0]["tests"]) == 1 and "test_bad[a" in rows[0]["tests"][0]
