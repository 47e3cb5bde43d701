"""A run: its rows, what is planted in it and caught, what is kept when it is stopped, what it refuses."""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import matmul_grad
from matmul_grad import api
from matmul_grad.bench import backends, commands, devices, inputs, results, runner, stats, workloads
from matmul_grad.bench.workloads import Workload

Bench = Callable[..., tuple[int, Any]]
Plant = Callable[[str, Any], None]
TINY = ((64, 64, 64), (8, 8, 8))


def test_row_holds_what_was_measured(bench: Bench, tmp_path: Path) -> None:
    status, written = bench(((33, 17, 300), (8, 8, 8)), "--dtype=f32,bf16")
    assert status == 0 and written["whole"] and written["schema"] == 1
    assert len(written["rows"]) == written["planned"] == 2 * 2 * 6
    assert str(tmp_path) not in json.dumps(written) and "node" not in written["stamp"]
    assert {"date", "CPU", "instruction set", "versions", "rivals", "load at the start"} < set(written["stamp"])
    for row in written["rows"]:
        assert set(row["seconds"]) == {"torch", "matmul_grad"} and row["rounds"] >= 3
        assert "peak" in row or row["dtype"] == "bf16"  # which has a peak of its own where the CPU multiplies it
        peaks = [row["peak"]] if "peak" in row else []
        for times in (*row["seconds"].values(), row["ratio"]["torch"], *peaks):
            assert 0 < times["low"] <= times["median"] <= times["high"]
        assert row["first"]["torch"] > 0
        large = row["dtype"] == "f32" and row["m"] == 33
        assert ("peak bytes" in row) == (large and row["layout"] == "NN")
        assert row["copies"] == (
            1 if row["m"] == 8 else inputs.copies_past(1 << 20, workloads.of_row(row).held, 1 << 40)
        )
        assert not {"wrong", "failed", "skipped"} & set(row)
    step = next(row for row in written["rows"] if row["product"] == "step" and row["dtype"] == "f32")
    assert step["flops"] == 3 * 2 * 33 * 17 * 300
    assert step["bytes"] == 3 * 4 * (33 * 300 + 300 * 17 + 33 * 17)
    (roof,) = written["roofs"]
    assert roof["GB/s"]["median"] > 0


def test_every_key_is_documented(bench: Bench) -> None:
    _, written = bench(TINY, "--dtype=f32", "--pass=forward")
    page = (Path(__file__).parents[2] / "docs" / "bench.md").read_text(encoding="utf-8")
    named = {*written, *written["settings"], *written["roofs"][0], *(key for row in written["rows"] for key in row)}
    named |= {"wrong", "failed", "skipped", "device seconds", "device ratio", *results.COLUMNS}
    assert not [key for key in sorted(named) if f"`{key}`" not in page]


