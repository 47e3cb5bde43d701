"""The switch itself: on and off, blocks, threads, exceptions, forks, quiet, counted, exactly undone."""

import subprocess
import sys
import textwrap
import threading
import weakref
from collections.abc import Iterator

import pytest
import torch
from limits import scaled

import matmul_grad
from matmul_grad import aten_override, cli
from matmul_grad.kernels.cpu.once import Once
from matmul_grad.kernels.native import override_cpu, override_probe, torch_layout
from matmul_grad.kernels.native.op_table import OVERLOADS

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc, forks")


@pytest.fixture(autouse=True)
def off_before_and_after() -> Iterator[None]:
    assert matmul_grad.info()["on"] == []
    matmul_grad.disable()  # what a block left in place for the next one is removed
    yield
    left_on = matmul_grad.info()["on"]
    matmul_grad.disable()
    assert left_on == []


def registrations() -> dict[str, list[str]]:
    """By overload, every kernel that torch has on record, and which one each key would call."""
    return {
        name: [*torch._C._dispatch_dump(f"aten::{name}").split("\n"), torch._C._dispatch_dump_table(f"aten::{name}")]
        for name in OVERLOADS
    }


def runs_on_ours() -> bool:
    """Whether a product is counted."""
    before = matmul_grad.info()["accelerated"]
    torch.mm(torch.ones(2, 2), torch.ones(2, 2))
    return matmul_grad.info()["accelerated"] != before


def assert_runs(code: str, *options: str) -> str:
    """A fresh interpreter runs ``code`` and ends well, without a word on stderr; what it printed."""
    done = subprocess.run(
        [sys.executable, *options, "-c", "import os, sys, torch, matmul_grad\n" + textwrap.dedent(code)],
        capture_output=True, text=True, timeout=scaled(900),
    )  # fmt: skip
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr[-3000:]}"
    assert done.stderr == ""
    return done.stdout


# --- on and off ---------------------------------------------------------------------------------------------


def test_only_the_cpu_kernels_change_and_come_back() -> None:
    before = registrations()
    matmul_grad.enable()
    during = registrations()
    matmul_grad.disable()
    assert registrations() == before
    for name in OVERLOADS:
        *old, _ = before[name]
        *new, _ = during[name]
        changed = [line for line in new if line not in old]
        assert [line.split(":")[0] for line in changed] == ["CPU", "CPU (inactive)"], changed
        assert changed[0] == "CPU: registered at matmul_grad:0 :: (none) [ boxed ]"


def test_enable_and_disable_may_be_called_again() -> None:
    before = registrations()
    for _ in range(3):
        matmul_grad.enable()
        matmul_grad.enable()
        assert runs_on_ours()
        assert matmul_grad.info()["on"] == ["cpu"]
        matmul_grad.disable()
        matmul_grad.disable()
        assert not runs_on_ours()
        assert matmul_grad.info()["on"] == []
    assert registrations() == before


def test_every_overload_is_taken_over() -> None:
    a, batch = torch.ones(3, 3), torch.ones(2, 3, 3)
    with matmul_grad.enabled():
        for operands, operator in (
            ((a, a), "mm"),
            ((a, a, a), "addmm"),
            ((batch,) * 2, "bmm"),
            ((batch,) * 3, "baddbmm"),
        ):
            before = matmul_grad.info()["accelerated"].get(operator, {}).get("float32", 0)
            getattr(torch, operator)(*operands)
            getattr(torch, operator)(*operands, out=torch.empty_like(operands[0]))
            calls = 2
            if "add" in operator:
                getattr(operands[0].clone(), f"{operator}_")(*operands[1:])
                calls = 3
            assert matmul_grad.info()["accelerated"][operator]["float32"] - before == calls


def test_blocks_nest_and_restore() -> None:
    with matmul_grad.enabled():
        assert runs_on_ours()
        with matmul_grad.enabled():
            assert runs_on_ours()
        assert runs_on_ours()
        matmul_grad.disable()
        assert not runs_on_ours()
        with matmul_grad.enabled():
            assert runs_on_ours()
        assert not runs_on_ours()
    assert not runs_on_ours()
    matmul_grad.enable()
    with matmul_grad.enabled():
        matmul_grad.disable()
    assert runs_on_ours()
    matmul_grad.disable()


