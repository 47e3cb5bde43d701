"""`python -m bench cpu-ratio`: figures as its rows say, the wrong refused, a fall noticed, backends one at a time."""

import itertools
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from matmul_grad import api, machine
from matmul_grad.bench import __main__ as command
from matmul_grad.bench import (
    baseline,
    cpu_ratio,
    ratio_openblas,
    ratio_results,
    ratio_stats,
    ratio_worker,
    ratio_workloads,
    roofline,
    timer,
    worker,
)
from matmul_grad.kernels.cpu import driver

ROOT = Path(__file__).parents[1]
MACHINE = {"CPU": "Some CPU, 2 cores", "instruction set": "avx2 of avx2, generic", "versions": "none"}
Row = dict[str, Any]


def row(ratio: float, dtype: str = "f32", layout: str = "NN", n: int = 64, threads: int = 1, **more: Any) -> Row:
    """One that compares n × n × n, where ours takes a second a GFLOP."""
    seconds = {"torch": {"median": ratio}, "matmul_grad": {"median": 1.0}}
    found = {"part": "products", "dtype": dtype, "layout": layout, "m": n, "n": n, "k": n, "threads": threads}
    return found | {"flops": 1e9, "rounds": 5, "share of core": 1.0, "seconds": seconds, "ratio": ratio} | more


def result(rows: list[Row], time: str = "12:00:00", **more: Any) -> dict[str, Any]:
    stamp = {"date": "2026-01-02", "time": time, **MACHINE}
    return {"stamp": stamp, "protocol": "turns", "quick": False, "whole": True, "rows": rows} | more


def shown(rows: list[Row], committed: list[Row] | None = None) -> dict[tuple[str, int], Any]:
    return {(entry.line.name, entry.threads): entry for entry in ratio_stats.entries(rows, committed or [])}


def test_figures_are_what_the_rows_say() -> None:
    rows = [row(2.0), row(8.0, layout="NT"), row(0.5, "bf16"), row(3.0, threads=2)]
    rows += [row(9.0, n=1024, threads=2, peak={"median": 4.0}), row(9.0, n=2048, threads=2, peak={"median": 2.0})]
    rows += [row(1.5, part="step"), row(0.7, part="openblas"), row(0.9, part="overhead")]
    table = shown(rows)
    values = {which: entry.figure.value for which, entry in table.items()}
    assert values == {
        ("float32 products", 1): pytest.approx(4.0, rel=1e-12),
        ("float32 products", 2): pytest.approx(243 ** (1 / 3), rel=1e-12),
        ("bfloat16 products", 1): 0.5,
        ("float32 step through autograd", 1): pytest.approx(1.5),
        ("worst product", 1): 0.5,
        ("worst product", 2): 3.0,
        ("float32 share of peak", 2): 0.375,
        ("float32 against OpenBLAS", 1): pytest.approx(0.7),
        ("float32 call of 8×8", 1): pytest.approx(0.9),
    }
    assert table["worst product", 1].figure.note == "bf16 NN 64×64×64"
    assert table["worst product", 1].short_by == pytest.approx(0.4)
    assert table["worst product", 2].short_by == 0
    assert ratio_stats.peaks(rows) == {("f32", 2): 3.0}


def test_targets_are_those_agreed_on() -> None:
    targets = [(line.name, *line.targets.values()) for line in ratio_stats.LINES]
    assert targets == [
        ("float32 products", 1.15, 1.15), ("float64 products", 1.20, 1.20), ("bfloat16 products", 1.0, 1.0),
        ("float16 products", 1.0, 1.0), ("float32 step through autograd", 1.10, 1.10), ("worst product", 0.90, 0.85),
        ("float32 share of peak", 0.92, 0.88), ("float64 share of peak", 0.92, 0.88),
        ("float32 against OpenBLAS", 1.0, 1.0), ("float64 against OpenBLAS", 1.0, 1.0), ("float32 call of 8×8", 1.0),
    ]  # fmt: skip


