"""The bench runs, refuses to time what is wrong, and writes what it measured where it says."""

import argparse
import itertools
import json
import os
import re
from pathlib import Path
from typing import Any

import processes
import pytest
import torch

import matmul_grad
from matmul_grad.bench import packing, switch_overhead, timer

ROOT = Path(__file__).parents[2]


# A session of its own, not a part of the parallel one that runs this test.
SUITE = """
import os, sys
for name in [name for name in os.environ if name.startswith("PYTEST_XDIST")]:
    del os.environ[name]
sys.path.insert(0, os.getcwd())
import pytest
sys.exit(pytest.main(sys.argv[1:]))
"""


def suite(*options: str) -> str:
    """What pytest-benchmark prints of the suite over one tiny size."""
    quick = ["--benchmark-min-rounds=1", "--benchmark-max-time=0.0001", "--benchmark-warmup=off"]
    done = processes.run(SUITE, arguments=("bench", "--sizes=17", *quick, *options), folder=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the suite wrote its JSON, and saved it for later runs."""
    place = tmp_path_factory.mktemp("bench")
    suite(f"--benchmark-json={place / 'bench.json'}", f"--benchmark-storage={place}", "--benchmark-save=first")
    return place


@pytest.fixture(scope="module")
def saved(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "bench.json").read_text(encoding="utf-8"))


def test_suite_compares_with_a_saved_run_and_draws_histograms(folder: Path) -> None:
    drawn = folder / "drawn" / "histogram"
    options = [f"--benchmark-storage={folder}", "--benchmark-compare=0001", f"--benchmark-histogram={drawn}"]
    printed = suite("-k", "f32 and forward", *options)
    assert printed.count("(0001_first)") >= 2
    (picture,) = drawn.parent.glob("*.svg")
    assert "<svg" in picture.read_text(encoding="utf-8")


def test_suite_times_both_rivals_in_every_group(saved: dict[str, Any]) -> None:
    groups: dict[str, set[str]] = {}
    for row in saved["benchmarks"]:
        groups.setdefault(row["group"], set()).add(row["extra_info"]["backend"])
    products = itertools.product(("forward", "dgrad", "wgrad", "step"), ("f32", "f64"))
    assert groups == {f"{product}-{dtype}-17x17x17": {"torch", "matmul_grad"} for product, dtype in products}


def test_suite_stamps_its_json(saved: dict[str, Any]) -> None:
    stamp = saved["machine_info"]
    assert "node" not in stamp
    assert "date" not in stamp  # with one, no run would be of the same machine as any other
    assert saved["datetime"].startswith("20")
    assert stamp["matmul_grad"]["threads"].startswith("1 of")
    assert f"torch {torch.__version__}" in stamp["matmul_grad"]["versions"]
    assert {"CPU", "instruction set", "caches", "CPU kernels", "operator"} < set(stamp["matmul_grad"])


def test_threads_are_put_back() -> None:
    before = torch.get_num_threads()
    with pytest.raises(KeyError), timer.threads(before + 1):
        assert torch.get_num_threads() == before + 1
        raise KeyError
    assert torch.get_num_threads() == before


def test_paths_compares_packing_with_reading_in_place(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(packing, "limited", lambda block, field, limit: block)  # nothing else to compile
    monkeypatch.setattr(packing, "cases", lambda: [packing.Case("direct_rows", "float32", "NT", 13, 70, 40, 3)])
    cores = getattr(os, "sched_getaffinity", id)(0)
    assert packing.run(argparse.Namespace(seconds=0.01, save=False, out=None)) == 0
    assert getattr(os, "sched_getaffinity", id)(0) == cores
    printed = capsys.readouterr().out
    assert "direct_rows ≤ 16" in printed and "float32 NT 13×70×40" in printed


def test_paths_refuses_another_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing.direct, "multiply", lambda block, a, b, out, threads=1: torch.rand_like(out))
    with pytest.raises(AssertionError, match="elements differ"):
        packing.compare(packing.Case("direct_rows", "float32", "NN", 5, 70, 40, 1), 0.01)


def test_switch_is_compared_on_and_off(capsys: pytest.CaptureFixture[str]) -> None:
    before = matmul_grad.info()["accelerated"].get("addmm", {}).get("float32", 0)
    assert switch_overhead.run(argparse.Namespace(seconds=0.01, models=False)) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if re.search(r"\d\.\d{3}$", line)]
    assert len(rows) == 5
    assert matmul_grad.info()["on"] == []
    assert matmul_grad.info()["accelerated"]["addmm"]["float32"] > before
