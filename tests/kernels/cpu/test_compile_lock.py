"""Of the processes and threads that start together one compiles a set; a lock that is kept or missing stops nobody."""

import ctypes
import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import processes
import pytest
from kernel_sets import copy_cache
from limits import scaled

from matmul_grad.kernels.cpu import build, compile_beside, compile_lock, host

pytestmark = pytest.mark.skipif(compile_lock.fcntl is None, reason="locks of POSIX")

ANSWER = "define i64 @answer() {\n  ret i64 42\n}\n"
# Imports these kernels alone, without torch. Compiles `answer` once the file `begin` is there, and adds a letter to the
# file `compiled`. `hold` is how it goes on.
PROGRAM = """
import ctypes, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from cpu import build, host
folder, hold = Path(sys.argv[2]), sys.argv[3:] == ["hold"]
def kernels():
    with open(folder / "compiled", "a") as file:
        file.write("x")
    time.sleep(10_000 if hold else 0.5)
    return {"answer": "define i64 @answer() {\\n  ret i64 42\\n}\\n"}
print("ready", flush=True)
while not (folder / "begin").exists():
    time.sleep(0.001)
loaded = build.load("test", "answer", kernels, host.machine(host.cpu().isa), {})
print(ctypes.CFUNCTYPE(ctypes.c_int64)(loaded.address("answer"))())
"""


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("MATMUL_GRAD_CACHE", str(folder))
    return folder


def start(folder: Path, *arguments: str) -> "subprocess.Popen[str]":
    """A process that is about to load `answer`."""
    command = [sys.executable, "-c", PROGRAM, str(Path(build.__file__).parents[1]), str(folder), *arguments]
    process = subprocess.Popen(command, env=dict(os.environ), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


def finish(process: "subprocess.Popen[str]") -> str:
    out, _ = process.communicate(timeout=scaled(120))
    assert process.returncode == 0
    return out


def wait_for(path: Path) -> None:
    limit = time.monotonic() + scaled(120)
    while not path.exists():
        assert time.monotonic() < limit, path
        time.sleep(0.01)


def load_answer(compiled: list[str], seconds: float = 0.0) -> int:
    def kernels() -> dict[str, str]:
        compiled.append("x")
        time.sleep(seconds)
        return {"answer": ANSWER}

    loaded = build.load("test", "answer", kernels, host.machine(host.cpu().isa), {})
    return ctypes.CFUNCTYPE(ctypes.c_int64)(loaded.address("answer"))()


def test_processes_compile_once_between_them(cache: Path, tmp_path: Path) -> None:
    processes = [start(tmp_path) for _ in range(3)]
    (tmp_path / "begin").touch()
    assert [finish(process) for process in processes] == ["42\n"] * 3
    assert (tmp_path / "compiled").read_text() == "x"
    assert [path.suffix for path in cache.iterdir()] == [".o"], "the lock is gone"


def test_threads_compile_once_between_them(cache: Path) -> None:
    compiled: list[str] = []
    together = threading.Barrier(3)

    def load(_: int) -> int:
        together.wait()
        return load_answer(compiled, seconds=0.3)

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(load, range(3))) == [42] * 3
    assert compiled == ["x"]


def test_a_holder_that_is_killed_blocks_nobody(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "begin").touch()
    holder = start(tmp_path, "hold")
    wait_for(tmp_path / "compiled")
    other = start(tmp_path)
    with pytest.raises(subprocess.TimeoutExpired):
        other.communicate(timeout=1.0)  # it waits
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    assert finish(other) == "42\n"
    assert (tmp_path / "compiled").read_text() == "xx"


