"""A test that breaks the context of a GPU fails alone: its worker ends, and another one runs the tests behind it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import limits
import pytest
from limits import scaled

BREAKING = """
import torch

def test_good(device): pass

def test_that_breaks_the_context(device):
    def synchronize():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    torch.cuda.synchronize = synchronize  # every later call of the process meets the error

def test_behind_it(device): pass
def test_behind_that(device): pass
"""
# In place of torch, which each process would import for one call, what conftest.py uses of it.
SETTINGS = """
import sys, types
for name in ("torch", "gpu_required"):
    sys.modules[name] = types.ModuleType(name)
sys.modules["torch"].device = str
sys.modules["torch"].cuda = types.SimpleNamespace(synchronize=lambda: None)
sys.modules["gpu_required"].require_gpu = lambda: "cpu"
"""


@pytest.mark.parametrize("workers", [1, 0])
def test_tests_behind_one_that_breaks_the_context_run(workers: int, tmp_path: Path) -> None:
    """In workers; a process alone stops there."""
    (tmp_path / "test_some.py").write_text(BREAKING)
    (tmp_path / "settings.py").write_text(SETTINGS)
    shutil.copy(Path(__file__).with_name("conftest.py"), tmp_path)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    path = os.pathsep.join((str(tmp_path), str(Path(limits.__file__).parent)))
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    options = ["-p", "settings", "-p", "no:benchmark", "-p", "no:cacheprovider", "-n", str(workers)]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-v", *options],
        cwd=tmp_path, env=inherited | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=scaled(300),
    )  # fmt: skip
    if workers:
        assert "1 failed" in done.stdout, done.stdout + done.stderr
        for name in ("good", "behind_it", "behind_that"):
            assert f"PASSED test_some.py::test_{name}" in done.stdout, done.stdout
        assert "crashed while running 'test_some.py::test_that_breaks_the_context'" in done.stdout, done.stdout
    else:
        assert done.returncode == 3 and "the context of the GPU is broken" in done.stdout, done.stdout + done.stderr
