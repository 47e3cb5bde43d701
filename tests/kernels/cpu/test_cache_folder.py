"""The folder of compiled kernels: shared by processes, damaged, deleted, not writable."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest
from kernel_sets import as_wheel, copy_cache
from processes import LIMIT, assert_computes

from matmul_grad.kernels.cpu import build, host

USE = """
for dtype in {dtypes}:
    a, b = integers(40, 30, dtype, 1), integers(30, 20, dtype, 2)
    assert_same_bits(matmul_grad.mm(a, b), exact_product(a, b))
from matmul_grad import ops
assert ops.native_status() == ""
print("numba" in sys.modules)
"""

ONE = USE.format(dtypes="(torch.float32,)")
TWO = USE.format(dtypes="(torch.float32, torch.float64)")

# Adds a line to a file for each set that is compiled, all of them by this process.
COUNTING = """
from matmul_grad.kernels.cpu import build, compile_beside
build.SLOW = 1e6
compile_beside.is_possible = lambda: False
def to_module(kernels, *rest, original=build.to_module):
    with open(sys.argv[1], "a") as file:
        file.write(sorted(kernels)[0] + "\\n")
    return original(kernels, *rest)
build.to_module = to_module
"""


DAMAGE = {
    "cut short": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "a changed byte": lambda data: data[:-1] + bytes([data[-1] ^ 1]),
}


def test_cache_is_shared_survives_damage_and_may_be_deleted(tmp_path: Path) -> None:
    """Two processes compile once between them; a third only loads; damage is compiled anew, and so is what is gone.

    The sets of two dtypes: the entries and the driver are kept in the same way, and take 20 times as long to compile.
    """
    folder = tmp_path / "not" / "there" / "yet"
    two = as_wheel(tmp_path / "objects") + TWO
    code = "import sys, torch, matmul_grad\nfrom matmul_grad.testing import *\n" + COUNTING + two
    racing = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path / "compiled")],
            env=os.environ | {"MATMUL_GRAD_CACHE": str(folder)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for _ in range(2)
    ]  # fmt: skip
    for process in racing:
        out, err = process.communicate(timeout=LIMIT)
        assert (process.returncode, out in ("True\n", "False\n"), err) == (0, True, "")
    compiled = (tmp_path / "compiled").read_text().split()
    assert len(compiled) == len({*compiled}) == len(list(folder.glob("*.o"))) > 1
    objects = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert all(name.endswith(".o") for name in objects), f"nothing else is left over: {sorted(objects)}"
    assert assert_computes(two, MATMUL_GRAD_CACHE=str(folder)) == "False\n", "a warm start imports no Numba"
    damaged, gone, *_ = sorted(folder.iterdir())
    damaged.write_bytes(DAMAGE["a changed byte"](damaged.read_bytes()))
    gone.unlink()
    assert assert_computes(two, MATMUL_GRAD_CACHE=str(folder)) == "True\n"
    assert {path.name for path in folder.iterdir()} == set(objects)
    assert assert_computes(two, MATMUL_GRAD_CACHE=str(folder)) == "False\n", "what was damaged has been replaced"


@pytest.mark.parametrize("how", DAMAGE)
def test_damage_of_every_kind_is_seen(how: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MATMUL_GRAD_CACHE", str(tmp_path))
    compiled: list[str] = []

    def kernels() -> dict[str, str]:
        compiled.append("x")
        return {"answer": "define i64 @answer() {\n  ret i64 42\n}\n"}

    def load() -> int:
        loaded = build.load("key", "answer", kernels, host.machine(host.cpu().isa), {})
        return ctypes.CFUNCTYPE(ctypes.c_int64)(loaded.address("answer"))()

    assert [load(), load()] == [42, 42] and compiled == ["x"]
    (path,) = tmp_path.iterdir()
    damaged = DAMAGE[how](path.read_bytes())
    assert damaged != path.read_bytes()
    path.write_bytes(damaged)
    assert [load(), load()] == [42, 42] and compiled == ["x", "x"]
    assert path.read_bytes() != damaged


def test_folder_that_cannot_be_written(tmp_path: Path) -> None:
    """A file stands where the folder should be: not even root can write there."""
    (tmp_path / "file").write_text("not a folder")
    code = as_wheel(tmp_path / "objects") + ONE
    assert assert_computes(code, MATMUL_GRAD_CACHE=str(tmp_path / "file" / "cache")) == "True\n"


def test_cache_deleted_while_in_use(tmp_path: Path) -> None:
    """A folder with all that a product needs is read without Numba; loaded kernels need their file no more."""
    folder = tmp_path / "cache"
    copy_cache(folder, "float32")
    assert_computes(
        """
        import shutil
        a, b = integers(300, 200, torch.float32, 1), integers(200, 100, torch.float32, 2)
        assert_same_bits(matmul_grad.mm(a, b), exact_product(a, b))
        assert "numba" not in sys.modules and matmul_grad.ops.native_status() == ""
        shutil.rmtree(os.environ["MATMUL_GRAD_CACHE"])
        assert_same_bits(matmul_grad.mm(b.t(), a.t()), exact_product(b.t(), a.t()))
        """,
        MATMUL_GRAD_CACHE=str(folder),
    )


def test_places_of_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MATMUL_GRAD_CACHE", str(tmp_path / "here"))
    assert build.cache_folder() == tmp_path / "here"
    monkeypatch.delenv("MATMUL_GRAD_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert build.cache_folder() == tmp_path / "matmul_grad"
    machine = host.machine(host.cpu().isa)
    paths = {build.object_path(key, name, machine) for key, name in (("a", "x"), ("b", "x"), ("a", "y"))}
    assert len(paths) == 3
    assert {path.parent for path in paths} == {tmp_path / "matmul_grad"}