def test_plan_is_whole() -> None:
    one, two = (ratio_workloads.jobs(ratio_workloads.PARTS, ratio_workloads.DTYPES, threads) for threads in (1, 2))
    assert one == [*two, ratio_workloads.RatioWorkload("overhead", "f32", "NN", 8, 8, 8)]
    products = [workload for workload in one if workload.part == "products"]
    assert len(products) == len(set(products)) == (6 + 3 * 6) * 3 * 4
    assert {(workload.m, workload.n, workload.k) for workload in products if workload.m != workload.n} >= {
        (1, 768, 768),
        (2048, 768, 3072),
    }
    assert {(workload.dtype, workload.layout, workload.n) for workload in products if workload.peak} == set(
        itertools.product(ratio_workloads.DTYPES, ratio_workloads.LAYOUTS, (1024, 2048))
    )


def test_fall_is_judged_where_the_same_was_compared() -> None:
    before = [row(2.0), row(8.0, layout="NT")]
    assert not shown([row(1.81), row(8.0, layout="NT")], before)["worst product", 1].fell
    assert shown([row(1.79), row(8.0, layout="NT")], before)["worst product", 1].fell
    assert not shown([row(1.79), row(1.0, layout="NT")], before[:1])["worst product", 1].fell
    assert shown([row(1.79)], before)["worst product", 1].committed.value == 2.0  # of what was measured again


@pytest.fixture
def committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of results with one committed run, at noon; later ones of other kinds beside it."""
    folder = tmp_path / "repository" / "results"
    path = ratio_results.save(result([row(2.0), row(4.0, "f64")]), folder, "cpu-ratio")
    ratio_results.save(result([row(9.0)], "13:00:00", whole=False), folder, "cpu-ratio", "quick")
    ratio_results.save(result([row(9.0)], "23:00:00"), folder, "cpu-ratio", "late")
    git = ["git", "-C", str(folder), "-c", "user.name=n", "-c", "user.email=e"]
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-qm", "results"]):
        subprocess.run([*git, *arguments], check=True)
    monkeypatch.setattr(ratio_results, "RESULTS", folder)
    return path


def show_saved(path: Path, rows: list[Row]) -> int:
    """Write over what is committed, as a second run of that day does, and print it."""
    path.write_text(json.dumps(result(rows, "14:00:00")), encoding="utf-8")
    return command.main(["cpu-ratio", "--from", str(path)])


def test_equal_run_exits_0(committed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert show_saved(committed, [row(2.0), row(4.0, "f64")]) == 0
    output = capsys.readouterr()
    (line,) = (line for line in output.out.splitlines() if "float64 products" in line)
    assert line.split() == ["float64", "products", "1", "1.200", "4.000", "4.000"]
    assert output.err == ""


def test_fallen_run_exits_1(committed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert show_saved(committed, [row(2.0), row(3.5, "f64")]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["cpu-ratio: fell: float64 products, 1 thread: 3.500, 12% below the committed 4.000"]


def test_first_run_of_a_machine_is_compared_with_nothing(committed: Path) -> None:
    stamp = {"date": "2026-01-02", "time": "14:00:00", **MACHINE}
    assert ratio_results.committed(stamp, "cpu-ratio") is not None
    assert ratio_results.committed(stamp | {"CPU": "Some, 2 cores"}, "cpu-ratio") is None
    assert ratio_results.committed(stamp | {"time": "12:00:00"}, "cpu-ratio") is None
    assert ratio_results.committed(stamp, "cpu-ratio", committed.parents[2]) is None


def subtly_wrong(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Right on small integers."""
    return torch.mm(a.to(torch.bfloat16).to(a.dtype), b)


