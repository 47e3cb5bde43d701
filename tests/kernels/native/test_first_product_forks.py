"""Forks while another thread makes the first product of a dtype, and first products in a child."""

import os
from pathlib import Path

import processes
import pytest
from first_product import LIMIT, assert_runs, run
from kernel_sets import as_wheel

posix = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks of POSIX")

FORK = """
def fork_and(child):
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        signal.alarm(LIMIT)  # ends a child that hangs
        try:
            child()
            os._exit(0)
        except BaseException as error:
            os.write(2, repr(error).encode())
        os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status == 0, f"the child ended with {status}"
"""


@posix
def test_fork_while_another_thread_asks_llvm_for_the_cpu() -> None:
    """llvmlite locks in each of its functions, and a child cannot release what another thread held."""
    assert_runs(
        FORK
        + """
import llvmlite.binding as llvm
from matmul_grad.kernels.cpu import host
ops.native_status()  # which asks it too, where forks wait
host.host_name.cache_clear()
real, lock, asking = llvm.get_host_cpu_name, threading.Lock(), threading.Event()
def slow():
    with lock:
        asking.set()
        time.sleep(1)
        return real()
llvm.get_host_cpu_name = slow
a = integers(64, 64, torch.float32, 1)
def multiply():
    with matmul_grad.strict():
        matmul_grad.mm(a, a)
first = threading.Thread(target=multiply)
first.start()
asking.wait()
fork_and(multiply)
first.join()
"""
    )


@posix
@pytest.mark.parametrize("entries", ["loaded", "not yet"])
def test_fork_while_another_thread_makes_the_first_product(entries: str) -> None:
    assert_runs(
        FORK
        + f"""
a, loading = integers(64, 64, torch.float32, 1), threading.Event()
if {entries!r} == "loaded":
    ops.native_status()
def slow():
    loading.set()
    time.sleep(1)
load_with(slow)
first = threading.Thread(target=lambda: matmul_grad.mm(a, a))
first.start()
loading.wait()
def child():
    with matmul_grad.strict():
        for dtype in (torch.float32, torch.float64):
            matmul_grad.mm(a.to(dtype), a.to(dtype))
fork_and(child)
first.join()
"""
    )


@posix
def test_fork_while_another_thread_compiles(tmp_path: Path) -> None:
    """The child can compile with Numba, whose lock the compiling thread holds."""
    done = run(
        FORK
        + as_wheel(tmp_path / "objects")
        + """
entries, compiling = ops.native_status(), threading.Event()
os.environ["MATMUL_GRAD_CACHE"] += "_empty"
a = integers(64, 64, torch.float32, 1)
load_with(compiling.set)
first = threading.Thread(target=lambda: matmul_grad.mm(a, a))
first.start()
compiling.wait()
while "numba" not in sys.modules or not hasattr(sys.modules["numba"], "njit"):
    time.sleep(0.01)
def child():
    import numba
    assert numba.njit(lambda x: x + 1)(1) == 2
    with matmul_grad.strict():
        matmul_grad.mm(a, a)
fork_and(child)
first.join()
""",
        MATMUL_GRAD_CACHE=str(tmp_path / "cache"),
    )
    assert done.returncode == 0, done.stderr


@posix
@pytest.mark.parametrize(
    "lock", ["strict_mode._lock", "settings._lock", "aten_override._lock", "aten_override_cuda._counting", "cuda._lock"]
)
def test_fork_while_another_thread_holds_a_lock(lock: str) -> None:
    assert_runs(
        FORK
        + f"""
from matmul_grad import aten_override, aten_override_cuda, cuda, settings, strict_mode
held = threading.Event()
def hold():
    with {lock}:
        held.set()
        time.sleep(0.5)
holder = threading.Thread(target=hold)
holder.start()
held.wait()
def child():
    with {lock}:
        pass
fork_and(child)
holder.join()
with {lock}:
    pass
"""
    )


@posix
def test_first_product_in_a_child_after_torch_used_its_threads() -> None:
    """Of a parent that has imported the package and never used it; torch's product would hang."""
    done = processes.run(
        f"LIMIT = {LIMIT}\nimport os, signal, sys, torch, matmul_grad\n"
        + FORK
        + """
torch.set_num_threads(2)
a = torch.arange(600 * 600, dtype=torch.float32).reshape(600, 600) % 7
expected = torch.mm(a, a).numpy().tobytes()
def child():
    assert matmul_grad.mm(a, a).numpy().tobytes() == expected
fork_and(child)
"""
    )
    assert done.returncode == 0, done.stderr
