"""The suite itself: `make test ARGS='-x'` ends after the first failure, on every worker."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import limits
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


def test_first_failure_ends_every_worker(tmp_path: Path) -> None:
    """Each test but the one that fails waits for the order to stop, so that no test may follow it."""
    shutil.copy(Path(__file__).parents[1] / "conftest.py", tmp_path)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "test_some.py").write_text(TESTS)
    options = ["-p", "no:benchmark", "-p", "no:cacheprovider", "-n", "2", "--dist", "worksteal", "-x"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(Path(limits.__file__).parent)},
        capture_output=True, text=True, timeout=scaled(300),
    )  # fmt: skip
    assert done.returncode == 2 and "1 failed" in done.stdout, done.stdout + done.stderr
    assert 1 <= len((tmp_path / "ran").read_text()) <= 2
