"""The bench in its processes: each library in one of its own, and what one of them does to the others, or does not.

Whatever a process does, it is gone in time, with all that it started.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
from limits import scaled
from processes import linux

from matmul_grad.bench import backends, commands, results, runner, stats, worker
from matmul_grad.bench.shapes import SETS
from matmul_grad.bench.workloads import Workload

GIB = 1 << 30


def plant(folder: Path, code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Code that every process of the bench runs when it begins."""
    (folder / "sitecustomize.py").write_text(code, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)


def test_wrong_kernel_in_its_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = "import torch\nfrom matmul_grad import api\napi.mm = lambda a, b: torch.mm(a, b) + 1\n"
    plant(tmp_path, code, monkeypatch)
    monkeypatch.setitem(SETS, "small", ((24, 24, 24),))
    options = ["--suite=small", "--dtype=f32", "--pass=dgrad", "--seconds=0.01", "--rivals=torch"]
    assert commands.main([*options, f"--out={tmp_path / 'out'}"], "bench") == 1
    (row,) = results.load(tmp_path / "out" / "bench.json")["rows"]
    assert set(row["seconds"]) == {"torch"} and "on integers 24 of 24 rows" in row["wrong"]["matmul_grad"]
    assert "bench: wrong: matmul_grad, dgrad-f32-NN-24x24x24-1t" in capsys.readouterr().err


def test_process_that_dies_takes_no_other_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = """
import os
from matmul_grad.bench import backends
product = backends.Numpy.product
def dies(self, x, y):
    return os.kill(os.getpid(), 11) if len(x) == 7 else product(self, x, y)
backends.Numpy.product = dies
"""
    plant(tmp_path, code, monkeypatch)
    selected = backends.chosen(["numpy"], "cpu")
    with runner.WorkerPool(selected, "cpu", 1, pin=True) as pool:
        dead, alive = (pool.measure(Workload("forward", "f32", "NN", n, 8, 8), 0.01) for n in (7, 8))
    assert "killed by SIGSEGV" in dead["failed"]["numpy"] and set(dead["seconds"]) == {"matmul_grad"}
    assert "failed" not in alive and set(alive["seconds"]) == {"matmul_grad", "numpy"}


def test_process_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import time\nfrom matmul_grad.bench import backends as c\nc.OfTorch.product = lambda *_: time.sleep(600)\n"
    plant(tmp_path, code, monkeypatch)
    monkeypatch.setattr(runner, "GRACE", 12.0)
    left = itertools.chain([1.0], itertools.repeat(-100.0))
    planned = [Workload("forward", "f32", "NN", 8, 8, 8)]
    rows = list(runner.rows(planned, backends.chosen([], "cpu"), 0.01, False, lambda: next(left)))
    assert rows == []


def run(text: str, heard: list[str], seconds: float = 300.0, **more: Any) -> worker.ExitStatus:
    return worker.run([sys.executable, "-c", text], heard.append, seconds=scaled(seconds), **more)


def test_lines_of_a_command_arrive_and_the_end_of_its_stderr_is_kept(tmp_path: Path) -> None:
    heard: list[str] = []
    text = "import os, sys; print(os.environ['MARK']); print(os.getcwd(), flush=True); sys.exit('why')"
    ended = run(text, heard, environment={"MARK": "x"}, folder=tmp_path)
    assert heard == ["x", str(tmp_path)]
    assert ended == worker.ExitStatus(1, "why\n") and ended.reason == "status 1: why"
    assert run("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", []).reason == "killed by SIGSEGV"


def test_child_finds_this_package(tmp_path: Path) -> None:
    heard: list[str] = []
    text = "import importlib.util; print(importlib.util.find_spec('matmul_grad').origin)"
    assert run(text, heard, folder=tmp_path).status == 0
    assert heard == [sys.modules["matmul_grad"].__file__]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system pins no process to a core")
def test_cpu_ratio_has_no_more_threads_than_cores() -> None:
    text = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
    text += "from matmul_grad.bench import cpu_ratio; print(cpu_ratio.THREADS)"
    assert processes.run(text).stdout == "(1,)\n"


def gone(pid: int) -> bool:
    end = time.monotonic() + scaled(60)
    while time.monotonic() < end:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        if "State:\tZ" in Path(f"/proc/{pid}/status").read_text():
            return True
        time.sleep(0.02)
    return False


