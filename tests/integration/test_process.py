"""Threads, forks and workers: products from many threads, on torch's pool, in children and in data loaders."""

import itertools
import subprocess
import sys
import threading
import time
from pathlib import Path

import limits
import pytest
import torch
from processes import LIMIT, assert_computes, linux
from torch import Tensor

import matmul_grad
from matmul_grad.kernels.cpu import driver
from matmul_grad.testing import assert_same_bits, integers, normal


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


# --- threads -------------------------------------------------------------------------------------------------


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
    assert_computes(
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
limit = time.monotonic() + {limit}
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
def test_kernels_run_on_torch_thread_pool(threads: int) -> None:
    """As many threads as torch.mm starts, and none beside them, whoever comes first."""
    counts = []
    for first, second in (("torch.mm", "matmul_grad.mm"), ("matmul_grad.mm", "torch.mm")):
        code = THREADS_OF.format(limit=limits.scaled(60), threads=threads, first=first, second=second)
        before, one, two = map(int, assert_computes(code).split())
        assert one == two, f"{second} started {two - one} threads beside those of {first}"
        counts.append(one - before)
    assert counts == [threads - 1, threads - 1]


@linux
def test_a_driver_that_is_called_directly_first_has_the_threads_of_torch() -> None:
    code = f"""
from matmul_grad.kernels.cpu import driver
from matmul_grad.kernels.native import direct
def tasks():
    return len(os.listdir("/proc/self/task"))
torch.set_num_threads(1)
a, b = normal(700, 700, torch.float32, 1), normal(700, 700, torch.float32, 2)
direct.multiply(driver.config("float32"), a[:6], b, torch.empty(6, 700))
matmul_grad.mm(a, b)
torch.set_num_threads(2)
limit = time.monotonic() + {limits.scaled(60)}
while tasks() > 1 and time.monotonic() < limit:  # the threads that loaded the kernels are about to end
    time.sleep(0.01)
before = tasks()
matmul_grad.mm(a, b)
print(tasks() - before)
"""
    assert assert_computes(code).split() == ["1"]


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
    at_start, end = thread_seconds(), time.monotonic() + limits.scaled(120)
    busy: list[int] = []
    while sum(busy) <= 60 or (len(busy) < threads and time.monotonic() < end):  # a thread leaves a core that is taken
        matmul_grad.mm(a, b)
        used = {task: ticks - at_start.get(task, 0) for task, ticks in thread_seconds().items()}
        busy = [ticks for ticks in used.values() if ticks >= 5]
    torch.set_num_threads(before)
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


# --- forks and workers ---------------------------------------------------------------------------------------


@linux
@pytest.mark.parametrize("registered", ["native", "python"])
@pytest.mark.parametrize("step", ["forward", "backward"])
def test_fork_after_the_pool_was_used(step: str, registered: str) -> None:
    """The child multiplies on its own: waking the parent's threads, which it has not, would hang it."""
    assert_computes(
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
