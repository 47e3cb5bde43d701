"""The package in a process: threads, forks, workers, memory and the cache of compiled kernels."""

import ctypes
import itertools
import os
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import limits
import pytest
import torch
from limits import scaled
from torch import Tensor

import matmul_grad
from matmul_grad.kernels.cpu import build, config, driver, host
from matmul_grad.testing import assert_same_bits, integers, normal

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc, forks")
LIMIT = scaled(600)  # seconds that a process may take; a hang takes longer


def assert_runs(code: str, **environment: str) -> str:
    """A fresh interpreter runs ``code`` with the operands' names imported and ends well; what it printed."""
    imports = "import os, sys, time, torch, matmul_grad\nfrom matmul_grad.testing import *\n"
    done = subprocess.run(
        [sys.executable, "-c", imports + textwrap.dedent(code)],
        env=os.environ | environment, capture_output=True, text=True, timeout=LIMIT,
    )  # fmt: skip
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


# --- threads ------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("callers", [4, 20])  # the second: more calls at a time than there are kept workspaces
def test_threads_calling_at_once(callers: int) -> None:
    sizes = [(5, 7, 3), (300, 200, 400), (64, 64, 64), (1, 900, 500), (257, 129, 513), (130, 8, 1100)]
    work = [
        (normal(m, k, dtype, seed=1), normal(k, n, dtype, seed=2))
        for (m, n, k), dtype in itertools.product(sizes, (torch.float32, torch.float64))
    ]
    expected = [matmul_grad.mm(a, b) for a, b in work]
    failures: list[BaseException] = []
    start = threading.Barrier(callers)

    def call(first: int) -> None:
        try:
            start.wait()
            for turn in range(2 * len(work)):
                i = (first + turn) % len(work)
                assert_same_bits(matmul_grad.mm(*work[i]), expected[i], f"caller {first}, turn {turn}")
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=call, args=(i,)) for i in range(callers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT)
    assert not any(thread.is_alive() for thread in threads)
    assert not failures, failures[0]
    assert not any(driver.workspace[1::3]), "every kept workspace is free again"


def test_first_calls_of_a_process_from_four_threads() -> None:
    assert_runs(
        """
        import threading
        a, b, failures = integers(90, 80, torch.float32, 1), integers(80, 70, torch.float32, 2), []
        start = threading.Barrier(4)
        def call(i):
            try:
                start.wait()
                dtype = (torch.float32, torch.float64)[i % 2]
                x, y = a.to(dtype, copy=True).requires_grad_(i < 2), b.to(dtype)
                assert_same_bits(matmul_grad.mm(x, y).detach(), exact_product(x.detach(), y))
            except BaseException as error:
                failures.append(error)
        threads = [threading.Thread(target=call, args=(i,)) for i in range(4)]
        [t.start() for t in threads]
        [t.join() for t in threads]
        assert not failures, failures
        """
    )


THREADS_OF = """
def tasks():
    return len(os.listdir("/proc/self/task"))
torch.set_num_threads(1)  # drawing the operands must not start the pool
a, b = normal(700, 700, torch.float32, 1), normal(700, 700, torch.float32, 2)
torch.set_num_threads({threads})
initial = tasks()
matmul_grad.mm(a[:8, :8], b[:8, :8])
limit = time.monotonic() + 60
while tasks() > initial and time.monotonic() < limit:  # the thread that loaded the kernels is about to end
    time.sleep(0.01)
before = tasks()
{first}(a, b)
one = tasks()
{second}(a, b)
print(before, one, tasks())
"""


@linux
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_pool_is_torchs_own(threads: int) -> None:
    """As many threads as torch.mm starts, and none beside them, whoever comes first."""
    counts = []
    for first, second in (("torch.mm", "matmul_grad.mm"), ("matmul_grad.mm", "torch.mm")):
        code = THREADS_OF.format(threads=threads, first=first, second=second)
        before, one, two = map(int, assert_runs(code).split())
        assert one == two, f"{second} started {two - one} threads beside those of {first}"
        counts.append(one - before)
    assert counts == [threads - 1, threads - 1]