def test_a_holder_that_never_ends_is_not_waited_for(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "begin").touch()
    holder = start(tmp_path, "hold")
    wait_for(tmp_path / "compiled")
    monkeypatch.setattr(compile_lock, "LONGEST", 0.2)
    compiled: list[str] = []
    assert load_answer(compiled) == 42
    assert compiled == ["x"] and holder.poll() is None
    holder.kill()
    holder.communicate()


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL])
def test_a_file_system_without_locks(code: int, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(code, "no locks here")

    monkeypatch.setattr(compile_lock.fcntl, "flock", refuse)
    compiled: list[str] = []
    assert [load_answer(compiled), load_answer(compiled)] == [42, 42]
    assert compiled == ["x"], "kept all the same"


def test_a_system_without_locks(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_lock, "fcntl", None)
    assert load_answer([]) == 42


def test_a_folder_that_cannot_be_written(cache: Path) -> None:
    cache.write_text("a file stands where the folder should be")
    compiled: list[str] = []
    assert [load_answer(compiled), load_answer(compiled)] == [42, 42]
    assert compiled == ["x", "x"]


def test_a_failure_releases_the_lock(cache: Path) -> None:
    def fail() -> dict[str, str]:
        raise ValueError("cannot be compiled")

    machine = host.machine(host.cpu().isa)
    for _ in range(2):
        with pytest.raises(ValueError, match="cannot be compiled"):
            build.load("test", "answer", fail, machine, {})
    assert not list(cache.iterdir())
    assert load_answer([]) == 42


# --- a second process ---------------------------------------------------------------------------------------

# The operators take 15 s to compile: their object stands at hand, and is taken once another process is at work.
FIRST_PRODUCT = """
import pathlib, sys, time, torch, matmul_grad
from matmul_grad.kernels.cpu import build, compile_beside, config, driver, object_file
build.SLOW = 1e6
compile_beside.usable_cores = lambda: 2
compiled = []
def to_object(key, name, kernels, *rest, original=build.compiled):
    if name == "own_entries":
        assert "matmul_grad_mm" in kernels()
        compiled.append("operators")
        limit = time.monotonic() + float(sys.argv[2])
        while not locks() and time.monotonic() < limit:
            time.sleep(0.01)  # until the other process is at work
        return object_file.read(pathlib.Path(sys.argv[1]))
    return original(key, name, kernels, *rest)
def to_module(kernels, *rest, original=build.to_module):
    compiled.append("gemm")
    return original(kernels, *rest)
def locks():
    name = driver.config("float32").name
    return [path for path in build.cache_folder().iterdir() if path.name.startswith(name)]
build.compiled, build.to_module = to_object, to_module
a = torch.arange(6.0).view(2, 3)
with matmul_grad.strict():
    assert torch.equal(matmul_grad.mm(a, a.t()), a @ a.t())
assert matmul_grad.ops.native_status() == ""
print(*compiled)
"""


def test_operators_and_gemm_are_compiled_side_by_side(tmp_path: Path) -> None:
    warm, cache = tmp_path / "warm", tmp_path / "cache"
    copy_cache(warm)
    (operators,), (driver,) = (warm.glob(f"{name}-*.o") for name in ("own_entries", "gemm"))
    cache.mkdir()
    shutil.copy(driver, cache)
    arguments = str(operators), str(scaled(120))
    done = processes.run(FIRST_PRODUCT, arguments=arguments, MATMUL_GRAD_CACHE=str(cache))
    assert (done.returncode, done.stdout, done.stderr) == (0, "operators\n", "")
    assert len(list(cache.glob("*.o"))) == len(list(cache.iterdir())) > 1


def test_second_process_needs_no_torch(tmp_path: Path) -> None:
    """It finds the objects under the names that this process gives them, and so compiles nothing here."""
    copy_cache(tmp_path / "cache", "float32")
    kept = {path.name for path in (tmp_path / "cache").iterdir()}
    without = "import sys\nsys.modules['torch'] = sys.modules['numba'] = None\n"
    done = processes.run(without + compile_beside.program("float32"), MATMUL_GRAD_CACHE=str(tmp_path / "cache"))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert {path.name for path in (tmp_path / "cache").iterdir()} == kept


@pytest.mark.parametrize("lacks", ["core", "Python", "folder", "locks", "frozen"])
def test_no_second_process_where_it_would_not_help(lacks: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(compile_beside, "_started", [])
    monkeypatch.setattr(compile_beside, "usable_cores", lambda: 2)
    monkeypatch.setenv("MATMUL_GRAD_CACHE", str(tmp_path))
    assert compile_beside.is_possible()
    if lacks == "core":
        monkeypatch.setattr(compile_beside, "usable_cores", lambda: 1)
    elif lacks == "Python":
        monkeypatch.setattr(sys, "executable", "")
    elif lacks == "folder":
        monkeypatch.setattr(build, "cache_folder", lambda: None)
    elif lacks == "locks":
        monkeypatch.setattr(compile_lock, "fcntl", None)
    else:
        monkeypatch.setattr(sys, "frozen", True, raising=False)
    assert not compile_beside.is_possible()
    compile_beside.start("float32")
    assert not compile_beside._started
