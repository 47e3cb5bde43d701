"""Compiled kernels: where they are kept and under which name, what they are compiled with, and what goes wrong."""

import compileall
import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
import zipfile
from pathlib import Path

import processes
import pytest
from kernel_sets import as_wheel

import matmul_grad
from matmul_grad.kernels.cpu import build, host

LIMIT = 400  # seconds that a process may take; a hang takes longer
ANSWER = "define i64 @answer() {\n  ret i64 42\n}\n"
SMALL = """
from numba.core import types
from matmul_grad.kernels.cpu.memory import INT64, get, jit, put, symbol

unknown = types.ExternalFunction("no_such_function", types.int64(types.int64))
missing = symbol("no_such_data")

@jit
def add(address, count):
    total = 0
    for i in range(count):
        total += get(address, i) // 3
    return total

@jit
def call_unknown(address):
    return unknown(address)

def kernel(address, count):
    put(address, 0, add(address, count))

def calls(address, count):
    put(address, 0, call_unknown(address))

def reads(address, count):
    put(address, 0, get(missing(), 0))

SIGNATURE = types.void(INT64, INT64)
"""


def run(code: str, *options: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    return processes.run(textwrap.dedent(code), *options, **environment)


def assert_runs(code: str, *options: str, **environment: str) -> str:
    """A fresh interpreter runs ``code``, ends well and prints no error; what it printed.

    On a machine where kernels are not in the cache yet, it may print that they are compiled.
    """
    done = run(code, *options, **environment)
    errors = [line for line in done.stderr.splitlines() if "compiling CPU kernels" not in line]
    assert (done.returncode, errors) == (0, []), f"{done.returncode}\n{done.stdout}\n{done.stderr[-3000:]}"
    return done.stdout


def machine() -> build.Machine:
    return host.machine(host.cpu().isa)


def load_answer(key: str = "test") -> int:
    """Through the cache, without Numba: the kernel is IR text."""
    loaded = build.load(key, "answer", lambda: {"answer": ANSWER}, machine(), {})
    return ctypes.CFUNCTYPE(ctypes.c_int64)(loaded.address("answer"))()


# --- the folder ---------------------------------------------------------------------------------------------

HOMELESS = """
import os, pwd, sys
for name in ("HOME", "MATMUL_GRAD_CACHE", "XDG_CACHE_HOME"):
    os.environ.pop(name, None)
def unknown(uid):
    raise KeyError(uid)
pwd.getpwuid = unknown
"""


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="users of POSIX")
def test_user_without_a_home_folder(tmp_path: Path) -> None:
    done = run(
        HOMELESS
        + as_wheel(tmp_path)
        + """
import torch, matmul_grad
from matmul_grad.kernels.cpu import build
assert build.cache_folder() is None
with matmul_grad.strict():
    assert matmul_grad.mm(torch.ones(2, 2), torch.ones(2, 2)).sum() == 8
"""
    )
    assert done.returncode == 0, done.stderr
    assert all("no cache folder" in line for line in done.stderr.splitlines()), done.stderr


def test_tilde_in_the_name_of_the_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MATMUL_GRAD_CACHE", "~/kernels")
    assert build.cache_folder() == tmp_path / "kernels"
    monkeypatch.setenv("MATMUL_GRAD_CACHE", "~no_such_user/kernels")
    assert build.cache_folder() is None
    assert load_answer() == 42


def test_folder_that_vanishes_while_a_kernel_is_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    monkeypatch.setenv("MATMUL_GRAD_CACHE", str(folder))
    make = tempfile.mkstemp

    def make_and_delete_folder(**named: object) -> tuple[int, str]:
        made = make(**named)  # type: ignore[arg-type]
        shutil.rmtree(folder)
        return made

    monkeypatch.setattr(tempfile, "mkstemp", make_and_delete_folder)
    assert load_answer() == 42
    monkeypatch.undo()
    assert not folder.exists()


@pytest.mark.skipif(sys.platform == "win32", reason="limits of POSIX")
def test_full_disk(tmp_path: Path) -> None:
    """A limit on the size of files ends a write as a full disk does."""
    printed = assert_runs(
        """
        import resource, sys, matmul_grad
        from matmul_grad.kernels.cpu import build, host
        build.SLOW = 1e6
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
        machine = host.machine(host.cpu().isa)
        text = "define i64 @answer() {\\n  ret i64 42\\n}\\n"
        loaded = build.load("key", "answer", lambda: {"answer": text}, machine, {})
        assert loaded.address("answer")
        print(len(list(build.cache_folder().iterdir())))
        """,
        "-W", "ignore::DeprecationWarning",
        MATMUL_GRAD_CACHE=str(tmp_path),
    )  # fmt: skip
    assert printed == "0\n", "what was written in part is deleted"


# --- the name -----------------------------------------------------------------------------------------------


