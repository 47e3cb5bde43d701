"""The override under threads, interrupts and forks: on and off, never between."""

import threading

import pytest
import torch
from limits import scaled
from processes import assert_runs, linux
from switch import registrations, runs_on_ours

import matmul_grad
from matmul_grad import aten_override

pytestmark = pytest.mark.usefixtures("off_before_and_after")
LIMIT = scaled(60)  # seconds that a thread or a child may take; a hang takes longer


def test_blocks_of_threads_that_overlap() -> None:
    """The first to open is the first to close: the other one still runs on these kernels, and then torch is back."""
    inside, leave, left, results = threading.Event(), threading.Event(), threading.Event(), []

    def first() -> None:
        with matmul_grad.enabled():
            inside.set()
            leave.wait(LIMIT)
        left.set()

    thread = threading.Thread(target=first)
    thread.start()
    assert inside.wait(LIMIT)
    with matmul_grad.enabled():
        leave.set()
        assert left.wait(LIMIT)
        thread.join(LIMIT)
        results.append(runs_on_ours())
    results.append(runs_on_ours())
    assert results == [True, False]


def test_many_threads_switch_while_others_multiply() -> None:
    before, failures, stop = registrations(), [], threading.Event()
    a, b = (torch.arange(35.0) % 5).view(5, 7), (torch.arange(21.0) % 4).view(7, 3)
    expected = torch.from_numpy(a.numpy() @ b.numpy())

    def guarded(work):  # type: ignore[no-untyped-def]
        def run() -> None:
            try:
                work()
            except BaseException as error:
                failures.append(error)

        return run

    def multiply() -> None:
        while not stop.is_set():
            assert torch.equal(torch.mm(a, b), expected)
            assert torch.equal(torch.addmm(expected, a, b, beta=-1), torch.zeros(5, 3))

    def flip() -> None:
        for turn in range(150):
            with matmul_grad.enabled():
                if turn % 3 == 0:
                    matmul_grad.enable()
                assert torch.equal(torch.mm(a, b), expected)

    flipping = [threading.Thread(target=guarded(flip)) for _ in range(3)]
    multiplying = [threading.Thread(target=guarded(multiply)) for _ in range(2)]
    for thread in flipping + multiplying:
        thread.start()
    for thread in flipping:
        thread.join(LIMIT)
    stop.set()
    for thread in multiplying:
        thread.join(LIMIT)
    assert not any(thread.is_alive() for thread in flipping + multiplying)
    assert not failures, failures[0]
    matmul_grad.disable()
    assert not aten_override._blocks
    assert registrations() == before


@linux
def test_state_after_an_interrupt_is_reported_by_info() -> None:
    """SIGINT arrives hundreds of times while the switch flips: whatever it is then, info() knows, and so does torch."""
    printed = assert_runs(
        f"""
        import random, signal, threading, time
        matmul_grad.enable(); matmul_grad.disable()
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for what runs behind it
        main, hits = threading.main_thread().ident, 0

        def ours():
            before = matmul_grad.info()["accelerated"]
            torch.mm(torch.ones(2, 2), torch.ones(2, 2))
            return matmul_grad.info()["accelerated"] != before

        def pester():
            ready.wait()  # until interrupts are caught
            for _ in range(5):
                time.sleep(random.random() / 300)
                before, sent = hits, time.monotonic()
                signal.pthread_kill(main, signal.SIGINT)
                while hits == before and time.monotonic() < sent + {scaled(10)}:  # where a finalizer does not drop it
                    time.sleep(0.001)  # the next one may not arrive while this one is handled

        end = time.monotonic() + {scaled(800)}
        while hits < 100 and time.monotonic() < end:
            pesterer, ready = threading.Thread(target=pester), threading.Event()
            pesterer.start()
            while True:
                try:
                    ready.set()
                    while pesterer.is_alive():
                        with matmul_grad.enabled():
                            pass
                        matmul_grad.enable()
                        matmul_grad.disable()
                    break
                except KeyboardInterrupt:
                    hits += 1
            assert ours() == (matmul_grad.info()["on"] == ["cpu"])
        matmul_grad.disable()
        assert not ours()
        assert "CPU: registered at matmul_grad" not in torch._C._dispatch_dump("aten::mm")
        print(hits >= 100)
        """
    )
    assert printed == "True\n"


@pytest.mark.parametrize("switch", ["grouped.GroupedOverride()", "cuda.CudaOverride('CPU')"])
def test_interrupt_at_any_line_of_the_registration(switch: str) -> None:
    """Whichever line of it, or of torch.library, does not run: the kernels can be put there, and taken away, again."""
    assert_runs(
        f"""
        from matmul_grad import aten_override_cuda as cuda, aten_override_grouped as grouped
        from matmul_grad.kernels.native.op_table import OVERLOADS
        FILES = cuda.__file__, grouped.__file__, torch.library.__file__
        switch = {switch}

        class Interrupt(BaseException):
            pass

        def registered():
            return [torch._C._dispatch_dump(f"aten::{{name}}") for name in ("_grouped_mm", "linear", *OVERLOADS)]

        def uninstall():
            switch.uninstall(*[True] * ("Grouped" in type(switch).__name__))

        def interrupted(change, line):
            def trace(frame, event, _):
                nonlocal line
                if frame.f_code.co_filename not in FILES:
                    return None
                line -= event == "line"
                if line < 0:
                    raise Interrupt
                return trace
            sys.settrace(trace)
            try:
                change()
            except Interrupt:
                return True
            finally:
                sys.settrace(None)
            return False

        before, lines = registered(), 0
        for change in (switch.install, uninstall):
            line = 0
            while True:
                if change is uninstall:
                    switch.install()
                again = interrupted(change, line)
                if switch._library is None:
                    switch.install()
                assert registered() != before, (change, line)
                uninstall()
                assert registered() == before, (change, line)
                if not again:
                    break
                line += 1
            lines += line
        assert lines >= 4, lines
        """
    )


@linux
def test_forked_child_inherits_the_override() -> None:
    assert_runs(
        f"""
        import signal, threading
        torch.set_num_threads(1)
        a = torch.arange(9.0).view(3, 3)
        expected = a.numpy() @ a.numpy()
        def child_is_right(on):
            child = os.fork()
            if child == 0:
                signal.alarm({round(LIMIT)})
                ok = matmul_grad.info()["on"] == (["cpu"] if on else []) and (torch.mm(a, a).numpy() == expected).all()
                for flip in (matmul_grad.disable, matmul_grad.enable, matmul_grad.disable):
                    flip()
                    ok &= bool((torch.mm(a, a).numpy() == expected).all())
                os._exit(0 if ok else 1)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        with matmul_grad.enabled():
            child_is_right(True)
        child_is_right(False)
        stop = threading.Event()
        def flip():
            while not stop.is_set():
                with matmul_grad.enabled():
                    pass
        thread = threading.Thread(target=flip)
        thread.start()
        for _ in range(20):
            child = os.fork()  # while another thread holds the lock, or not
            if child == 0:
                signal.alarm({round(LIMIT)})
                matmul_grad.enable()
                matmul_grad.disable()
                os._exit(0)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        stop.set()
        thread.join({LIMIT})
        """,
        "-W", "ignore::DeprecationWarning",
    )  # fmt: skip