def wrong(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    c = torch.mm(a, b).clone()
    c.data[-1, -1] += 1
    return c


@pytest.mark.parametrize("name", ["matmul_grad", "torch"])
def test_planted_wrong_kernel_is_a_failure_and_has_no_time(
    bench: Bench, plant: Plant, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    plant(name, wrong)
    status, written = bench(TINY[:1], "--dtype=f32", "--pass=forward,step")
    assert status == 1
    assert f"wrong: {name}, forward-f32-NN-64x64x64-1t: {name}, " in capsys.readouterr().err
    for row in written["rows"]:
        assert name not in row["seconds"] and name in row["wrong"] and "torch" not in row.get("ratio", {})
    assert all(len(row["seconds"]) == 1 for row in written["rows"])  # the other was timed all the same


def test_planted_wrong_gradient_is_found(bench: Bench, plant: Plant) -> None:
    plant("matmul_grad", lambda a, b: 2 * api.mm(a, b) - api.mm(a, b.detach()))
    status, written = bench(TINY[:1], "--dtype=f32", "--pass=forward,step")
    assert status == 1
    found = {row["product"]: row.get("wrong", {}).get("matmul_grad", "") for row in written["rows"]}
    assert "wgrad: on integers 64 of 64 rows" in found["step"] and not found["forward"]


def test_planted_self_comparison_is_shown(
    bench: Bench, plant: Plant, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    plant("torch", lambda a, b: api.mm(a, b))
    status, _ = bench(((16, 24, 600), (16, 24, 900)), "--dtype=f32", "--pass=forward,dgrad", drawn=True)
    assert status == 1
    assert "suspect: torch gives the bits of matmul_grad wherever it was judged" in capsys.readouterr().err
    assert "suspect: torch" in (tmp_path / "out" / "bench.html").read_text(encoding="utf-8")


def test_torch_itself_is_no_suspect(bench: Bench) -> None:
    assert bench(((16, 24, 600), (600, 600, 600)), "--dtype=f32,f64")[0] == 0
    assert bench(((256, 256, 256),), "--dtype=f32", "--pass=forward", out="one")[0] == 0


def test_torch_on_these_kernels_is_caught(bench: Bench) -> None:
    """The switch left on: torch.mm would be this package's."""
    with matmul_grad.enabled():
        status, written = bench(TINY[:1], "--dtype=f32", "--pass=forward")
    assert status == 1
    assert all("compared with itself" in row["wrong"]["torch"] for row in written["rows"])


def test_hand_over_to_torch_is_caught(bench: Bench, plant: Plant) -> None:
    """A product of ours that is torch's is an error, and not a time of ours."""
    plant("matmul_grad", lambda a, b: api.mm(a.to(torch.complex64), b.to(torch.complex64)).real)
    status, written = bench(TINY[:1], "--dtype=f32", "--pass=forward")
    assert status == 1 and "strict()" in written["rows"][0]["failed"]["matmul_grad"]


def test_planted_zeros_are_caught(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "fill_normal", lambda memory, generator, longest: memory.zero_())
    status, written = bench(TINY[:1], "--dtype=f32", "--pass=forward")
    assert status == 1
    for row in written["rows"]:
        assert "not standard normal: mean 0.000, deviation 0.000" in row["wrong"]["torch"]
        assert "seconds" not in row


@pytest.fixture
def slow(clock: Any) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    def mm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        clock.now += 0.002
        return torch.mm(a, b)

    return mm


def test_planted_slow_rival_is_shown(bench: Bench, plant: Plant, slow: Any) -> None:
    plant("torch", slow)
    status, written = bench(TINY[:1], "--dtype=f32", "--pass=forward")
    assert status == 0
    for row in written["rows"]:
        assert row["seconds"]["torch"]["low"] > 0.002
        assert row["ratio"]["torch"]["low"] > 10


def test_slow_kernel_fails_where_it_is_asked_to(
    bench: Bench, plant: Plant, slow: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    plant("matmul_grad", slow)
    status, _ = bench(TINY[:1], "--dtype=f32", "--pass=forward", "--fail-below=0.5")
    assert status == 1
    assert "forward f32, 1 thread: 0.0" in capsys.readouterr().err
    assert bench(TINY[:1], "--dtype=f32", "--pass=forward", out="other")[0] == 0


def test_rivals_time_interleaved(monkeypatch: pytest.MonkeyPatch, here: None) -> None:
    asked: list[str] = []
    selected = backends.chosen(["torch", "numpy"], "cpu")
    with runner.WorkerPool(selected, "cpu", 1, False) as pool:
        ask = pool.ask
        monkeypatch.setattr(pool, "ask", lambda p, task: asked.append(task.get("time", "prepare")) or ask(p, task))
        row = pool.measure(Workload("forward", "f32", "NN", 16, 16, 16), 0.0)
    first = ["torch", "matmul_grad", "peak", "numpy"]
    turned = [first[i:] + first[:i] for i in range(row["rounds"])]
    assert asked == ["prepare", "prepare", *itertools.chain(*turned)]


def test_processes_with_threads_rest_between_turns(monkeypatch: pytest.MonkeyPatch, here: None) -> None:
    rests: list[float] = []
    monkeypatch.setattr(runner, "sleep", rests.append)
    selected = backends.chosen(["torch", "numpy"], "cpu")
    for threads, expected in ((1, 0), (2, 2)):
        rests.clear()
        with runner.WorkerPool(selected, "cpu", threads, False) as pool:
            pool._prepare(Workload("forward", "f32", "NN", 16, 16, 16, threads), {})
        assert rests == [runner.REST] * expected


def test_disturbed_comparison_is_tried_again(monkeypatch: pytest.MonkeyPatch, here: None) -> None:
    shares = iter([0.5] * 100)
    monkeypatch.setattr(runner, "TRIES", 3)
    monkeypatch.setattr(runner.timer, "AT_REST", 0.97)
    selected = backends.chosen(["torch"], "cpu")
    with runner.WorkerPool(selected, "cpu", 1, False) as pool:
        monkeypatch.setattr(pool, "ask", lambda p, task: {"seconds": 0.0, "share": next(shares)})
        row: dict[str, Any] = {}
        with pytest.raises(ZeroDivisionError):  # after the last try, whose times are what this test says
            pool._time({"torch": "torch", "matmul_grad": "torch"}, "call", 0.0, row)
    assert 100 - len(list(shares)) == 3 * 2 * 3  # tries, backends, rounds


def stopped_after(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the comparison behind ``count`` others."""
    measure, done = runner.WorkerPool.measure, []

    def stop(self: Any, workload: Workload, seconds: float) -> Any:
        if len(done) == count:
            raise KeyboardInterrupt
        done.append(workload)
        return measure(self, workload, seconds)

    monkeypatch.setattr(runner.WorkerPool, "measure", stop)


def test_interrupt_before_the_first_row(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped_after(0, monkeypatch)
    assert bench(TINY, "--dtype=f32") == (130, None)


def test_minutes_hold_the_report_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "monotonic", lambda: 1000.0)
    for minutes, seconds in ((3.0, 155.0), (0.5, 24.0)):
        assert commands.clock(argparse.Namespace(minutes=minutes, device="cpu", suite="quick"))() == seconds


def test_no_comparison_is_begun_that_the_time_is_too_short_for(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(commands, "clock", lambda _: lambda: 0.05)
    assert bench(TINY, "--dtype=f32") == (2, None)
    assert capsys.readouterr().err == "bench: the time was up before anything was measured\n"


def test_time_that_is_up_ends_the_run_between_two_comparisons(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    left = iter([100.0] * 20)
    monkeypatch.setattr(commands, "clock", lambda _: lambda: next(left, -1.0))
    status, written = bench(TINY, "--dtype=f32")
    assert status == 0 and not written["whole"] and 0 < len(written["rows"]) < 12


def test_what_does_not_fit_into_memory_is_left_out(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(devices.Cpu, "free_bytes", lambda self: 100_000)
    status, written = bench(TINY, "--dtype=f32", "--pass=forward", drawn=True)
    assert status == 0
    large = [row for row in written["rows"] if row["m"] == 64]
    assert all("GiB of free memory" in row["skipped"]["matmul_grad"] for row in large)
    assert all("seconds" in row for row in written["rows"] if row["m"] == 8)
    assert "needs 0.0 GiB of free memory (3 comparisons)" in (tmp_path / "out" / "bench.md").read_text(encoding="utf-8")


def test_summary_is_what_the_rows_say(row: Any) -> None:
    rows = [row(2.0), row(8.0, layout="NT"), row(0.5, n=128), row(3.0, "dgrad")]
    found = stats.summaries(rows)
    (forward,) = found[stats.group_of(rows[0])]
    assert (forward.mean.median, forward.worst, forward.worst_cell) == (2.0, 0.5, "NN 128×128×128")
    assert stats.share_of_peak(rows[0]) == pytest.approx(0.5)
    assert stats.rate(rows[0], "torch") == pytest.approx(0.5)
    assert workloads.OURS not in {s.backend for some in found.values() for s in some}


def test_twins_are_those_whose_long_sums_agree_everywhere(row: Any) -> None:
    same, other = {"bits": {"torch": "a", "matmul_grad": "a"}}, {"bits": {"torch": "a", "matmul_grad": "b"}}
    assert stats.twins([row(n=512, **same), row(n=1024, **same)]) == ["torch"]
    assert stats.twins([row(n=512, **same), row(n=1024, **same), row(n=600, **other)]) == []
    assert stats.twins([row(n=128, **same), row(n=512, dtype="bf16", **same)]) == []
