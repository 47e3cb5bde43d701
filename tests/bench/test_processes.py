"""The bench in its processes: each library in one of its own, and what one of them does to the others, or does not."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from matmul_grad.bench import backends, commands, results, runner, stats
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
    options = ["--suite=small", "--dtype=f32", "--pass=dgrad", "--seconds=0.01", "--rivals=torch,numpy"]
    assert commands.main([*options, f"--out={tmp_path / 'out'}"], "bench") == 1
    (row,) = results.load(tmp_path / "out" / "bench.json")["rows"]
    assert set(row["seconds"]) == {"torch", "numpy"} and "on integers 24 of 24 rows" in row["wrong"]["matmul_grad"]
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
    selected = backends.chosen(["torch", "numpy"], "cpu")
    with runner.WorkerPool(selected, "cpu", 1, pin=True) as pool:
        dead, alive = (pool.measure(Workload("forward", "f32", "NN", n, 8, 8), 0.01) for n in (7, 8))
    assert "killed by SIGSEGV" in dead["failed"]["numpy"] and set(dead["seconds"]) == {"torch", "matmul_grad"}
    assert "failed" not in alive and set(alive["seconds"]) == {"torch", "matmul_grad", "numpy"}


def test_process_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import time\nfrom matmul_grad.bench import backends as c\nc.OfTorch.product = lambda *_: time.sleep(600)\n"
    plant(tmp_path, code, monkeypatch)
    monkeypatch.setattr(runner, "GRACE", 12.0)
    left = itertools.chain([1.0], itertools.repeat(-100.0))
    planned = [Workload("forward", "f32", "NN", 8, 8, 8)]
    start = time.monotonic()
    rows = list(runner.rows(planned, backends.chosen([], "cpu"), 0.01, False, lambda: next(left)))
    assert rows == [] and time.monotonic() - start < 60


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
    unfinished, end = tmp_path / "bench-unfinished.json", time.monotonic() + 100
    while not unfinished.exists() and time.monotonic() < end:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    said, errors = process.communicate(timeout=100)
    assert process.returncode == 130, errors
    assert "--resume goes on with them" in said and "Traceback" not in errors
    written = json.loads(unfinished.read_text(encoding="utf-8"))
    assert 1 <= len(written["rows"]) < written["planned"] and not written["whole"]
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


@pytest.mark.parametrize(
    ("k", "names"),
    [
        (1_000_000, ["torch", "numpy"]),
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
