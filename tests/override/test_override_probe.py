"""The probe that a torch has to pass before aten's operators are overridden: it sees each wrong layout."""

import subprocess
import sys
import textwrap
from pathlib import Path

import processes
import pytest
from kernel_sets import copy_cache

from matmul_grad.kernels.native import override_probe
from matmul_grad.kernels.native.register import Unavailable

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="torch's layouts on Linux")

RUN = """
import ctypes, matmul_grad
from matmul_grad.kernels.native import override_probe, torch_layout
{edit}
override_probe.main()
"""
WORDS = "(name, ctypes.c_int64) for name in"
WRONG = {
    "a word more before the kernel": """
        fields = torch_layout.CppFunction._fields_
        class Other(ctypes.Structure):
            _fields_ = [fields[0], ("more", ctypes.c_int64), *fields[1:]]
        torch_layout.CppFunction = Other""",
    "functor and boxed function change places": f"""
        class Other(ctypes.Structure):
            _fields_ = [{WORDS} ("boxed", "functor", "unboxed", "symbolic", "tokens")]
        torch_layout.KernelFunction = Other""",
    "another word of pybind11's object": "torch_layout.PYBIND_VALUE = 1",
    "other tags": "torch_layout.DOUBLE, torch_layout.INT = 4, 6",
    "slots of 24 bytes": "torch_layout.SLOT = 24",
}


def child(edit: str, cache: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {"MATMUL_GRAD_CACHE": str(cache)} if cache else {}
    return processes.run(RUN.format(edit=textwrap.dedent(edit)), **environment)


def test_this_torch_passes() -> None:
    done = child("")
    assert (done.returncode, done.stdout) == (0, "passed\n"), done.stderr


@pytest.mark.parametrize("name", WRONG)
def test_probe_fails_on_a_wrong_layout(name: str, tmp_path: Path) -> None:
    """The entries of aten are compiled anew: the cache goes by their sources, which are not what is wrong here."""
    copy_cache(tmp_path / "cache", "float32", "float64")
    done = child(WRONG[name], tmp_path / "cache")
    assert done.returncode != 0
    assert "passed" not in done.stdout


def test_reason_of_a_failed_probe_is_in_the_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MATMUL_GRAD_CACHE", str(tmp_path))
    monkeypatch.setattr(override_probe, "_run", lambda: "exit code 1, AssertionError: mm is wrong")
    override_probe._verdict.cache_clear()
    try:
        with pytest.raises(Unavailable, match=r"does not pass .* exit code 1, AssertionError: mm"):
            override_probe.require()
        assert list(tmp_path.iterdir()) == []
    finally:
        override_probe._verdict.cache_clear()


def test_passed_probe_is_cached(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By torch's build and these sources: the next process does not run it again."""
    runs: list[int] = []
    monkeypatch.setenv("MATMUL_GRAD_CACHE", str(tmp_path))
    monkeypatch.setattr(override_probe, "_run", lambda: runs.append(1) or "")
    for _ in range(3):
        override_probe._verdict.cache_clear()
        override_probe.require()
    assert len(runs) == 1
    monkeypatch.setattr("torch.version.git_version", "another build")
    override_probe._verdict.cache_clear()
    override_probe.require()
    assert len(runs) == 2
    override_probe._verdict.cache_clear()
