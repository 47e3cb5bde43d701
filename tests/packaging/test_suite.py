"""The suite itself: `make test ARGS='-x'` ends after the first failure, and more work than the budget fails it."""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import limits
import work
from limits import scaled

TESTS = """
import time
from pathlib import Path
import pytest

@pytest.mark.parametrize("i", range(100))
def test_one(i, pytestconfig):
    with open(Path(__file__).with_name("ran"), "a") as ran:
        ran.write("x")
    assert i != 0
    stop = next(x.stop for x in pytestconfig.pluginmanager.get_plugins() if type(x).__name__ == "StopWorkers")
    while not stop.exists():
        time.sleep(0.01)
"""


WORKING = """
import subprocess, sys, torch

def test_processes():
    for _ in range(2):
        subprocess.run([sys.executable, "-I", "-S", "-c", ""])

def test_compilations():
    for function in (torch.sin, torch.cos):
        torch._dynamo.reset()
        torch.compile(lambda x: function(x), backend="eager")(torch.ones(1))
"""


def run_suite(folder: Path, *options: str) -> "subprocess.CompletedProcess[str]":
    """The tests of a folder under a copy of this suite's conftest.py, on two workers."""
    shutil.copy(Path(__file__).parents[1] / "conftest.py", folder)
    (folder / "pytest.ini").write_text("[pytest]\nmarkers =\n    smoke:\n    slow:\n")
    always = ["-p", "no:benchmark", "-p", "no:cacheprovider", "-n", "2", "--dist", "worksteal"]
    return subprocess.run(
        [sys.executable, "-m", "pytest", *always, *options],
        cwd=folder, env=os.environ | {"PYTHONPATH": str(Path(limits.__file__).parent)},
        capture_output=True, text=True, timeout=scaled(300),
    )  # fmt: skip


def test_first_failure_ends_every_worker(tmp_path: Path) -> None:
    """Each test but the one that fails waits for the order to stop, so that no test may follow it."""
    (tmp_path / "test_some.py").write_text(TESTS)
    done = run_suite(tmp_path, "-x")
    assert done.returncode == 2 and "1 failed" in done.stdout, done.stdout + done.stderr
    assert 1 <= len((tmp_path / "ran").read_text()) <= 2


def test_a_folder_above_its_budget_fails_the_suite(tmp_path: Path) -> None:
    """The work of both workers is added up."""
    (tmp_path / "op").mkdir()
    (tmp_path / "op" / "test_some.py").write_text(WORKING)
    budget = {"tests": 1, "processes": 1, "compilations": 1}
    (tmp_path / "budget.json").write_text(json.dumps({"op": budget}))
    done = run_suite(tmp_path)
    assert done.returncode == 1 and "2 passed" in done.stdout, done.stdout + done.stderr
    for kind in work.COUNTED:
        assert f"tests/op: 2 {kind}, and its budget in tests/budget.json is 1" in done.stdout, done.stdout


def test_slow_tests_and_work_within_the_budget_pass(tmp_path: Path) -> None:
    (tmp_path / "op").mkdir()
    slow = "import pytest\n@pytest.mark.slow\ndef test_slow(): pass\ndef test_quick(): pass\n"
    (tmp_path / "op" / "test_some.py").write_text(slow)
    (tmp_path / "budget.json").write_text(json.dumps({"op": {"tests": 1, "processes": 0, "compilations": 0}}))
    done = run_suite(tmp_path)
    assert done.returncode == 0 and "2 passed" in done.stdout, done.stdout + done.stderr


def test_every_folder_has_a_budget() -> None:
    root = Path(__file__).parents[1]
    folders = {work.folder_of(path, root) for path in root.rglob("test_*.py")}
    assert folders <= set(work.load(root))


def test_a_folder_without_a_budget_is_named() -> None:
    counts = Counter({"op: tests": 5, "op: processes": 1})
    allowed = {"tests": 5, "processes": 1, "compilations": 0}
    assert work.exceeded(counts, {"op": allowed}) == []
    assert work.exceeded(counts, {}) == []
    assert work.exceeded(counts, {"nn": allowed}) == [
        f"tests/op: {kind}: no budget in tests/budget.json" for kind in ("processes", "tests")
    ]