def thread_seconds() -> dict[str, int]:
    """Processor time of each thread of this process, in clock ticks."""
    ticks = {}
    for task in Path("/proc/self/task").iterdir():
        fields = (task / "stat").read_text().rpartition(")")[2].split()
        ticks[task.name] = int(fields[11]) + int(fields[12])
    return ticks


@linux
@pytest.mark.parametrize("threads", [1, 2])
def test_number_of_threads_is_obeyed(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    a, b = normal(1200, 1200, torch.float32, 1), normal(1200, 1200, torch.float32, 2)
    matmul_grad.mm(a, b)
    at_start, used = thread_seconds(), {"none": 0}
    while sum(used.values()) <= 60:
        matmul_grad.mm(a, b)
        used = {task: ticks - at_start.get(task, 0) for task, ticks in thread_seconds().items()}
    torch.set_num_threads(before)
    busy = sorted((ticks for ticks in used.values() if ticks > sum(used.values()) / 10), reverse=True)
    assert len(busy) == threads, used


def test_python_runs_during_a_product() -> None:
    """No GIL is held: another thread counts while one call multiplies."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    a, b = normal(2500, 2500, torch.float64, 1), normal(2500, 2500, torch.float64, 2)
    matmul_grad.mm(a[:9], b)
    span: list[float] = []

    def multiply() -> None:
        begin = time.perf_counter()
        matmul_grad.mm(a, b)
        span.extend((begin, time.perf_counter()))

    worker = threading.Thread(target=multiply)
    worker.start()
    beats = []
    while not span:
        beats.append(time.perf_counter())
        time.sleep(0.002)
    worker.join()
    torch.set_num_threads(before)
    begin, end = span
    inside = [beat for beat in beats if begin + 0.2 * (end - begin) < beat < end - 0.2 * (end - begin)]
    assert inside, f"no turn of another thread in {end - begin:.2f} s"


# --- forks and workers --------------------------------------------------------------------------------------


@linux
@pytest.mark.parametrize("registered", ["native", "python"])
@pytest.mark.parametrize("step", ["forward", "backward"])
def test_fork_after_the_pool_was_used(step: str, registered: str) -> None:
    """The child multiplies on its own: waking the parent's threads, which it has not, would hang it."""
    assert_runs(
        f"""
        import signal
        from matmul_grad import ops
        from matmul_grad.kernels.cpu import driver
        from matmul_grad.kernels.native import torch_layout
        if {registered!r} == "python":
            torch_layout.MANGLED["matmul_grad_check_fail"] = "no_such_function"
        torch.set_num_threads(2)
        work = []
        for dtype in (torch.float32, torch.float64):
            a, b, grad = integers(600, 500, dtype, 1), integers(500, 400, dtype, 2), integers(600, 400, dtype, 3)
            exact = exact_product(a, b), exact_product(grad, b.t()), exact_product(a.t(), grad)
            work.append((a, b, grad, [x.numpy().tobytes() for x in exact]))
        assert matmul_grad.mm(*work[0][:2]).numpy().tobytes() == work[0][3][0]
        assert (ops.native_status() == "") == ({registered!r} == "native")
        child = os.fork()
        if child == 0:  # torch's operators would hang here on as many elements: compare bytes
            signal.alarm({int(LIMIT)})
            for a, b, grad, exact in work:
                if {step!r} == "forward":
                    assert matmul_grad.mm(a, b).numpy().tobytes() == exact[0]
                    continue
                c = matmul_grad.mm(a.requires_grad_(), b.requires_grad_())
                assert c.detach().numpy().tobytes() == exact[0]
                c.backward(grad)
                assert a.grad.numpy().tobytes() == exact[1]
                assert b.grad.numpy().tobytes() == exact[2]
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status == 0, f"the child ended with {{status}}"
        assert matmul_grad.mm(*work[0][:2]).numpy().tobytes() == work[0][3][0], "the parent afterwards"
        """
    )


class Products(torch.utils.data.Dataset):
    """Item i is a product made in the worker."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, i: int) -> Tensor:
        return matmul_grad.mm(integers(200 + i, 300, torch.float32), integers(300, 150, torch.float32))[:100]


LOADER = """
import importlib.util
spec = importlib.util.spec_from_file_location("process_tests", {file!r})
module = importlib.util.module_from_spec(spec)
sys.modules["process_tests"] = module
sys.path[:0] = [{folder!r}, {helpers!r}]
spec.loader.exec_module(module)

if __name__ == "__main__":
    torch.set_num_threads(2)
    matmul_grad.mm(torch.ones(500, 500), torch.ones(500, 500))
    loader = torch.utils.data.DataLoader(
        module.Products(), batch_size=2, num_workers=2, multiprocessing_context={method!r}, timeout={limit}
    )
    batches = torch.cat(list(loader))
    for i, item in enumerate(batches):
        a, b = integers(200 + i, 300, torch.float32), integers(300, 150, torch.float32)
        assert_same_bits(item, exact_product(a, b)[:100], str(i))
    print(len(batches))
"""


@linux
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_data_loader_workers(method: str, tmp_path: Path) -> None:
    script = tmp_path / "loads.py"
    folder, helpers = str(Path(__file__).parent), str(Path(limits.__file__).parent)
    code = LOADER.format(file=__file__, folder=folder, helpers=helpers, method=method, limit=LIMIT)
    script.write_text("import os, sys, torch, matmul_grad\nfrom matmul_grad.testing import *\n" + code)
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=LIMIT)
    assert (done.returncode, done.stdout) == (0, "6\n"), done.stderr[-3000:]


# --- memory -------------------------------------------------------------------------------------------------

STEP = """
def status(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) << 10
torch.set_num_threads({threads})
mm = {mm}
small = torch.ones(8, 8, dtype={dtype}).requires_grad_()
mm(small, small).sum().backward()
a, b = torch.ones({n}, {n}, dtype={dtype}).requires_grad_(), torch.ones({n}, {n}, dtype={dtype}).requires_grad_()
grad = torch.ones({n}, {n}, dtype={dtype})
with open("/proc/self/clear_refs", "w") as peak:
    peak.write("5")  # the peak so far is what is resident now
before = status("VmRSS")
mm(a, b).backward(grad)
print(status("VmHWM") - before)
"""


def bound(threads: int) -> int:
    """What a step may take beyond torch: 6 MiB a thread and half of its part of the last cache, by contract."""
    return threads * ((6 << 20) + host.cpu().l3 // 2)


@linux
@pytest.mark.parametrize("threads,dtype", [(1, "float32"), (2, "float32"), (2, "float64")])
def test_peak_memory_of_a_step(threads: int, dtype: str) -> None:
    grown = {
        mm: int(assert_runs(STEP.format(threads=threads, mm=mm, n=1500, dtype=f"torch.{dtype}")))
        for mm in ("torch.mm", "matmul_grad.mm")
    }
    extra = grown["matmul_grad.mm"] - grown["torch.mm"]
    assert extra <= bound(threads), f"{extra / 2**20:.1f} MiB more than torch's {grown['torch.mm'] / 2**20:.1f}"


@pytest.mark.parametrize("threads", [1, 2])
def test_workspace_does_not_grow_with_the_operands(threads: int) -> None:
    blocks = [config.choose(dtype, host.cpu()) for dtype in ("float32", "float64")]
    for block in blocks:
        assert block.a_bytes <= 6 << 20
        assert block.b_bytes <= host.cpu().l3 // 2
    printed = assert_runs(
        f"""
        from matmul_grad.kernels.cpu import driver
        from matmul_grad.kernels.native import torch_layout
        torch.set_num_threads({threads})
        for m, n, k in ((900, 900, 900), (2200, 2200, 900), (3000, 1500, 2000), (2, 20000, 3000), (20000, 2, 3000)):
            for dtype in (torch.float32, torch.float64):
                matmul_grad.mm(torch.ones(m, k, dtype=dtype), torch.ones(k, n, dtype=dtype))
            print(sum(driver.workspace[3::3]))
        """
    )
    first, *later = map(int, printed.split())
    assert 0 < first <= bound(threads)
    assert set(later) == {first}


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="this C library does not tell what is in use")
def test_backward_gives_back_what_it_takes() -> None:
    """Handles, lists and optional results cross torch's C ABI by address: one kept in each call would show."""
    grown = assert_runs(
        """
        import ctypes
        class Info(ctypes.Structure):
            names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
            _fields_ = [(name, ctypes.c_size_t) for name in names.split()]
        look = ctypes.CDLL(None).mallinfo2
        look.restype = Info
        grad, a, b = torch.ones(1, 1), torch.ones(1, 1), torch.ones(1, 1)
        masks = [[True, True], [True, False], [False, True], [False, False]]
        def calls(count):
            for _ in range(count):
                for mask in masks:
                    torch.ops.matmul_grad.mm_backward.default(grad, a, b, mask)
        calls(1000)
        before = look().uordblks
        calls(5000)
        print(look().uordblks - before)
        """
    )
    assert int(grown) < 5000 * 8


# --- the cache of compiled kernels --------------------------------------------------------------------------

USE = """
for dtype in {dtypes}:
    a, b = integers(40, 30, dtype, 1), integers(30, 20, dtype, 2)
    assert_same_bits(matmul_grad.mm(a, b), exact_product(a, b))
from matmul_grad import ops
assert ops.native_status() == ""
print("numba" in sys.modules)
"""
ONE = USE.format(dtypes="(torch.float32,)")


def corrupt(folder: Path) -> None:
    """One object cut short, one empty, the others with a changed byte."""
    for i, path in enumerate(sorted(folder.glob("*.o"))):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes([data[:1000], b"", data][min(i, 2)])


def test_cache_is_shared_survives_damage_and_may_be_deleted(tmp_path: Path) -> None:
    """Two processes compile at once; a third only loads; damage is compiled anew, and so is what is gone."""
    folder = tmp_path / "not" / "there" / "yet"
    quiet = "from matmul_grad.kernels.cpu import build\nbuild.SLOW = 1e6\n"
    code = "import sys, torch, matmul_grad\nfrom matmul_grad.testing import *\n" + quiet + ONE
    racing = [
        subprocess.Popen(
            [sys.executable, "-c", code], env=os.environ | {"MATMUL_GRAD_CACHE": str(folder)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for _ in range(2)
    ]  # fmt: skip
    for process in racing:
        out, err = process.communicate(timeout=LIMIT)
        assert (process.returncode, out, err) == (0, "True\n", "")
    objects = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert len(objects) == 2, f"two objects and nothing left over: {sorted(objects)}"
    assert assert_runs(ONE, MATMUL_GRAD_CACHE=str(folder)) == "False\n", "a warm start imports no Numba"
    corrupt(folder)
    assert assert_runs(ONE, MATMUL_GRAD_CACHE=str(folder)) == "True\n"
    assert {path.name for path in folder.iterdir()} == set(objects)
    assert assert_runs(ONE, MATMUL_GRAD_CACHE=str(folder)) == "False\n", "what was damaged has been replaced"


def test_folder_that_cannot_be_written(tmp_path: Path) -> None:
    """A file stands where the folder should be: not even root can write there."""
    (tmp_path / "file").write_text("not a folder")
    assert assert_runs(ONE, MATMUL_GRAD_CACHE=str(tmp_path / "file" / "cache")) == "True\n"


def test_cache_deleted_while_in_use(tmp_path: Path) -> None:
    """Loaded kernels need their file no more."""
    folder = tmp_path / "cache"
    folder.mkdir()
    for path in build.cache_folder().glob("*.o"):
        (folder / path.name).write_bytes(path.read_bytes())
    assert_runs(
        """
        import shutil
        a, b = integers(300, 200, torch.float32, 1), integers(200, 100, torch.float32, 2)
        assert_same_bits(matmul_grad.mm(a, b), exact_product(a, b))
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