def test_a_block_decorates() -> None:
    decorated = matmul_grad.enabled()(runs_on_ours)
    assert (decorated(), decorated(), runs_on_ours()) == (True, True, False)


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_exceptions_restore(kind: type[BaseException]) -> None:
    with pytest.raises(kind), matmul_grad.enabled(), matmul_grad.enabled():
        assert runs_on_ours()
        raise kind
    assert not runs_on_ours()


def test_blocks_of_threads_that_overlap() -> None:
    """The first to open is the first to close: the other one still runs on these kernels, and then torch is back."""
    inside, leave, left, results = threading.Event(), threading.Event(), threading.Event(), []

    def first() -> None:
        with matmul_grad.enabled():
            inside.set()
            leave.wait(30)
        left.set()

    thread = threading.Thread(target=first)
    thread.start()
    inside.wait(30)
    with matmul_grad.enabled():
        leave.set()
        assert left.wait(30)
        thread.join(30)
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
        thread.join(60)
    stop.set()
    for thread in multiplying:
        thread.join(60)
    assert not any(thread.is_alive() for thread in flipping + multiplying)
    assert not failures, failures[0]
    matmul_grad.disable()
    assert not aten_override._blocks
    assert registrations() == before


@linux
def test_interrupts_at_any_moment_leave_a_state_that_is_told() -> None:
    """SIGINT arrives hundreds of times while the switch flips: whatever it is then, info() knows, and so does torch."""
    printed = assert_runs(
        """
        import random, signal, threading, time
        matmul_grad.enable(); matmul_grad.disable()
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for what runs behind it
        main, hits = threading.main_thread().ident, 0

        def ours():
            before = matmul_grad.info()["accelerated"]
            torch.mm(torch.ones(2, 2), torch.ones(2, 2))
            return matmul_grad.info()["accelerated"] != before

        def pester():
            time.sleep(0.02)
            for _ in range(5):
                time.sleep(random.random() / 300)
                signal.pthread_kill(main, signal.SIGINT)

        end = time.monotonic() + 900
        while hits < 100 and time.monotonic() < end:
            pesterer = threading.Thread(target=pester)
            pesterer.start()
            while pesterer.is_alive():
                try:
                    while pesterer.is_alive():
                        with matmul_grad.enabled():
                            pass
                        matmul_grad.enable()
                        matmul_grad.disable()
                    time.sleep(0.01)
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


@linux
def test_a_forked_child_has_the_switch_as_it_was() -> None:
    assert_runs(
        """
        import signal, threading
        torch.set_num_threads(1)
        a = torch.arange(9.0).view(3, 3)
        expected = a.numpy() @ a.numpy()
        def child_is_right(on):
            child = os.fork()
            if child == 0:
                signal.alarm(30)
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
                signal.alarm(30)
                matmul_grad.enable()
                matmul_grad.disable()
                os._exit(0)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        stop.set()
        thread.join(30)
        """,
        "-W", "ignore::DeprecationWarning",
    )  # fmt: skip


# --- quiet, counted, strict ---------------------------------------------------------------------------------


def test_torchs_warning_is_not_shown() -> None:
    """Not on stderr and not as a warning of Python's; with warnings as errors, and under modes of Python's."""
    assert_runs(
        """
        from torch.utils._python_dispatch import TorchDispatchMode
        from torch.overrides import TorchFunctionMode

        class Refuse(TorchDispatchMode):
            def __torch_dispatch__(self, *_):
                raise AssertionError("the switch is none of a mode's business")

        class RefuseFunctions(TorchFunctionMode):
            def __torch_function__(self, *_):
                raise AssertionError("the switch is none of a mode's business")

        with Refuse(), RefuseFunctions():
            matmul_grad.enable()
        assert torch.mm(torch.ones(2, 2), torch.ones(2, 2)).tolist() == [[2.0, 2.0], [2.0, 2.0]]
        matmul_grad.disable()
        """,
        "-W", "error",
    )  # fmt: skip


def test_importing_and_asking_brings_in_no_compiler() -> None:
    assert_runs(
        """
        matmul_grad.info(), matmul_grad.disable()
        assert not {"numba", "llvmlite", "triton"} & set(sys.modules)
        """
    )


def test_calls_are_counted_by_operator_and_dtype() -> None:
    before = matmul_grad.info()
    a = torch.ones(3, 3)
    torch.mm(a, a)
    assert matmul_grad.info() == before, "nothing is counted while it is off"
    with matmul_grad.enabled():
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64):
            for _ in range(3):
                torch.addmm(a.to(dtype), a.to(dtype), a.to(dtype))
        with pytest.raises(RuntimeError):
            torch.mm(a, a[:2])
        torch.mm(a[:0], a)
    after = matmul_grad.info()

    def grown(outcome: str) -> dict[str, int]:
        old, new = before[outcome].get("addmm", {}), after[outcome]["addmm"]
        return {dtype: calls - old.get(dtype, 0) for dtype, calls in new.items() if calls != old.get(dtype, 0)}

    assert grown("accelerated") == dict.fromkeys(("float32", "float64", "bfloat16", "float16"), 3)
    assert grown("handed_over") == {"int64": 3}
    assert after["accelerated"].get("mm") == before["accelerated"].get("mm")


def test_the_command_says_whether_it_is_on(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info"]) == 0
    assert "\nswitch           off" in capsys.readouterr().out
    with matmul_grad.enabled():
        torch.mm(torch.ones(3, 3), torch.ones(3, 3))
        torch.mm(torch.ones(3, 3).int(), torch.ones(3, 3).int())
        assert cli.main(["info"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("switch"))
    assert line.startswith("switch           on for cpu; accelerated ")
    assert "handed over" in line
    for part in ("mm float32 ", "mm int32 "):
        assert part in line


# --- where it cannot be -------------------------------------------------------------------------------------


def assert_cannot_be_switched_on(reason: str) -> None:
    with pytest.raises(RuntimeError, match=rf"matmul_grad\.enable\(\): torch's products cannot be replaced.*{reason}"):
        matmul_grad.enable()
    with pytest.raises(RuntimeError, match=reason), matmul_grad.enabled():
        pytest.fail("the block must not run")
    assert not runs_on_ours()
    assert not aten_override._blocks


@pytest.fixture
def unloaded() -> Iterator[None]:
    """The compiled entries are looked for anew."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(override_cpu, "_loaded", Once(override_cpu._load_entries))
        yield


def test_a_torch_that_does_not_pass_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(override_probe, "_verdict", lambda: "exit code -11, no message")
    assert_cannot_be_switched_on("does not pass the test of the override: exit code -11, no message")


@pytest.mark.usefixtures("unloaded")
def test_a_missing_function_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(torch_layout.OVERRIDE_MANGLED, "matmul_grad_library_impl", "no_such_function")
    assert_cannot_be_switched_on("has no matmul_grad_library_impl")


def test_a_kernel_kept_in_another_way_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(override_cpu, "_own", {})
    monkeypatch.setattr(override_cpu, "_is_library_code", lambda address: False)
    assert_cannot_be_switched_on("keeps its kernel of aten::mm in a way that is not known")


# --- others' kernels ----------------------------------------------------------------------------------------


def test_somebody_elses_kernel_is_kept_and_called() -> None:
    """What another library has put there takes what these kernels do not, and is there again afterwards."""
    assert_runs(
        """
        import warnings
        library = torch.library.Library("aten", "IMPL")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            library.impl("mm", lambda a, b: torch.full((1,), 7), "CPU", allow_override=True)
        a = torch.ones(2, 2)
        assert torch.mm(a, a).tolist() == [7]
        with matmul_grad.enabled():
            assert torch.mm(a, a).tolist() == [[2.0, 2.0], [2.0, 2.0]]
            assert torch.mm(a.int(), a.int()).tolist() == [7]
        assert torch.mm(a, a).tolist() == [7]
        """
    )


# --- memory -------------------------------------------------------------------------------------------------

LEAK = """
def resident():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS")) << 10
def new(*sizes, dtype=torch.float32):
    return torch.ones(sizes or (1, 1), dtype=dtype)
def fail():
    try:
        torch.mm(new(), new(2, 2))
    except RuntimeError:
        pass
calls = [
    lambda: torch.mm(new(), new()), lambda: torch.mm(new(), new(), out=new()),
    lambda: torch.mm(new(), new(), out=new(0)), lambda: torch.ops.aten.mm(new(), new()),
    lambda: torch.addmm(new(1), new(), new(), beta=2, alpha=0.5), lambda: torch.addmm(new(), new(), new(), out=new()),
    lambda: new().addmm_(new(), new(), beta=0), lambda: torch.bmm(new(1, 1, 1), new(1, 1, 1)),
    lambda: torch.baddbmm(new(), new(1, 1, 1), new(1, 1, 1), out=new(1, 1, 1)),
    lambda: torch.mm(new(dtype=torch.int64), new(dtype=torch.int64)), lambda: torch.mm(new(1, 0), new(0, 1)),
]
def repeat(count):
    for _ in range(count):
        for call in calls:
            call()
    for _ in range(count // 20):
        fail()
with matmul_grad.enabled():
    repeat(500)
    before = resident()
    repeat(10_000)
    print(resident() - before)
for _ in range(100):
    with matmul_grad.enabled():
        pass
before = resident()
for _ in range(2500):
    with matmul_grad.enabled():
        pass
print(resident() - before)
"""


@linux
def test_nothing_is_kept() -> None:
    """Tensors are taken off torch's stack by address: 10 000 calls would show the loss of one in each."""
    calls, flips = map(int, assert_runs(LEAK).split())
    assert calls < 1 << 20
    assert flips < 1 << 19


def test_results_and_operands_live_as_torchs_do() -> None:
    with matmul_grad.enabled():
        a, b, out = torch.ones(3, 4), torch.ones(4, 2), torch.empty(3, 2)
        counts = sys.getrefcount(a), sys.getrefcount(out)
        storage = weakref.ref(torch.mm(a, b).untyped_storage())
        assert storage() is None
        assert torch.mm(a, b, out=out) is out
        assert out.addmm_(a, b) is out
        assert torch.ops.aten.addmm_(out, a, b) is out
        assert (sys.getrefcount(a), sys.getrefcount(out)) == counts
        assert (a.sum().item(), b.sum().item(), out.sum().item()) == (12.0, 8.0, 72.0)


@pytest.mark.parametrize("transform", ["grad", "vjp", "jvp", "jacrev", "hessian", "vmap", "functionalize", "compile"])
def test_on_and_off_inside_what_is_transformed(transform: str) -> None:
    """The first time in a process, too: what the registration needs is made outside of every transform."""
    assert_runs(
        f"""
        import warnings
        warnings.simplefilter("ignore")

        def first(x):
            matmul_grad.enable()
            y = (x @ x).sum()
            matmul_grad.disable()
            return y

        def second(x):
            with matmul_grad.enabled():
                return (x @ x).sum()

        def result(f):
            name, x = {transform!r}, torch.tensor([[1.0, 2.0], [3.0, 4.0]])
            if name == "vjp":
                return torch.func.vjp(f, x)[1](torch.tensor(1.0))[0]
            if name == "jvp":
                return torch.func.jvp(f, (x,), (x,))[1]
            if name == "compile":
                return torch.compile(f, backend="eager")(x)
            return getattr(torch.func, name)(f)(x[None] if name == "vmap" else x)

        expected = result(lambda x: (x @ x).sum())
        assert matmul_grad.info()["accelerated"] == {{}}
        for f in (first, second):
            assert torch.equal(result(f), expected)
            assert matmul_grad.info()["on"] == []
        assert sum(matmul_grad.info()["accelerated"]["bmm" if {transform!r} == "vmap" else "mm"].values()) >= 2
        """
    )