def package_in(folder: Path, how: str, edit: str) -> Path:
    """The folder kernels/cpu as the package ``apart``, as sources, compiled files alone or an archive."""
    package = folder / "apart"
    shutil.copytree(Path(build.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    with (package / "gemm.py").open("a") as file:
        file.write(edit)
    for path in package.glob("*.py"):
        os.utime(path, (0, 0))  # compiled files hold the time
    if how == "compiled":
        compileall.compile_dir(package, legacy=True, quiet=1, stripdir=str(folder))
        for path in package.glob("*.py"):
            path.unlink()
    if how != "archive":
        return folder
    with zipfile.ZipFile(folder / "apart.zip", "w") as archive:
        for path in package.iterdir():
            archive.writestr(f"apart/{path.name}", path.read_bytes())
    return folder / "apart.zip"


@pytest.mark.parametrize("how", ["sources", "compiled", "archive"])
def test_key_hashes_what_is_imported(how: str, tmp_path: Path) -> None:
    show = "import sys; sys.path.insert(0, {!r}); from apart import build; print(build.sources_digest())"
    places = [package_in(tmp_path / str(i), how, edit) for i, edit in enumerate(("", "", "\nEDITED = True\n"))]
    digests = [assert_runs(show.format(str(place)), "-B") for place in places]
    assert len(digests[0]) == 65, "a hash"
    assert digests[0] == digests[1] != digests[2]


def test_nothing_is_kept_where_no_sources_can_be_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MATMUL_GRAD_CACHE", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    digest = build.sources_digest.__wrapped__()  # type: ignore[attr-defined]
    assert digest == ""
    monkeypatch.setattr(build, "sources_digest", lambda package=None: digest)
    assert build.object_path("key", "answer", machine()) is None
    assert load_answer() == 42
    assert not list(tmp_path.iterdir())


def test_key_depends_on_the_version_of_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    before = build.object_path("key", "answer", machine())
    monkeypatch.setattr(matmul_grad, "__version__", "0.0.0+other")
    build._versions.cache_clear()
    try:
        assert build.object_path("key", "answer", machine()) != before
    finally:
        monkeypatch.undo()
        build._versions.cache_clear()
    assert build.object_path("key", "answer", machine()) == before


def test_packages_without_metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> str:
        raise build.metadata.PackageNotFoundError(name)

    expected = build._version("llvmlite")
    monkeypatch.setattr(build.metadata, "version", fail)
    assert build._version("llvmlite") == expected


# --- compiling ----------------------------------------------------------------------------------------------

SETTINGS = {
    "NUMBA_DEBUGINFO": "1", "NUMBA_OPT": "0", "NUMBA_DISABLE_JIT": "1", "NUMBA_BOUNDSCHECK": "1",
    "NUMBA_DUMP_IR": "1", "NUMBA_DEBUG": "1", "NUMBA_FULL_TRACEBACKS": "1", "NUMBA_CPU_NAME": "generic",
    "NUMBA_LOOP_VECTORIZE": "0", "NUMBA_EXTEND_VARIABLE_LIFETIMES": "1",
}  # fmt: skip

COMPILE_SMALL = """
import gc, hashlib, os, sys
{first}
import matmul_grad
from matmul_grad.kernels.cpu import build, host
sys.path.insert(0, {folder!r})
build.SLOW = 1e6
def kernels():
    import small
    assert not gc.isenabled(), "a collection looks through all that torch has loaded"
    return {{"small": (small.kernel, small.SIGNATURE)}}
before = os.environ.copy()
build.load("small", "small", kernels, host.machine(host.cpu().isa), {{}})
assert gc.isenabled()
(path,) = build.cache_folder().glob("small-*.o")
print(path.name, hashlib.sha256(path.read_bytes()).hexdigest())
assert {first!r} or "numba.np.linalg" not in sys.modules, "what Numba has for arrays, and SciPy with it"
from numba import config
assert config.DISABLE_JIT == int(os.environ.get("NUMBA_DISABLE_JIT", "0"))
assert config.OPT == int(os.environ.get("NUMBA_OPT", "3"))
assert os.environ == before
"""


@pytest.mark.parametrize("first", ["", "import numba"])
def test_settings_of_numba_do_not_reach_the_kernels(first: str, tmp_path: Path) -> None:
    (tmp_path / "small.py").write_text(SMALL)
    code = COMPILE_SMALL.format(folder=str(tmp_path), first=first)
    expected = assert_runs(code, MATMUL_GRAD_CACHE=str(tmp_path / "plain"))
    chosen = {name: value for name, value in SETTINGS.items() if name != "NUMBA_DEBUG"}  # Numba's import would print
    assert assert_runs(code, MATMUL_GRAD_CACHE=str(tmp_path / "set"), **chosen) == expected


def test_product_compiled_under_the_settings_of_a_debugger(tmp_path: Path) -> None:
    """The entries and the driver of all dtypes are those of a wheel; the set of a dtype is compiled."""
    done = run(
        as_wheel(tmp_path / "objects")
        + """
import sys, torch, matmul_grad
from matmul_grad.testing import *
a, b = integers(40, 30, torch.float32, 1), integers(30, 20, torch.float32, 2)
with matmul_grad.strict():
    assert_same_bits(matmul_grad.mm(a, b), exact_product(a, b))
assert "numba" in sys.modules
""",
        MATMUL_GRAD_CACHE=str(tmp_path / "cache"),
        **SETTINGS,
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stderr[-3000:]


@pytest.mark.parametrize(("kernel", "name"), [("calls", "no_such_function"), ("reads", "no_such_data")])
def test_a_name_that_is_not_passed_is_an_error(kernel: str, name: str, tmp_path: Path) -> None:
    """LLVM would end the process."""
    (tmp_path / "small.py").write_text(SMALL)
    printed = assert_runs(
        f"""
        import sys, matmul_grad
        from matmul_grad.kernels.cpu import build, host
        sys.path.insert(0, {str(tmp_path)!r})
        import small  # LLVM ends a process that links an unknown name
        for symbols in ((), ({name!r},)):
            try:
                build.to_module({{"small": (small.{kernel}, small.SIGNATURE)}}, host.machine(host.cpu().isa), symbols)
                print("compiled")
            except RuntimeError as error:
                print(error)
        """
    )
    assert printed == f"the kernels small refer to {name}\ncompiled\n"


NOTICE = """
import sys, time, matmul_grad
from matmul_grad.kernels.cpu import build, host
build.SLOW = {slow}
{close}
def kernels():
    limit = time.monotonic() + 100
    while build.SLOW == 0 and not build._notified and time.monotonic() < limit:
        time.sleep(0.01)
    time.sleep(0.1)
    return {{"answer": "define i64 @answer() {{\\n  ret i64 42\\n}}\\n"}}
for key in ("a", "b"):
    build.load(key, "answer", kernels, host.machine(host.cpu().isa), {{}})
print(len(build._notified))
"""


def test_slow_compilation_is_reported_once(tmp_path: Path) -> None:
    folder = str(tmp_path / "cache")
    code = NOTICE.format(slow=0, close="")
    done = run(code, MATMUL_GRAD_CACHE=folder)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (0, "1\n", 1), done.stderr
    assert "compiling" in done.stderr and "answer" in done.stderr and "seconds" in done.stderr
    assert folder in done.stderr
    assert assert_runs(code, MATMUL_GRAD_CACHE=folder) == "0\n", "a warm start compiles nothing and tells nothing"
    assert assert_runs(NOTICE.format(slow=1000, close=""), MATMUL_GRAD_CACHE=folder + "2") == "0\n"


@pytest.mark.parametrize("close", ["sys.stderr.close()", "sys.stderr = None"])
def test_slow_compilation_where_stderr_is_closed(close: str, tmp_path: Path) -> None:
    done = run(NOTICE.format(slow=0, close=close), MATMUL_GRAD_CACHE=str(tmp_path))
    assert (done.returncode, done.stdout, done.stderr) == (0, "1\n", "")


# --- CPUs ---------------------------------------------------------------------------------------------------


# As a generic x86-64 is. With the kernels that are at hand: a process of that instruction set compiles all of them.
CANNOT_CONVERT = """
from dataclasses import replace
from matmul_grad.kernels.cpu import host
without = replace(host.cpu(), has_fp16_convert=False)
host.cpu = lambda isa=None: without
"""
FALLS_BACK = """
import torch, matmul_grad
from matmul_grad.testing import assert_same_bits, normal
for a, b in ((normal(8, 8, torch.float16, 1),) * 2, (normal(9, 40, torch.float16, 1), normal(40, 7, torch.float16, 2))):
    assert_same_bits(matmul_grad.mm(a, b), torch.mm(a, b), "torch's kernel")
    assert_same_bits(torch.ops.matmul_grad.mm(a, b), torch.mm(a, b), "torch's kernel")
    c = torch.mm(a, b)
    assert torch.equal(torch.ops.matmul_grad.mm_backward(c, a, b, [True, True])[0], torch.mm(c, b.t()))
with matmul_grad.strict():
    try: matmul_grad.mm(a, b)
    except RuntimeError as error: assert "torch's" in str(error), error
    else: raise AssertionError("not refused")
    matmul_grad.mm(a.float(), b.float())
"""


@pytest.mark.skipif(host.is_arm(), reason="Arm converts float16 with every instruction set")
@pytest.mark.parametrize(
    ("before", "isa"), [(CANNOT_CONVERT, {}), pytest.param("", {"MATMUL_GRAD_ISA": "generic"}, marks=pytest.mark.slow)],
    ids=["these-kernels", "generic-kernels"],
)  # fmt: skip
def test_float16_on_a_cpu_that_cannot_convert_it(before: str, isa: dict[str, str]) -> None:
    assert_runs(before + FALLS_BACK, **isa)
