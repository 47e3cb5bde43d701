"""Numbers and diagrams of the documents are generated: what is committed is what their scripts write."""

import json
from types import ModuleType
from typing import Any

import pytest
from scripts import ROOT, load

from matmul_grad.bench import results
from matmul_grad.bench.workloads import OPERATOR, Workload

README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def results_table() -> ModuleType:
    return load("docs/tools/results_table.py")


def test_readme_shows_the_committed_results(results_table: ModuleType) -> None:
    assert results_table.written(README) == README


def test_readme_has_a_row_for_each_dtype_and_instruction_set(results_table: ModuleType) -> None:
    lines = results_table.table().splitlines()
    assert len(lines) == 2 + 8
    assert all(line.count("|") == lines[0].count("|") for line in lines)
    assert "| bfloat16 | AVX2 |" in results_table.table()


def run_of(date: str, ratio: float, whole: bool = True) -> dict[str, Any]:
    """A run of `cpu-ratio`: two products of the table; a thin one, a small one and the cost of a call beside them."""
    stamp = {"date": date, "time": "12:00:00", "CPU": "Some CPU, 2 cores", "instruction set": "avx2 of avx2, generic"}
    result = results.begin(results.CPU_RATIO, stamp | {"device": "cpu"}, {}, 3)
    for workload, value in (
        (Workload("forward", "f32", "NT", 1, 768, 768), ratio),
        (Workload("forward", "f32", "NT", 64, 64, 64), 4 * ratio),
        (Workload("forward", "f32", "NT", 1024, 1024, 1), 0.25 * ratio),
        (Workload("forward", "f32", "NT", 8, 8, 8), 0.1),
        (Workload("forward", "f32", "NN", 8, 8, 8, mode=OPERATOR), 0.1),
    ):
        facts = {"flops": workload.flops, "bytes": workload.moved}
        ratios = {"torch": dict.fromkeys(("low", "median", "high"), value)}
        result["rows"].append(vars(workload) | facts | {"ratio": ratios})
    return result | {"whole": whole}


def test_the_newest_whole_run_is_shown(results_table: ModuleType, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results_table, "RESULTS", tmp_path)
    runs = [run_of("2026-01-02", 0.5), run_of("2026-01-03", 0.75), run_of("2026-01-04", 9.0, whole=False)]
    for index, run in enumerate(runs):
        (tmp_path / f"{index}-cpu-ratio-some.json").write_text(json.dumps(run), encoding="utf-8")
    lines = results_table.table().splitlines()
    row = "| float32 | AVX2 | `torch.mm` | 1.50 | 0.75 at NT 1×768×768 | – | – | – | Some CPU, 2 cores | 2026-01-03 |"
    assert row in lines
    assert "| float64 | AVX2 | – | – | – | – | – | – | Some CPU, 2 cores | 2026-01-03 |" in lines
    assert "| float32 | AVX-512 | – | – | – | – | – | – | not measured yet | – |" in lines


def test_a_run_of_some_dtypes_is_shown_for_those(results_table: ModuleType) -> None:
    run = run_of("2026-01-02", 8.0, whole=False)
    settings = {"dtypes": ["f32"], "threads": [1, 2], "rows": ["products", "thin"]}
    run |= {"planned": len(run["rows"]), "settings": settings}
    assert results_table.is_complete(run, "f32") and not results_table.is_complete(run, "f64")
    assert not results_table.is_complete(run | {"planned": 99}, "f32")  # one that was interrupted
    for left_out in ({"threads": [1]}, {"rows": ["products"]}):
        assert not results_table.is_complete(run | {"settings": settings | left_out}, "f32")


def test_thin_products_have_a_sentence_of_their_own(
    results_table: ModuleType, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results_table, "RESULTS", tmp_path)
    assert results_table.thin() == ""
    (tmp_path / "0-cpu-ratio-some.json").write_text(json.dumps(run_of("2026-01-02", 8.0)), encoding="utf-8")
    text = " ".join(results_table.thin().split())
    assert "On AVX2, one thread, 2026-01-02" in text
    assert text.endswith("float32 2.00 (worst 2.00 at NT 1024×1024×1, against `torch.mm`).")


def test_memory_is_of_the_rows_that_tell_it(results_table: ModuleType) -> None:
    """One of twenty counts less than its result; where half of them do, as in older files, nothing is shown."""
    mib = 1 << 20

    def run(untold: int) -> dict[str, Any]:
        rows = []
        for index in range(20):
            workload = Workload("forward", "f32", "NN", 1024, 1024, 1024)  # a result of 4 MiB
            peaks = {"matmul_grad": (5 + index / 10) * mib, "torch": 0 if index < untold else 7 * mib}
            rows.append(vars(workload) | {"peak bytes": peaks})
        thin = Workload("forward", "f32", "NN", 2048, 2048, 1)
        rows.append(vars(thin) | {"peak bytes": {"matmul_grad": 99 * mib, "torch": 99 * mib}})
        return {"rows": rows}

    assert results_table.memory(run(1), "f32") == "2.9 MiB (torch 3.0)"
    assert results_table.memory(run(10), "f32") == "–"
    assert results_table.memory(run(0), "f64") == results_table.memory(None, "f32") == "–"


def test_16_bits_are_held_against_casting_where_it_is_faster(
    results_table: ModuleType, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results_table, "RESULTS", tmp_path)
    run = run_of("2026-01-02", 8.0)
    for row in run["rows"]:
        row["dtype"] = "bf16"
        row["ratio"]["torch in float32"] = dict.fromkeys(("low", "median", "high"), 1.25)
    (tmp_path / "0-cpu-ratio-some.json").write_text(json.dumps(run), encoding="utf-8")
    assert "| bfloat16 | AVX2 | cast to float32, `mm`, cast back | 1.25 | 1.25 at" in results_table.table()
    for row in run["rows"]:
        row["ratio"]["torch"] = dict.fromkeys(("low", "median", "high"), 1.125)
    (tmp_path / "0-cpu-ratio-some.json").write_text(json.dumps(run), encoding="utf-8")
    assert "| bfloat16 | AVX2 | `torch.mm` | 1.12 | 1.12 at" in results_table.table()


def test_diagrams_are_what_their_script_draws() -> None:
    diagrams = load("docs/tools/diagrams.py")
    drawn = {f"{name}.svg": draw().svg() for name, draw in diagrams.DRAWINGS.items()}
    kept = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "images").iterdir()}
    assert drawn == kept


def test_every_diagram_is_shown_with_its_description() -> None:
    diagrams = load("docs/tools/diagrams.py")
    pages = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs").glob("*.md"))
    for name, draw in diagrams.DRAWINGS.items():
        assert f"![{draw().title}](images/{name}.svg)" in pages
