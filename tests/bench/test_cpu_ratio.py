"""`python -m bench cpu-ratio`: figures as its rows say, a fall noticed, files of before read, runs gone on with."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from matmul_grad.bench import __main__ as command
from matmul_grad.bench import results, targets

ROOT = Path(__file__).parents[2]
QUICK = ["cpu-ratio", "--quick", "--threads=1", "--dtypes=f32", "--rows=step,overhead", "--seconds=0.001"]


@pytest.fixture
def ratio_result(result: Any) -> Any:
    def make(rows: list[Any], time: str = "12:00:00", **more: Any) -> dict[str, Any]:
        found = result(rows, kind="cpu-ratio", settings={"quick": False}, **more)
        return found | {"stamp": found["stamp"] | {"time": time, "CPU": "Some CPU, 2 cores"}}

    return make


@pytest.fixture
def committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ratio_row: Any, ratio_result: Any) -> Path:
    """A folder of results with one committed run, at noon; later ones of other kinds beside it."""
    folder = tmp_path / "bench" / "results"
    folder.mkdir(parents=True)
    path = results.Record(folder, ratio_result([ratio_row(2.0, n=128), ratio_row(4.0, "f64", n=128)])).finish(True)
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
    rows = [ratio_row(2.0, n=128), ratio_row(f64, "f64", n=128)]
    committed.write_text(json.dumps(ratio_result(rows, "14:00:00")), encoding="utf-8")
    assert command.main(["cpu-ratio", "--from", str(committed)]) == status
    output = capsys.readouterr()
    (line,) = (line for line in output.out.splitlines() if "float64 products" in line)
    assert line.split() == ["float64", "products", "1", "1.150", f"{f64:.3f}", "4.000", "met"]
    fell = "cpu-ratio: fell: float64 products, 1 thread: 3.500, 12% below the committed 4.000\n"
    assert output.err == (fell if status else "")


def test_first_run_of_a_machine_is_compared_with_nothing(committed: Path, ratio_result: Any) -> None:
    stamp = ratio_result([], "14:00:00")["stamp"]
    assert results.committed(stamp, "cpu-ratio") is not None
    assert results.committed(stamp | {"CPU": "Some, 2 cores"}, "cpu-ratio") is None
    assert results.committed(stamp | {"time": "12:00:00"}, "cpu-ratio") is None
    assert results.committed(stamp, "cpu-ratio", committed.parents[3]) is None


COMMITTED = sorted((ROOT / "bench" / "results").glob("*-cpu-ratio-*.json"))
BEFORE = [path for path in COMMITTED if json.loads(path.read_text(encoding="utf-8")).get("schema") != results.SCHEMA]


@pytest.mark.parametrize("path", BEFORE, ids=lambda path: path.stem)
def test_files_from_before_the_schema_are_read(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each of their rows has one ratio, of torch or of OpenBLAS."""
    before = json.loads(path.read_text(encoding="utf-8"))
    found = results.load(path, "cpu-ratio")
    assert [next(iter(row["ratio"].values()))["median"] for row in found["rows"]] == [
        row["ratio"] for row in before["rows"]
    ]
    assert {next(iter(row["ratio"])) for row in found["rows"]} <= {"torch", "numpy"}
    entries = targets.entries(targets.of_cpu(found["stamp"]), found["rows"])
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