GRANDCHILD = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(10_000)"])
print(child.pid, flush=True)
time.sleep(10_000)
"""


def test_command_that_does_not_end_is_ended_with_all_that_it_started() -> None:
    heard: list[str] = []
    for limit in (1.5, 10, 60, 300):  # the child has to come as far as its one line
        ended = worker.run([sys.executable, "-c", GRANDCHILD], heard.append, seconds=scaled(limit))
        assert ended.status is None and ended.reason == "its time was up"
        if heard:
            break
    assert gone(int(heard[0]))


def test_what_the_listener_raises_ends_the_command() -> None:
    heard: list[str] = []

    def refuse(line: str) -> None:
        heard.append(line)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        worker.run([sys.executable, "-c", GRANDCHILD], refuse, seconds=scaled(300))
    assert gone(int(heard[0]))


def test_worker_that_fails_says_why_and_goes_on() -> None:
    """Under a wrapper, which may print."""
    code = "import subprocess, sys; print('noise', flush=True); sys.exit(subprocess.call(sys.argv[1:]))"
    with runner.WorkerPool((), "cpu", 1, pin=False, wrapper=(sys.executable, "-c", code)) as pool:
        assert pool.ask("torch", {"time": "nothing", "clock": "call"}) == {"failed": "KeyError: 'nothing'"}
        assert "last cache" in pool.facts()
    with (
        worker.Worker("no_such_module") as child,
        pytest.raises(worker.WorkerExited, match=r"status 1: .*No module named no_such_module"),
    ):
        child.ask({})


@pytest.mark.skipif(torch.cuda.is_available(), reason="1 test is of what a process does without a GPU")
def test_process_without_a_gpu_names_the_reason() -> None:
    with runner.WorkerPool((), "cuda", 1, pin=False) as pool, pytest.raises(worker.WorkerExited, match="status 1: "):
        pool.facts()


@pytest.mark.skipif(not backends.BY_NAME["jax"].installed, reason="jax is not installed")
def test_jax_in_a_process_of_its_own_is_right() -> None:
    selected = backends.chosen(["jax"], "cpu")
    planned = [Workload(*what) for what in (
        ("forward", "f32", "NN", 33, 17, 65), ("dgrad", "f32", "NN", 1, 65, 33), ("wgrad", "f64", "NN", 65, 1, 33),
        ("step", "f32", "NN", 17, 33, 65), ("step", "bf16", "NN", 17, 33, 65), ("forward", "f16", "NN", 17, 1, 65),
    )]  # fmt: skip
    with runner.WorkerPool(selected, "cpu", 1, pin=True) as pool:
        rows = [pool.measure(workload, 0.0) for workload in planned]
    assert stats.troubles(rows) == []
    for row in rows:
        assert set(row["seconds"]) == {"matmul_grad", "jax"}


def test_interrupt_from_a_terminal(tmp_path: Path) -> None:
    """Ctrl-C goes to every process of the group: the rows are kept, and no process is left."""
    options = ["bench", "--suite=small", "--dtype=f32", "--seconds=0.5", "--rivals=torch", f"--out={tmp_path}"]
    process = subprocess.Popen(
        [sys.executable, "-m", "matmul_grad", *options],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background workload ignores it
    )  # fmt: skip
    unfinished, end = tmp_path / "bench-unfinished.json", time.monotonic() + scaled(100)
    while not unfinished.exists() and time.monotonic() < end:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    said, errors = process.communicate(timeout=scaled(100))
    assert process.returncode == 130, errors
    assert "--resume goes on with them" in said and "Traceback" not in errors
    written = json.loads(unfinished.read_text(encoding="utf-8"))
    assert 1 <= len(written["rows"]) < written["planned"] and not written["whole"]
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


@pytest.mark.parametrize(
    ("k", "names"),
    [
        (1_000_000, ["numpy"]),
        pytest.param(30_000_000, ["torch"], marks=[pytest.mark.slow, pytest.mark.timeout(1800)]),
    ],
)
def test_processes_stay_small_beside_their_operands(k: int, names: list[str]) -> None:
    workload = Workload("dgrad", "f32", "NN", 16, 2, k)
    with runner.WorkerPool(backends.chosen(names, "cpu"), "cpu", 1, pin=True) as pool:
        row = pool.measure(workload, 0.01)
    assert set(row["seconds"]) == {"matmul_grad", *names}
    assert workload.held == 4 * 18 * k + 4 * 32 and workload.given == 4 * 16 * k
    assert 0 < row["beyond"] < 2 * GIB


@linux
def test_memory_of_a_call_is_what_it_allocates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In every row: what earlier calls had and freed is not at hand to be used again."""
    code = """
import torch
from matmul_grad.bench import backends
def mm(a, b):
    held = torch.ones(24 << 20, dtype=torch.uint8)
    return torch.mm(a, b)
backends.IMPLEMENTATIONS["torch"] = mm
"""
    plant(tmp_path, code, monkeypatch)
    selected, planned = backends.chosen(["torch"], "cpu"), Workload("forward", "f32", "NN", 256, 256, 256)
    with runner.WorkerPool(selected, "cpu", 1, pin=True) as pool:
        rows = [pool.measure(planned, 0.01) for _ in range(2)]
    assert stats.troubles(rows) == []
    for row in rows:
        beside = {name: (peak - planned.given) / 2**20 for name, peak in row["peak bytes"].items()}
        assert 23 < beside["torch"] < 26 and -0.1 < beside["matmul_grad"] < 8, beside


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_runs_agree_within_their_spread(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On a machine at rest: the means agree, and most comparisons do, each within the spread that it states."""
    monkeypatch = pytest.MonkeyPatch()
    with monkeypatch.context() as patch:
        patch.setitem(SETS, "small", ((8, 8, 8), (64, 64, 64), (256, 256, 256), (512, 512, 512), (257, 129, 513)))
        for name in "ab":
            options = ["--suite=small", "--rivals=torch", "--seconds=1", f"--out={tmp_path / name}"]
            assert commands.main(options, "bench") == 0
    first, second = (results.load(tmp_path / name / "bench.json")["rows"] for name in "ab")
    busy = stats.disturbed(first + second)
    if busy:
        pytest.skip(f"other work ran here during {len(busy)} of {len(first + second)} comparisons")
    changes = stats.changes(first, second)
    beyond = [change for change in changes if change.significant]
    with capsys.disabled():
        print(f"\n{len(beyond)} of {len(changes)} beyond their spread, mean {stats.mean_change(changes):.3f}")
    assert len(beyond) <= len(changes) / 4 and 0.97 < stats.mean_change(changes) < 1.03
    for before, after in zip(stats.summaries(first).values(), stats.summaries(second).values(), strict=True):
        assert not stats.apart(before[0].mean, after[0].mean)
