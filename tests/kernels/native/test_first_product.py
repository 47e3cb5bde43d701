"""The first product of a dtype: loading its kernels under interrupts, forks, failures and at exit."""

import os
import re
import subprocess
import textwrap

import processes
import pytest
from limits import scaled

posix = pytest.mark.skipif(not hasattr(os, "fork"), reason="signals and forks of POSIX")
LIMIT = round(scaled(280))  # seconds that a child or a handler may take; what hangs takes longer

PRELUDE = """
import os, signal, sys, threading, time, torch, matmul_grad
from matmul_grad import ops
from matmul_grad.testing import *
from matmul_grad.kernels.cpu import build, driver

real_load, loads = build.load, []
build.SLOW = 1e6  # what it prints has tests of its own

def load_with(action):
    '''From now on the first load of a set of kernels is preceded by ``action``.'''
    waiting = [action]
    def load(key, name, *rest):
        loads.append(name)
        if waiting:
            waiting.pop()()
        return real_load(key, name, *rest)
    build.load = load

class Late(Exception): pass
class Stop(BaseException): pass

def check_interrupted(call, error):
    '''``call`` is interrupted by ``error`` while it loads kernels, and computes the product afterwards.'''
    handled = threading.Event()
    def handler(*_):
        handled.set()
        raise error("interrupted")
    def interrupt():
        os.kill(os.getpid(), signal.SIGUSR1)
        handled.wait(LIMIT)
    signal.signal(signal.SIGUSR1, handler)
    before = len(loads)
    load_with(interrupt)
    try:
        call()
    except error as found:
        assert type(found) is error and str(found) == "interrupted", repr(found)
    else:
        raise AssertionError(f"{error.__name__} did not arrive")
    assert len(loads) > before, "nothing was loaded, so nothing was interrupted"
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    with matmul_grad.strict():
        return call()
"""