def wrong_in_a_corner(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    c = torch.mm(a, b).clone()
    c.data[-1, -1] += 1
    return c


@pytest.mark.parametrize(("mm", "why"), [(subtly_wrong, "roundings"), (wrong_in_a_corner, "integers: 1 of 273 el")])
@pytest.mark.parametrize(("dtype", "layout"), [("f32", "NT"), ("f64", "TN")])
def test_wrong_product_is_not_timed(
    monkeypatch: pytest.MonkeyPatch, mm: baseline.Mm, why: str, dtype: str, layout: str
) -> None:
    workload = ratio_workloads.RatioWorkload("products", dtype, layout, 13, 21, 34)
    assert ratio_worker.measure(workload, 0.0)["ratio"] > 0
    monkeypatch.setattr(api, "mm", mm)
    with pytest.raises(AssertionError, match=f"forward-{dtype}-{layout}-13x21x34.*{why}"):
        ratio_worker.measure(workload, 0.0)


def test_wrong_gradient_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    workload = ratio_workloads.RatioWorkload("step", "f32", "NN", 16, 16, 16)
    assert ratio_worker.measure(workload, 0.0)["flops"] == 3 * 2 * 16**3
    monkeypatch.setattr(api, "mm", lambda a, b: 2 * torch.mm(a, b) - torch.mm(a, b.detach()))
    with pytest.raises(AssertionError, match="step-f32-NN-16x16x16, gradient of b"):
        ratio_worker.measure(workload, 0.0)


def test_wrong_kernel_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    planted = "import torch\nfrom matmul_grad import api\napi.mm = lambda a, b: torch.mm(a, b) + 1\n"
    (tmp_path / "sitecustomize.py").write_text(planted, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    arguments = ["cpu-ratio", "--quick", "--threads=1", "--dtypes=f32", "--out", str(tmp_path / "out")]
    assert command.main(arguments) == 1
    assert "cpu-ratio: forward-f32-NN-64x64x64, integers: 4096 of 4096" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []


def test_run_keeps_its_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--quick", "--threads=1", "--dtypes=f32", "--rows=step,overhead", "--seconds=0.001"]
    assert command.main(["cpu-ratio", *arguments, "--out", str(tmp_path)]) == 0
    measured = capsys.readouterr().out.splitlines()
    (kept,) = tmp_path.glob("20*-cpu-ratio-*-quick.json")
    text = kept.read_text(encoding="utf-8")
    assert str(ROOT) not in text
    assert str(tmp_path) not in text
    stamp, rows = json.loads(text)["stamp"], json.loads(text)["rows"]
    known = {"date", "time", "commit", "seconds a comparison", "OpenBLAS", *machine.describe()}
    assert known - set(stamp) <= {"commit"}  # there is none in an unpacked archive
    assert set(stamp) <= known
    assert [(row["part"], row["n"], row["threads"]) for row in rows] == [("step", 256, 1), ("overhead", 8, 1)]
    for row in rows:
        for times in row["seconds"].values():
            assert 0 < times["low"] <= times["median"] <= times["high"]
        medians = [row["seconds"][rival]["median"] for rival in ("torch", "matmul_grad")]
        assert row["ratio"] == pytest.approx(medians[0] / medians[1], rel=1e-4)
    assert command.main(["cpu-ratio", "--from", str(kept), "--shapes"]) == 0
    again = capsys.readouterr().out.splitlines()
    assert again[-len(measured[2:]) :] == measured[2:]  # after what is to be measured, and the file's name
    assert any("step" in line and "f32 NN 256×256×256" in line for line in again)


def test_interrupted_run_keeps_what_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(_console: Any, _command: Any, _sessions: Any, rows: list[Row]) -> None:
        rows.append(row(2.0))
        raise KeyboardInterrupt

    monkeypatch.setattr(cpu_ratio, "measure", stop)
    assert command.main(["cpu-ratio", "--out", str(tmp_path)]) == 130
    (kept,) = tmp_path.glob("*-interrupted.json")
    assert json.loads(kept.read_text(encoding="utf-8"))["whole"] is False
    assert "float32 products" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ("--threads 0", "--threads: numbers from 1 to"),
        ("--threads one", "--threads: numbers from 1 to"),
        ("--dtypes f8", "--dtypes: some of f32,f64,bf16,f16, got f8"),
        ("--rows openblas --dtypes f16", "there is nothing to measure"),
        ("--seconds nan", "--seconds: a number above 0, got nan"),
        ("--from nowhere", "--from nowhere: No such file"),
        ("--from pyproject.toml", "these are not rows of cpu-ratio"),
        ("--out pyproject.toml", "--out pyproject.toml: File exists"),
        ("--fast", "unrecognized arguments: --fast"),
    ],
)
def test_unusable_arguments_get_one_line(
    arguments: str, why: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    try:
        status = command.main(["cpu-ratio", *arguments.split()])
    except SystemExit as ended:
        status = ended.code
    (line,) = capsys.readouterr().err.splitlines()
    assert status == 2
    assert why in line


@pytest.mark.parametrize("threads", [1, 2])
def test_peak_adds_normal_numbers_up(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "TURNS", 1000)
    with timer.threads(threads):
        top = roofline.loop("float32")
    assert top is not None
    block = driver.config("float32")
    sums = top.call().view(torch.float32).reshape(threads, -1)[:, : block.lanes]
    chains = roofline.CHAINS[block.isa]
    assert top.flops == 2 * 1000 * chains * block.lanes * threads
    x, y = torch.randn(2, block.lanes, generator=torch.Generator().manual_seed(0)).double()
    expected = chains * 1000 * x * y + sum(range(chains))
    torch.testing.assert_close(sums.double(), expected.expand(threads, -1), rtol=1e-3, atol=1.0)


def test_peak_of_float16_is_that_of_float32() -> None:
    assert roofline.loop("float16") is None


def test_openblas_and_this_package_time_interleaved() -> None:
    with ratio_openblas.Match(threads=1, seconds=0.001, pin=False) as match:
        found = match.compare(ratio_workloads.RatioWorkload("openblas", "f64", "NN", 64, 64, 64))
        second = match.compare(ratio_workloads.RatioWorkload("openblas", "f32", "NN", 64, 64, 64))
    assert list(found["seconds"]) == ["numpy", "matmul_grad"]
    assert found["rounds"] == second["rounds"] == 3
    one = ["numpy", "matmul_grad"]  # to prepare; then three rounds, each in the order of the one before, turned
    assert [turn.name for turn in match.turns] == 2 * [*one, *one, *one[::-1], *one]
    for before, after in itertools.pairwise(match.turns):
        assert before.start < before.end <= after.start - ratio_openblas.REST


def test_slow_rivals_have_fewer_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(timer, "perf_counter", lambda: clock[0])

    def slow() -> float:
        clock[0] += 0.02
        return 1.0

    batches = {"slow": slow, "quick": lambda: 0.0}
    assert [len(times) for times in timer.time_interleaved(batches, 0.001).values()] == [3, 3]
    assert [len(times) for times in timer.time_interleaved(batches, 0.03).values()] == [5, 5]


def test_failed_worker_says_why() -> None:
    with worker.Worker("matmul_grad.bench.ratio_worker", "--threads=1", "--seconds=0") as child:
        with pytest.raises(worker.WorkerFailed, match="KeyError: 'nothing'"):
            child.ask(vars(ratio_workloads.RatioWorkload("nothing", "f32", "NN", 1, 1, 1)))
        assert child.ask(vars(ratio_workloads.RatioWorkload("overhead", "f32", "NN", 8, 8, 8)))["part"] == "overhead"
    with (
        worker.Worker("matmul_grad.bench.nowhere") as child,
        pytest.raises(worker.WorkerFailed, match="ended with status 1"),
    ):
        child.ask({})
