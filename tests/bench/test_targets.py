"""Figures that have targets: what each is made of, what it should be, and how a table shows it."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from matmul_grad.bench import backends, gpu_report, tables, targets, workloads
from matmul_grad.bench.workloads import INVARIANT

AVX2 = {"instruction set": "avx2 of avx2, generic"}


def shown(rows: list[Any], committed: list[Any] | None = None) -> dict[tuple[str, int], Any]:
    found = targets.entries(targets.of_cpu(AVX2), rows, committed or [])
    return {(entry.target.name, int(entry.column)): entry for entry in found}


def test_figures_are_what_the_rows_say(ratio_row: Any) -> None:
    rows = [ratio_row(2.0), ratio_row(8.0, layout="NT"), ratio_row(0.5, "bf16"), ratio_row(3.0, threads=2)]
    rows += [ratio_row(9.0, n=n, threads=2, peak={"median": peak}) for n, peak in ((1024, 4.0), (2048, 2.0))]
    rows += [ratio_row(1.5, product="step", n=256), ratio_row(0.9, mode="operator", n=8)]
    rows += [ratio_row(0.7, product="step"), ratio_row(2.0, n=16), ratio_row(0.25, "f64", m=1, n=4096, k=4096)]
    rows += [ratio_row(2.0, n=256, threads=2, ratio={"numpy": {"median": 0.7}})]
    table = shown(rows)
    values = {which: entry.figure.value for which, entry in table.items()}
    assert values == {
        ("float32 products", 1): pytest.approx(4.0, rel=1e-12),
        ("float32 products", 2): pytest.approx(243 ** (1 / 3), rel=1e-12),
        ("bfloat16 products", 1): 0.5,
        ("float32 step, cubes from 256", 1): pytest.approx(1.5),
        ("float32 step, cubes to 64", 1): pytest.approx(0.7),
        ("float32 call, cubes to 64", 1): pytest.approx(32 ** (1 / 3), rel=1e-12),
        ("worst product", 1): 0.25,
        ("worst product", 2): 3.0,
        ("one row, one column, k ≤ 2", 1): 0.25,
        ("float32 share of peak", 2): pytest.approx(0.375),
        ("float32 against OpenBLAS", 2): pytest.approx(0.7),
        ("float32 call of 8×8", 1): pytest.approx(0.9),
    }
    assert table["worst product", 1].figure.note == "forward-f64-NN-1x4096x4096-1t"
    assert (table["worst product", 1].verdict, table["worst product", 2].verdict) == ("short by 0.650", "met")
    assert table["float32 share of peak", 2].verdict == "short by 52.5%"
    assert table["bfloat16 products", 1].verdict == "", "it has no target"
    assert targets.peaks(rows) == {("f32", 2): 3.0}


def test_targets_are_those_agreed_on() -> None:
    """On one thread and on two: AVX-512, then AVX2."""
    both = {
        "float32 products": ((1.20, 1.20), (1.10, 1.10)),
        "float64 products": ((1.20, 1.20), (1.15, 1.15)),
        "bfloat16 against casting to float32": ((1.3, 1.3), (1.1, 1.1)),
        "float16 against casting to float32": ((1.3, 1.3), (1.1, 1.1)),
        "float32 step, cubes from 256": ((1.15, 1.15), (1.08, 1.08)),
        "float32 step, cubes to 64": ((1.0,), (1.0,)),
        "float32 call, cubes to 64": ((1.0,), (1.0,)),
        "float64 call, cubes to 64": ((1.0,), (1.0,)),
        "worst product": ((0.95, 0.95), (0.90, 0.90)),
        "float32 share of peak": ((0.93, 0.93), (0.90, 0.90)),
        "float64 share of peak": ((0.93, 0.93), (0.90, 0.90)),
        "float32 against OpenBLAS": ((1.03, 1.03), (1.0, 1.0)),
        "float64 against OpenBLAS": ((1.03, 1.03), (1.0, 1.0)),
        "float32 call of 8×8": ((1.0,), (1.0,)),
    }
    for index, isa in enumerate(("avx512 of avx512, avx2, generic", "avx2 of avx512, avx2, generic")):
        found = targets.of_cpu({"instruction set": isa})
        assert {t.name: tuple(t.columns.values()) for t in found if t.columns} == {n: v[index] for n, v in both.items()}
    assert not any(target.columns for target in targets.of_cpu({"instruction set": "neon of neon, generic"}))


def test_plan_is_whole() -> None:
    one, two = (workloads.cpu_targets(workloads.CPU_PARTS, workloads.CPU_DTYPES, [count]) for count in (1, 2))
    alone = set(workloads.cpu_targets(workloads.UNSHARED, workloads.CPU_DTYPES, [1]))
    cubes = {w.shape for w in alone if w.product == "forward" and not w.mode}
    assert cubes == {w.shape for w in alone if w.product == "step"} == {(n, n, n) for n in (8, 16, 32, 64)}
    assert {w.name.replace("-1t", "-2t") for w in one if w not in alone or w.shape == (64, 64, 64)} >= {
        w.name for w in two
    }
    assert workloads.Workload("forward", "f32", "NN", 8, 8, 8, mode="operator") in one
    products = {workload for workload in one if workload.product == "forward" and not workload.mode}
    for what in {(w.dtype, w.shape) for w in products}:
        assert {w.layout for w in products if (w.dtype, w.shape) == what} == {"NN", "NT", "TN"}, what
    shapes = {workload.shape for workload in products}
    assert shapes >= {(1, 768, 768), (2048, 768, 3072), (2048, 2048, 2048), (4096, 1, 4096), (2048, 2048, 2)}
    assert len(products) == (6 + 3 * 6 + 8) * 3 * 4 + 3 * 3 * 2
    for target in targets.CPU:
        assert any(map(target.takes, one)), target.name
    openblas = workloads.cpu_targets(["openblas"], workloads.CPU_DTYPES, [1])
    assert {(w.dtype, w.shape) for w in openblas} == set(
        itertools.product(("f32", "f64"), [(n, n, n) for n in (64, 128, 256, 512, 1024, 2048)])
    )


def test_memory_table_shows_the_product_that_takes_the_most(ratio_row: Any) -> None:
    def peaks(**beside: int) -> dict[str, int]:
        return {name.replace("_in_", " in "): (2 << 20) + (count << 20) for name, count in beside.items()}

    rows = [
        ratio_row(1.0, "bf16", n=1024, **{"peak bytes": peaks(torch_in_float32=24, matmul_grad=7)}),
        ratio_row(1.0, "bf16", n=1024, layout="NT", **{"peak bytes": peaks(torch=9, matmul_grad=8)}),
        ratio_row(1.0, "bf16", n=1024, product="step", **{"peak bytes": {"torch": 99 << 20}}),
    ]
    assert tables.extra_lines(rows) == [["bf16 NN 1024×1024×1024", "1", "7.0", "–", "24.0"]]
    rows[1]["peak bytes"]["torch"] = 0
    assert tables.extra_lines(rows) == [], "a peak below the result was measured in a process that had freed one"


def test_fall_is_judged_where_the_same_was_compared(ratio_row: Any) -> None:
    before = [ratio_row(2.0), ratio_row(8.0, layout="NT")]
    assert not shown([ratio_row(1.81), ratio_row(8.0, layout="NT")], before)["worst product", 1].fell
    assert shown([ratio_row(1.79), ratio_row(8.0, layout="NT")], before)["worst product", 1].fell
    assert not shown([ratio_row(1.79), ratio_row(1.0, layout="NT")], before[:1])["worst product", 1].fell
    assert shown([ratio_row(1.79)], before)["worst product", 1].committed.value == 2.0  # of what was measured again


@pytest.fixture
def gpu_row(row: Any) -> Any:
    """Where this package takes a microsecond on the device."""

    def make(device: float, call: float, dtype: str = "bf16", product: str = "forward", **more: Any) -> Any:
        against = more.pop("against", "torch")
        times = {
            "device seconds": {against: {"median": device * 1e-6}, "matmul_grad": {"median": 1e-6}},
            "device ratio": {against: {"low": device, "median": device, "high": device}},
            "ratio": {against: {"low": call, "median": call, "high": call}},
        }
        found = row(1.0, product, dtype, n=more.pop("n", 2048))
        return found | {"step": "ratios", "device": "cuda", "flops": 2_000_000} | times | more

    return make


def entry(rows: list[Any], name: str, column: str = "device") -> targets.Entry:
    entries = gpu_report.figures({"rows": rows, "settings": {}})
    (found,) = (entry for entry in entries if name in entry.target.name and entry.column == column)
    return found


def test_each_target_takes_its_own_rows(gpu_row: Any) -> None:
    made = {
        "dgrad": gpu_row(1.1, 1.1, product="dgrad"),
        "wgrad": gpu_row(1.2, 1.2, product="wgrad"),
        "through autograd": gpu_row(1.3, 1.3, product="step"),
        "batch-invariant": gpu_row(1.4, 1.4, product="step", mode=INVARIANT),
        "IEEE": gpu_row(1.5, 1.5, "f32", "wgrad"),
        "float32 TF32": gpu_row(1.6, 1.6, "f32", precision="tf32"),
        "3×TF32": gpu_row(1.7, 1.7, "f32", precision="tf32x3"),
        "bmm": gpu_row(1.8, 1.8, batch=32),
        "torch.compile": gpu_row(1.9, 1.9, against="torch.compile", step="rivals"),
        "flag_gems": gpu_row(2.0, 2.0, against="flag_gems", step="rivals"),
    }
    rows = [*made.values(), gpu_row(9, 9, "f32", "step")]
    for name, mine in made.items():
        found = entry(rows, name)
        ratio = next(iter(mine["device ratio"].values()))["median"]
        assert found.figure and (found.figure.value, len(found.figure.workloads)) == (pytest.approx(ratio), 1), name
    cubes = entry([gpu_row(1.5, 1.5, n=1024), gpu_row(9, 9, n=2048)], "cubes")
    assert cubes.figure and cubes.figure.value == pytest.approx(1.5)
    rows = [gpu_row(2.0, 0.5), gpu_row(8.0, 0.5, "f16"), gpu_row(99, 99, product="dgrad")]
    for column, value, short in (("device", 4.0, 0.0), ("call", 0.5, 0.5)):
        found = entry(rows, "forward, geometric mean", column)
        assert found.figure and (found.figure.value, found.short_by) == (pytest.approx(value), pytest.approx(short))
    worst = entry([gpu_row(2.0, 0.7), gpu_row(0.8, 0.9, product="wgrad"), gpu_row(0.1, 0.1, batch=2)], "worst")
    assert worst.figure and (worst.figure.value, worst.figure.note) == (0.8, "wgrad-bf16-NN-2048x2048x2048-cuda")


def test_targets_are_those_that_were_set() -> None:
    assert [tuple(target.columns.values()) for target in targets.GPU][:10] == [
        (1.00, 1.00), (1.00, 1.00), (1.05, 1.00), (1.05, 1.05), (1.0, 1.0), (0.90, 0.85), (0.95, None),
        (1.0, None), (None, None), (2.0, None),
    ]  # fmt: skip


def test_targets_are_met_at_the_target(gpu_row: Any) -> None:
    assert entry([gpu_row(1.05, 1.05, product="wgrad")], "wgrad").short_by == 0
    assert entry([gpu_row(1.0499, 1.0, product="wgrad")], "wgrad").short_by == pytest.approx(1e-4)
    assert entry([gpu_row(0.1, 0.1, "f32", precision="tf32")], "float32 TF32").short_by == 0  # it has no target
    memory = {"peak bytes": {"matmul_grad": 100, "torch": 100}, "kept bytes": {"matmul_grad": 32 << 20, "torch": 9}}
    assert targets.memory_met(memory) == targets.MET
    memory["peak bytes"]["matmul_grad"] += 1
    assert targets.memory_met(memory) == targets.SHORT
    assert (targets.host_met(5e-6), targets.host_met(5.1e-6)) == (targets.MET, targets.SHORT)


def test_page(gpu_row: Any, result: Any) -> None:
    quartiles = {"low": 2e-6, "median": 2.5e-6, "high": 3e-6}
    memory = {"matmul_grad": 3 << 20, "torch": 4 << 20}, {"matmul_grad": 1 << 20, "torch": 0}
    rows = [
        gpu_row(1.25, 0.5),
        {"step": "rivals", "name": "a", "skipped": {"flag_gems": "not installed"}},
        {"step": "launch", "name": "bf16 8×8", "host seconds": {"torch.mm": quartiles, "matmul_grad.mm": quartiles}},
        {"step": "native", "name": "bf16 8×8", "host seconds": {"matmul_grad.mm": quartiles}},
        {"step": "sanitized", "name": "x", "wrong": {"matmul_grad": "off by one"}},
        gpu_row(1.0, 1.0, product="step", n=9) | {"step": "memory", "peak bytes": memory[0], "kept bytes": memory[1]},
    ]
    steps = [{"name": "ratios", "status": "failed", "seconds": 12.3, "note": "2 done; 1 of them failed"}]
    whole = result(rows, steps=steps)
    whole["stamp"] |= {"device": "cuda", "GPU": "NVIDIA Fake 9000"}
    count = len([workload for workload in workloads.gpu_targets() if targets.GPU[0].takes(workload)])
    page = tables.report(whole, gpu_report.figures(whole))
    for piece in (
        "# GPU report: NVIDIA Fake 9000, 2026-01-02\n",
        f"| bf16, fp16 forward, geometric mean over all shapes | device | 1.000 | 1.250 | – | met | 1 of {count} |\n",
        f"| call | 1.000 | 0.500 | – | short by 0.500 | 1 of {count} |\n"
        "| bf16, fp16 dgrad | device | 1.000 | – | – | not measured | 0 of ",
        "- wrong: matmul_grad, sanitized, x: off by one\n",
        "## Steps\n\n| step |  |  |  |\n|---|---|---|---|\n| ratios | failed | 12 s | 2 done; 1 of them failed |\n",
        "| bf16 8×8 | torch.mm | 2.50 | 2.00–3.00 |  |\n| bf16 8×8 | matmul_grad.mm | 2.50 | 2.00–3.00 | met |\n"
        "| bf16 8×8, native | matmul_grad.mm | 2.50 | 2.00–3.00 | met |\n",
        "| step bf16 NN 9×9×9 | 3.0 | 1.0 | 4.0 | 0.0 | met |\n",
        "| cuda | bf16 | forward | NN 2048×2048×2048 |",
        "## Left out\n\n- flag_gems: not installed (1 comparisons)\n",
        "## Machine\n\n|  |  |\n|---|---|\n| date | 2026-01-02 |\n",
    ):
        assert piece in page, piece
    assert "Not a whole run" not in page and "Not a whole run" in tables.report(whole | {"whole": False}, [])


@pytest.mark.parametrize(
    ("dtype", "features", "pace"),
    [
        ("f32", (), 60e9), ("bf16", (), 2e9), ("f16", (), 2e9), ("bf16", ("avx512f",), 6e9),
        ("f16", ("avx512f", "avx512bf16"), 2e9), ("bf16", ("avx512f", "avx512bf16"), 100e9),
        ("f16", ("avx512f", "avx512fp16"), 100e9),
    ],
)  # fmt: skip
def test_time_of_sixteen_bits_depends_on_the_instruction_set(
    dtype: str, features: tuple[str, ...], pace: float
) -> None:
    assert workloads.pace(dtype, dict.fromkeys(features, True)) == pace


def test_torch_is_left_out_where_its_loop_takes_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = [workloads.Workload("forward", "bf16", "NN", n, n, n) for n in (512, 1024)]
    timed = {name: backends.BY_NAME[name] for name in (workloads.TORCH, workloads.CAST, workloads.OURS)}

    def takes(features: dict[str, bool]) -> dict[str, list[bool]]:
        monkeypatch.setattr(workloads.host, "host_features", lambda: features)
        return {name: [backend.takes(workload) for workload in shapes] for name, backend in timed.items()}

    everywhere = {name: [True, True] for name in timed}
    assert takes({"avx512f": True, "avx512bf16": True}) == everywhere
    assert takes({"avx2": True}) == everywhere | {workloads.TORCH: [True, False]}
    assert shapes[1].weight(0.5) < 2 < shapes[0].weight(0.5), "what is left out takes no time"
