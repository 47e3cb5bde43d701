"""Rows to figures, targets and pages."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import pytest

from matmul_grad.bench import files, gpu_stats, gpu_tables, gpu_workloads
from matmul_grad.bench.gpu_stats import MET, OPEN, SHORT
from matmul_grad.bench.gpu_workloads import GpuWorkload

Row = dict[str, Any]


def row(workload: GpuWorkload, device: float, call: float) -> Row:
    """Where this package takes a microsecond."""
    theirs = workload.part if "." in workload.part or "_" in workload.part else "torch"
    found: Row = {"step": "ratios", "name": workload.name, **asdict(workload), "flops": 2_000_000, "kernel": "gemm_nn"}
    for clock, ratio in (("device", device), ("call", call)):
        seconds = {theirs: {"low": 0.0, "median": ratio * 1e-6, "high": 0.0}}
        found[clock] = {"rounds": 5, "ratio": ratio, "seconds": seconds | {"matmul_grad": {"median": 1e-6}}}
    return found


def half(product: str = "forward", dtype: str = "bf16", n: int = 2048) -> GpuWorkload:
    return GpuWorkload("products", product, dtype, n, n, n)


def entry(rows: list[Row], name: str) -> gpu_stats.Entry:
    (found,) = (entry for entry in gpu_stats.entries(rows) if name in entry.line.name)
    return found


def test_forward_is_a_geometric_mean_of_both_dtypes() -> None:
    rows = [row(half(), 2.0, 0.5), row(half(dtype="f16"), 8.0, 0.5), row(half("dgrad"), 99, 99)]
    found = entry(rows, "forward, geometric mean")
    assert found.device == (pytest.approx(4.0), 1.00, "") and found.device.met == MET
    assert found.call == (pytest.approx(0.5), 1.00, "") and found.call.met == SHORT
    assert (found.rows, found.planned) == (
        2,
        len([workload for workload in planned() if workload.product == "forward"]),
    )


def planned() -> list[GpuWorkload]:
    return [
        workload
        for workload in gpu_workloads.ratios()
        if workload.part == "products" and workload.dtype in ("bf16", "f16")
    ]


def test_targets_are_met_at_the_target() -> None:
    assert gpu_stats.Figure(1.05, 1.05).met == MET
    assert gpu_stats.Figure(1.0499, 1.05).met == SHORT
    assert gpu_stats.Figure(None, 1.05).met == OPEN
    assert gpu_stats.Figure(0.1, None).met == gpu_stats.Figure(None, None).met == ""


def test_worst_shape_says_which() -> None:
    rows = [
        row(half(), 2.0, 0.7),
        row(half("wgrad", n=512), 0.8, 0.9),
        row(GpuWorkload("bmm", "forward", "bf16", 1, 1, 1), 0.1, 0.1),
    ]
    found = entry(rows, "worst")
    assert found.device == (0.8, 0.90, "wgrad-bf16-512x512x512") and found.device.met == SHORT
    assert found.call == (0.7, 0.85, "forward-bf16-2048x2048x2048")


def test_each_line_takes_its_own_rows() -> None:
    made = {
        "dgrad": row(half("dgrad"), 1.1, 1.1),
        "wgrad": row(half("wgrad"), 1.2, 1.2),
        "through autograd": row(half("step"), 1.3, 1.3),
        "batch-invariant": row(GpuWorkload("invariant", "step", "bf16", 8, 8, 8), 1.4, 1.4),
        "IEEE": row(GpuWorkload("products", "wgrad", "f32", 8, 8, 8), 1.5, 1.5),
        "float32 TF32": row(GpuWorkload("products", "forward", "f32", 8, 8, 8, precision="tf32"), 1.6, 1.6),
        "3×TF32": row(GpuWorkload("products", "forward", "f32", 8, 8, 8, precision="tf32x3"), 1.7, 1.7),
        "bmm": row(GpuWorkload("bmm", "forward", "bf16", 8, 8, 8, batch=2), 1.8, 1.8),
        "torch.compile": row(GpuWorkload("torch.compile", "forward", "bf16", 8, 8, 8), 1.9, 1.9),
        "flag_gems": row(GpuWorkload("flag_gems", "forward", "bf16", 8, 8, 8), 2.0, 2.0),
        "batch_invariant_ops": row(GpuWorkload("batch_invariant_ops", "forward", "bf16", 8, 8, 8), 2.1, 2.1),
    }
    rows = [*made.values(), row(GpuWorkload("products", "step", "f32", 8, 8, 8), 9, 9)]
    for name, mine in made.items():
        found = entry(rows, name)
        assert (found.device.value, found.rows) == (pytest.approx(mine["device"]["ratio"]), 1), name
    cube = entry([row(half(n=1024), 1.5, 1.5), row(half(n=2048), 9, 9)], "cubes")
    assert cube.device.value == pytest.approx(1.5)


def test_targets_are_those_that_were_set() -> None:
    targets = {line.name: (line.device, line.call) for line in gpu_stats.LINES}
    assert list(targets.values())[:10] == [
        (1.00, 1.00), (1.00, 1.00), (1.05, 1.00), (1.05, 1.05), (1.0, 1.0), (0.90, 0.85), (0.95, None),
        (1.0, None), (None, None), (2.0, None),
    ]  # fmt: skip


def test_memory_and_launch_targets() -> None:
    def bytes_of(ours: int, kept: int) -> Row:
        return {"bytes": {"matmul_grad": {"peak": ours, "kept": kept}, "torch": {"peak": 100, "kept": 9}}}

    assert gpu_stats.memory_met(bytes_of(100, 32 << 20)) == MET
    assert gpu_stats.memory_met(bytes_of(101, 32 << 20)) == SHORT
    assert gpu_stats.launch_met(5e-6) == MET
    assert gpu_stats.launch_met(5.1e-6) == SHORT


@pytest.fixture
def result() -> Row:
    memory = {"matmul_grad": {"peak": 3 << 20, "kept": 1 << 20}, "torch": {"peak": 4 << 20, "kept": 0}}
    quartiles = {"low": 2e-6, "median": 2.5e-6, "high": 3e-6}
    rows: list[Row] = [
        row(half(), 1.25, 0.5),
        {"step": "ratios", "name": "forward-f16-1x1x1", "wrong": "forward: error 3, torch's 0, limit 1"},
        {"step": "rivals", "name": "flag_gems-x", "skipped": "flag_gems is not installed"},
        {"step": "launch", "name": "bf16 8×8", "seconds": {"torch.mm": quartiles, "matmul_grad.mm": quartiles}},
        {"step": "native", "name": "bf16 8×8", "seconds": {"matmul_grad.mm": quartiles}},
        {"step": "memory", "name": "step-bf16-9x9x9", "bytes": memory},
    ]
    stamp = {"date": "2026-01-02", "time": "03:04:05", "GPU": "NVIDIA Fake 9000"}
    steps = [{"name": "ratios", "status": "failed", "seconds": 12.3, "note": "2 done; 1 of them failed"}]
    return {"schema": 1, "stamp": stamp, "protocol": "turns", "whole": True, "steps": steps, "rows": rows}


def test_page(result: Row) -> None:
    page = gpu_tables.markdown(result).replace(f"of {len(planned()) // 4} ", "of N ")
    for piece in (
        "# GPU report: NVIDIA Fake 9000, 2026-01-02\n\n## Figures\n\n"
        "| ratio to torch.mm | device time | target |  | call time | target |  | comparisons |\n"
        "|---|--:|--:|--:|--:|--:|--:|--:|\n"
        "| bf16, fp16 forward, geometric mean over all shapes "
        "| 1.250 | 1.00 | met | 0.500 | 1.00 | not met | 1 of N |\n"
        "| bf16, fp16 dgrad | – | 1.00 | not measured | – | 1.00 | not measured | 0 of N |\n",
        "## Wrong or failed\n\n- ratios, forward-f16-1x1x1: wrong: forward: error 3, torch's 0, limit 1\n",
        "## Steps\n\n| step |  |  |  |\n|---|---|---|---|\n| ratios | failed | 12 s | 2 done; 1 of them failed |\n",
        "| bf16 8×8 | torch.mm | 2.50 | 2.00–3.00 |  |\n| bf16 8×8 | matmul_grad.mm | 2.50 | 2.00–3.00 | met |\n"
        "| bf16 8×8, native | matmul_grad.mm | 2.50 | 2.00–3.00 | met |\n",
        "| MiB above the operands | peak | kept | torch's peak | kept | ≤ torch's + 32 |\n|---|--:|--:|--:|--:|--:|\n"
        "| step-bf16-9x9x9 | 3.0 | 1.0 | 4.0 | 0.0 | met |\n",
        "| forward-bf16-2048x2048x2048 | gemm_nn | torch | 1.25 | 1.00 | 2.0 | 1.250 | 0.500 |\n",
        "## Left out\n\n- rivals, flag_gems-x: flag_gems is not installed\n",
        "## Machine\n\n|  |  |\n|---|---|\n| date | 2026-01-02 |\n",
    ):
        assert piece in page
    assert "whole run" not in page
    assert "Not a whole run" in gpu_tables.markdown(result | {"whole": False})


def test_a_bar_in_a_cell_is_no_column() -> None:
    assert gpu_tables.table(["a"], [["x | y"]]).splitlines()[-1] == r"| x \| y |"


def test_json_comes_back_as_it_was_a_row_a_line(result: Row) -> None:
    text = files.as_json(result)
    assert json.loads(text) == result
    assert len([line for line in text.splitlines() if line.startswith('  {"')]) == len(result["rows"])
    assert json.loads(files.as_json(result | {"rows": []}))["rows"] == []


def test_last_words(result: Row) -> None:
    lines = gpu_tables.last_words(result)
    assert lines[0] == "bf16, fp16 forward, geometric mean over all shapes, device time: 1.250 (target 1.00, met)"
    assert lines[-1].startswith("ratios, forward-f16-1x1x1: wrong")
