"""The first product of a dtype: loading its kernels under interrupts, failures and at exit."""

import os

import pytest
from first_product import assert_runs, run

posix = pytest.mark.skipif(not hasattr(os, "fork"), reason="signals and forks of POSIX")
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


def test_sets_are_loaded_when_they_are_needed() -> None:
    """A gradient needs the entries of backward, an activation what stores it; a product alone neither."""
    assert_runs(
        """
load_with(lambda: None)
a, block = integers(8, 8, torch.float32, 1), driver.config("float32").name
def loaded_by(call):
    loads.clear()
    call()
    return loads
assert loaded_by(lambda: matmul_grad.mm(a, a)) == ["own_entries", "gemm", block]
assert loaded_by(lambda: matmul_grad.mm(a.clone().requires_grad_(), a)) == ["gradient_entries"]
assert loaded_by(lambda: matmul_grad.linear(a, a, activation="relu")) == ["derivative", f"{block}_activations"]
with matmul_grad.strict():
    assert_same_bits(matmul_grad.mm(a, a), exact_product(a, a))
    assert_same_bits(matmul_grad.linear(a, a, activation="relu"), exact_product(a, a.t()).relu())
"""
    )