def run(code: str, *options: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    return processes.run(f"LIMIT = {LIMIT}\n" + PRELUDE + textwrap.dedent(code), *options, **environment)


def assert_runs(code: str, **environment: str) -> str:
    """A fresh interpreter runs ``code``, ends well and prints no error; what it printed."""
    done = run(code, **environment)
    # CPython's own race: where a handler raises within Thread.start, the new thread ends with this message.
    noise = r"Exception ignored in thread started by.*?KeyError: <Thread\(matmul_grad[^\n]*\n"
    stderr = re.sub(noise, "", done.stderr, flags=re.DOTALL)
    assert (done.returncode, stderr) == (0, ""), f"{done.returncode}\n{done.stdout}\n{done.stderr[-3000:]}"
    return done.stdout


# --- interrupts ---------------------------------------------------------------------------------------------


@posix
def test_exception_of_a_signal_handler_reaches_the_caller() -> None:
    assert_runs(
        """
        assert ops.native_status() == ""
        calls = [
            (torch.float32, Late, lambda a: matmul_grad.mm(a, a), lambda a: torch.mm(a, a)),
            (torch.float64, KeyboardInterrupt, lambda a: matmul_grad.addmm(a, a, a), lambda a: torch.addmm(a, a, a)),
            (torch.bfloat16, Stop, lambda a: matmul_grad.bmm(a[None], a[None]), lambda a: torch.mm(a, a)[None]),
        ]
        if driver.supports("float16"):
            backward = lambda a: torch.ops.matmul_grad.mm_backward.default(a, a, a, [True, True])[0]
            calls.append((torch.float16, SystemExit, backward, lambda a: torch.mm(a, a.t())))
        for dtype, error, ours, theirs in calls:
            a = integers(8, 8, dtype, 1)
            assert_same_bits(check_interrupted(lambda: ours(a), error), theirs(a))
        """
    )


@posix
def test_interrupt_while_the_override_is_on() -> None:
    assert_runs(
        """
        a = integers(8, 8, torch.float32, 1)
        expected = torch.mm(a, a)
        with matmul_grad.enabled():
            assert_same_bits(check_interrupted(lambda: torch.mm(a, a), KeyboardInterrupt), expected)
            wide = a.double().requires_grad_()
            check_interrupted(lambda: torch.mm(wide, wide), Late)
        """
    )


@posix
def test_interrupt_while_the_entries_are_loaded() -> None:
    assert_runs(
        """
        a = integers(8, 8, torch.float32, 1)
        expected = torch.mm(a, a)
        def enable_and_multiply():
            with matmul_grad.enabled():
                return torch.mm(a, a)
        assert_same_bits(check_interrupted(enable_and_multiply, KeyboardInterrupt), expected)
        assert matmul_grad.info()["on"] == []
        assert_same_bits(check_interrupted(lambda: matmul_grad.mm(a, a), Late), expected)
        assert ops.native_status() == ""
        """
    )


@posix
def test_storm_of_signals_during_the_first_products() -> None:
    assert_runs(
        """
        count = [0]
        def handler(*_):
            count[0] += 1
            raise Late
        signal.signal(signal.SIGALRM, handler)
        for dtype in (torch.float32, torch.float64):
            a, product = integers(8, 8, dtype, 1), None
            expected = exact_product(a, a)
            for seconds in [0.002] * 2000 + [60]:
                try:
                    signal.setitimer(signal.ITIMER_REAL, seconds)
                    product = matmul_grad.mm(a, a)
                    signal.setitimer(signal.ITIMER_REAL, 0)
                    break
                except Late:
                    pass
            assert_same_bits(product, expected)
        assert count[0] and ops.native_status() == ""
        """
    )


# --- failures -----------------------------------------------------------------------------------------------


def test_dtype_whose_kernels_do_not_compile_falls_back() -> None:
    done = run(
        """
        def fail():
            raise RuntimeError("no compiler")
        a = integers(8, 8, torch.float32, 1)
        matmul_grad.mm(a.double(), a.double())  # and so the driver of all dtypes is loaded
        load_with(fail)
        for _ in range(3):
            assert_same_bits(matmul_grad.mm(a, a), torch.mm(a, a))
        with matmul_grad.strict():
            matmul_grad.mm(a.double(), a.double())
            matmul_grad.mm(a.bfloat16(), a.bfloat16())
            try: matmul_grad.mm(a, a)
            except RuntimeError: pass
            else: raise AssertionError("not refused")
        """
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("no compiler") == done.stderr.count("\n") == 1, done.stderr


@pytest.mark.parametrize("error", ["OSError('no disk')", "MemoryError()", "KeyError('numba')", "RuntimeError('LLVM')"])
def test_entries_that_cannot_be_loaded_cost_the_speed_alone(error: str) -> None:
    done = run(
        f"""
        def fail():
            raise {error}
        a = integers(8, 8, torch.float32, 1)
        load_with(fail)
        with matmul_grad.strict():
            assert_same_bits(matmul_grad.mm(a, a), torch.mm(a, a))
            x = a.clone().requires_grad_()
            matmul_grad.mm(x, a).sum().backward()
        assert ops.native_status() != ""
        """
    )
    assert (done.returncode, done.stderr.count("\n")) == (0, 1), done.stderr


def test_everything_falls_back_without_kernels() -> None:
    done = run(
        """
        def fail(*_):
            raise RuntimeError("no LLVM")
        build.load = fail
        a = integers(8, 8, torch.float32, 1)
        for _ in range(2):
            assert_same_bits(matmul_grad.mm(a, a), torch.mm(a, a))
            assert_same_bits(matmul_grad.addmm(a, a, a), torch.addmm(a, a, a))
        """
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("no LLVM") == 2, done.stderr


def test_stderr_that_is_closed_is_not_written_to() -> None:
    for close in ("sys.stderr.close()", "sys.stderr = None"):
        done = run(
            f"""
            def fail(*_):
                raise RuntimeError("no LLVM")
            build.load = fail
            {close}
            a = integers(8, 8, torch.float32, 1)
            assert matmul_grad.mm(a, a).shape == a.shape
            """
        )
        assert (done.returncode, done.stdout) == (0, ""), close


# --- forks --------------------------------------------------------------------------------------------------

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
def test_fork_while_another_thread_compiles(tmp_path: object) -> None:
    """The child can compile with Numba, whose lock the compiling thread holds."""
    done = run(
        FORK
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
        MATMUL_GRAD_CACHE=str(tmp_path),
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


# --- the end of a process -----------------------------------------------------------------------------------


# Not by a daemon thread: Python before 3.14 ends one by unwinding its stack, which C++ frames on it may not survive.
@pytest.mark.parametrize("when", ["atexit", "thread"])
def test_first_product_at_the_end_of_a_process(when: str) -> None:
    printed = assert_runs(
        f"""
        import atexit
        a = integers(8, 8, torch.float32, 1)
        started = threading.Event()
        def multiply():
            started.set()
            assert_same_bits(matmul_grad.mm(a, a), exact_product(a, a))
            print("right")
        if {when!r} == "atexit":
            atexit.register(multiply)
        else:
            threading.Thread(target=multiply).start()
            started.wait()
        """
    )
    assert printed == "right\n"
