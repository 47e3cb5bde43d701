"""`python -m bench cpu-ratio`: figures as its rows say, a fall noticed, files of before read, runs gone on with."""

from __future__ import annotations

import itertools
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from matmul_grad.bench import __main__ as command
from matmul_grad.bench import results, runner, targets, workloads

ROOT = Path(__file__).parents[2]
QUICK = ["cpu-ratio", "--quick", "--threads=1", "--dtypes=f32", "--rows=step,overhead", "--seconds=0.001"]


@pytest.fixture
def ratio_row(row: Any) -> Any:
    """Without a peak, but where one is given."""

    def make(value: float, dtype: str = "f32", layout: str = "NN", **more: Any) -> dict[str, Any]:
        found = row(value, more.pop("product", "forward"), dtype, layout, more.pop("n", 64))
        del found["peak"]
        return found | more

    return make


@pytest.fixture
def ratio_result(result: Any) -> Any:
    def make(rows: list[Any], time: str = "12:00:00", **more: Any) -> dict[str, Any]:
        found = result(rows, kind="cpu-ratio", settings={"quick": False}, **more)
        return found | {"stamp": found["stamp"] | {"time": time, "CPU": "Some CPU, 2 cores"}}

    return make


def shown(rows: list[Any], committed: list[Any] | None = None) -> dict[tuple[str, int], Any]:
    found = targets.entries(targets.CPU, rows, committed or [])
    return {(entry.target.name, int(entry.column)): entry for entry in found}


def test_figures_are_what_the_rows_say(ratio_row: Any) -> None:
    rows = [ratio_row(2.0), ratio_row(8.0, layout="NT"), ratio_row(0.5, "bf16"), ratio_row(3.0, threads=2)]
    rows += [ratio_row(9.0, n=n, threads=2, peak={"median": peak}) for n, peak in ((1024, 4.0), (2048, 2.0))]
    rows += [ratio_row(1.5, product="step"), ratio_row(0.9, mode="operator", n=8)]
    rows += [ratio_row(2.0, n=256, threads=2, ratio={"numpy": {"median": 0.7}})]
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
        ("float32 against OpenBLAS", 2): pytest.approx(0.7),
        ("float32 call of 8×8", 1): pytest.approx(0.9),
    }
    assert table["worst product", 1].figure.note == "forward-bf16-NN-64x64x64-1t"
    assert table["worst product", 1].short_by == pytest.approx(0.4)
    assert table["worst product", 2].short_by == 0
    assert targets.peaks(rows) == {("f32", 2): 3.0}


def test_targets_are_those_agreed_on() -> None:
    assert [(target.name, *target.columns.values()) for target in targets.CPU] == [
        ("float32 products", 1.15, 1.15), ("float64 products", 1.20, 1.20), ("bfloat16 products", 1.0, 1.0),
        ("float16 products", 1.0, 1.0), ("float32 step through autograd", 1.10, 1.10), ("worst product", 0.90, 0.85),
        ("float32 share of peak", 0.92, 0.88), ("float64 share of peak", 0.92, 0.88),
        ("float32 against OpenBLAS", 1.0, 1.0), ("float64 against OpenBLAS", 1.0, 1.0), ("float32 call of 8×8", 1.0),
    ]  # fmt: skip


def test_plan_is_whole() -> None:
    one, two = (workloads.cpu_targets(workloads.CPU_PARTS, workloads.CPU_DTYPES, [count]) for count in (1, 2))
    assert [(w.name.replace("-1t", "-2t")) for w in one[:-1]] == [w.name for w in two]
    assert one[-1] == workloads.Workload("forward", "f32", "NN", 8, 8, 8, mode="operator")
    products = [workload for workload in one if workload.product == "forward" and not workload.mode]
    assert len(products) == len(set(products)) == (6 + 3 * 6) * 3 * 4
    assert {workload.shape for workload in products} >= {(1, 768, 768), (2048, 768, 3072), (2048, 2048, 2048)}
    for target in targets.CPU:
        assert any(map(target.takes, one)), target.name
    alone = workloads.cpu_targets(["openblas"], workloads.CPU_DTYPES, [1])
    assert {(w.dtype, w.shape) for w in alone} == set(
        itertools.product(("f32", "f64"), [(n, n, n) for n in (256, 512, 1024, 2048)])
    )


def test_fall_is_judged_where_the_same_was_compared(ratio_row: Any) -> None:
    before = [ratio_row(2.0), ratio_row(8.0, layout="NT")]
    assert not shown([ratio_row(1.81), ratio_row(8.0, layout="NT")], before)["worst product", 1].fell
    assert shown([ratio_row(1.79), ratio_row(8.0, layout="NT")], before)["worst product", 1].fell
    assert not shown([ratio_row(1.79), ratio_row(1.0, layout="NT")], before[:1])["worst product", 1].fell
    assert shown([ratio_row(1.79)], before)["worst product", 1].committed.value == 2.0  # of what was measured again


@pytest.fixture
def committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ratio_row: Any, ratio_result: Any) -> Path:
    """A folder of results with one committed run, at noon; later ones of other kinds beside it."""
    folder = tmp_path / "bench" / "results"
    folder.mkdir(parents=True)
    path = results.Record(folder, ratio_result([ratio_row(2.0), ratio_row(4.0, "f64")])).finish(True)
    results.Record(folder, ratio_result([ratio_row(9.0)], "13:00:00")).finish(True, "quick")
    results.Record(folder, ratio_result([ratio_row(9.0)], "23:00:00")).write("late")
    git = ["git", "-C", str(folder), "-c", "user.name=n", "-c", "user.email=e"]
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-qm", "results"]):
        subprocess.run([*git, *arguments], check=True)
    monkeypatch.setattr(results, "checkout", lambda: tmp_path)
    return path


@pytest.mark.parametrize(("f64", "status"), [(4.0, 0), (3.5, 1)])
def test_run_is_held_against_the_committed_one(
    committed: Path, f64: float, status: int, ratio_row: Any, ratio_result: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """The file is written over, as a second run of that day does."""
    rows = [ratio_row(2.0), ratio_row(f64, "f64")]
    committed.write_text(json.dumps(ratio_result(rows, "14:00:00")), encoding="utf-8")
    assert command.main(["cpu-ratio", "--from", str(committed)]) == status
    output = capsys.readouterr()
    (line,) = (line for line in output.out.splitlines() if "float64 products" in line)
    assert line.split() == ["float64", "products", "1", "1.200", f"{f64:.3f}", "4.000"]
    fell = "cpu-ratio: fell: float64 products, 1 thread: 3.500, 12% below the committed 4.000\n"
    assert output.err == (fell if status else "")


def test_first_run_of_a_machine_is_compared_with_nothing(committed: Path, ratio_result: Any) -> None:
    stamp = ratio_result([], "14:00:00")["stamp"]
    assert results.committed(stamp, "cpu-ratio") is not None
    assert results.committed(stamp | {"CPU": "Some, 2 cores"}, "cpu-ratio") is None
    assert results.committed(stamp | {"time": "12:00:00"}, "cpu-ratio") is None
    assert results.committed(stamp, "cpu-ratio", committed.parents[3]) is None


@pytest.mark.parametrize("path", sorted((ROOT / "bench" / "results").glob("*-cpu-ratio-*.json")), ids=lambda p: p.stem)
def test_files_from_before_the_schema_are_read(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each of their rows has one ratio, of torch or of OpenBLAS."""
    before = json.loads(path.read_text(encoding="utf-8"))
    found = results.load(path, "cpu-ratio")
    assert [next(iter(row["ratio"].values()))["median"] for row in found["rows"]] == [
        row["ratio"] for row in before["rows"]
    ]
    assert {next(iter(row["ratio"])) for row in found["rows"]} <= {"torch", "numpy"}
    entries = targets.entries(targets.CPU, found["rows"])
    assert {entry.target.name for entry in entries} >= {"float32 against OpenBLAS"}
    assert command.main(["cpu-ratio", "--from", str(path), "--shapes"]) in (0, 1)
    assert "float64 against OpenBLAS" in capsys.readouterr().out


def test_run_keeps_its_rows(here: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([*QUICK, "--out", str(tmp_path)]) == 0
    measured = capsys.readouterr().out.splitlines()
    (kept,) = tmp_path.glob("20*-cpu-ratio-*-quick.json")
    text = kept.read_text(encoding="utf-8")
    assert str(ROOT) not in text and str(tmp_path) not in text
    rows = json.loads(text)["rows"]
    assert [(row["product"], row["mode"], row["n"]) for row in rows] == [("step", "", 256), ("forward", "operator", 8)]
    assert command.main(["cpu-ratio", "--from", str(kept), "--shapes"]) == 0
    again = capsys.readouterr().out.splitlines()
    assert again[-len(measured[2:]) :] == measured[2:]  # after what is to be measured, and the file's name
    assert any("step f32 NN 256×256×256" in line for line in again)


def test_quick_run_is_kept_where_it_is_asked_to(here: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(results, "checkout", lambda: None)
    assert command.main(QUICK) == 0
    assert command.main([*QUICK, "--no-save", "--out", str(tmp_path)]) == 0
    assert list(tmp_path.iterdir()) == []


def test_wrong_kernel_is_named_and_not_timed(
    here: Any, plant: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plant("matmul_grad", lambda a, b: a @ b + 1)
    assert command.main([*QUICK, "--out", str(tmp_path)]) == 1
    assert "cpu-ratio: wrong: matmul_grad, step-f32-NN-256x256x256-1t: matmul_grad" in capsys.readouterr().err
    (kept,) = tmp_path.iterdir()
    step, call = json.loads(kept.read_text(encoding="utf-8"))["rows"]
    assert set(step["seconds"]) == {"torch"} and step["ratio"] == {} if "ratio" in step else True
    assert set(call["seconds"]) == {"torch", "matmul_grad"}  # the operators themselves


def test_interrupted_run_keeps_what_it_has_and_goes_on(
    here: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measure, seen = runner.WorkerPool.measure, []

    def stop(self: Any, workload: Any, seconds: float) -> Any:
        seen.append(workload.name)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return measure(self, workload, seconds)

    monkeypatch.setattr(runner.WorkerPool, "measure", stop)
    assert command.main([*QUICK, "--out", str(tmp_path)]) == 130
    (kept,) = tmp_path.glob("*-unfinished.json")
    assert json.loads(kept.read_text(encoding="utf-8"))["whole"] is False
    assert "float32 step" in capsys.readouterr().out
    assert command.main([*QUICK, "--out", str(tmp_path)]) == 2
    assert "--resume goes on with it" in capsys.readouterr().err
    assert command.main([*QUICK, "--out", str(tmp_path), "--resume"]) == 0
    assert seen == ["step-f32-NN-256x256x256-1t", *["forward-f32-NN-8x8x8-1t-operator"] * 2]
    (kept,) = tmp_path.iterdir()
    assert kept.stem.endswith("-quick") and len(json.loads(kept.read_text(encoding="utf-8"))["rows"]) == 2
