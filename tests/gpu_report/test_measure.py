"""A row is what the fake GPU's clock says, and what is wrong has none."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import matmul_grad
from matmul_grad.bench import baseline, gpu_backends, gpu_calls, gpu_correctness, gpu_session
from matmul_grad.bench.gpu_workloads import GpuWorkload

SMALL = GpuWorkload("products", "forward", "f32", 33, 17, 65)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DEVICE_SECONDS", "CALL_SECONDS", "LAUNCH_SECONDS"):
        monkeypatch.setattr(gpu_session, name, 0.0)


def plant(monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    """Another product in place of this package's."""
    monkeypatch.setattr(gpu_calls, "mm", lambda precision: lambda a, b: change(torch.mm(a, b)))


def test_row_holds_medians_quartiles_and_their_ratio(gpu: Any) -> None:
    gpu.times = [[5.0, 1.0, 3.0], [9.0, 1.0, 1.5]]
    row = gpu_session.compare(SMALL, gpu)
    seconds = row["device"]["seconds"]
    assert seconds["torch"] == {"low": 2.0, "median": 3.0, "high": 4.0}
    assert seconds["matmul_grad"] == {"low": 1.25, "median": 1.5, "high": 5.25}
    assert row["device"]["ratio"] == 2.0 and row["device"]["rounds"] == 3
    assert row["call"]["ratio"] > 0 and set(row["call"]["seconds"]) == {"torch", "matmul_grad"}
    assert (row["name"], row["m"], row["flops"]) == ("forward-f32-33x17x65", 33, 2 * 33 * 17 * 65)
    assert row["error"]["forward"]["ours"] <= row["error"]["forward"]["limit"]


def test_turns_alternate(gpu: Any) -> None:
    gpu_session.compare(SMALL, gpu)
    assert gpu.turns == [0, 1, 1, 0, 0, 1]


def test_operands_go_round_over_twice_the_cache(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    met: list[int] = []
    monkeypatch.setattr(gpu_backends, "work", lambda mm, workload, operands: lambda: met.append(operands.a.data_ptr()))
    operands = gpu_backends.draw(SMALL, "cpu")
    gpu.l2 = 10 * SMALL.bytes
    batches, calls = gpu_session.graphs({"torch": torch.mm, "matmul_grad": torch.mm}, SMALL, operands, gpu)
    assert calls == 21 and [len(graph) for graph in gpu.graphs] == [21, 21] and len(batches) == 2
    for graph in gpu.graphs:
        met.clear()
        for call in graph:
            call()
        assert len(set(met)) == 21
    gpu.l2 = 0
    assert gpu_session.graphs({"torch": torch.mm}, SMALL, operands, gpu)[1] == 1
    monkeypatch.setattr(gpu, "seconds_a_call", lambda call: gpu_session.REPLAY / 7.5)
    assert gpu_session.graphs({"torch": torch.mm}, SMALL, operands, gpu)[1] == len(gpu.graphs[-1]) == 7


@pytest.mark.parametrize("change", [lambda c: c + 1, lambda c: c * float("nan"), lambda c: c * 1.001])
def test_wrong_product_is_not_timed(change: Any, gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, change)
    with pytest.raises(gpu_session.IncorrectResult, match="forward: error "):
        gpu_session.compare(SMALL, gpu)
    assert gpu.graphs == []


def test_wrong_gradient_is_not_timed(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Bad(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
            ctx.save_for_backward(a, b)
            return a @ b

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
            a, b = ctx.saved_tensors
            return grad @ b.t(), 1.01 * (a.t() @ grad)

    monkeypatch.setattr(gpu_calls, "mm", lambda precision: Bad.apply)
    with pytest.raises(gpu_session.IncorrectResult, match="wgrad: error "):
        gpu_session.compare(GpuWorkload("products", "step", "f32", 33, 17, 65), gpu)


def test_step_is_compared_through_autograd(gpu: Any) -> None:
    row = gpu_session.compare(GpuWorkload("products", "step", "f32", 9, 8, 7), gpu)
    assert set(row["error"]) == {"dgrad", "wgrad"}
    assert [len(call()) for graph in gpu.graphs for call in graph[:1]] == [2, 2]


def test_rival_that_is_wrong_is_left_out(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(gpu_backends.OTHERS, "flag_gems", lambda: lambda a, b: a @ b + 1)
    with pytest.raises(gpu_session.Skipped, match="flag_gems is wrong: forward"):
        gpu_session.compare(GpuWorkload("flag_gems", "forward", "f32", 9, 8, 7), gpu)


def test_rival_takes_torchs_place(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(gpu_backends.OTHERS, "flag_gems", lambda: torch.matmul)
    row = gpu_session.compare(GpuWorkload("flag_gems", "forward", "f32", 9, 8, 7), gpu)
    assert list(row["device"]["seconds"]) == ["flag_gems", "matmul_grad"]


def test_rival_that_is_not_installed() -> None:
    with pytest.raises(gpu_calls.Missing, match="flag_gems cannot be used: ModuleNotFoundError"):
        gpu_backends.mm_of("flag_gems", SMALL)


def test_too_little_memory(gpu: Any) -> None:
    gpu.free = 1000
    with pytest.raises(gpu_session.Skipped, match="GiB of free memory"):
        gpu_session.compare(SMALL, gpu)


def test_bmm_and_its_gradients(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_calls, "bmm", lambda: torch.matmul)
    for product in ("forward", "dgrad", "wgrad"):
        workload = GpuWorkload("bmm", product, "f32", 5, 6, 7, batch=3)
        assert gpu_session.compare(workload, gpu)["name"] == f"bmm-{product}-f32-3x5x6x7"
    monkeypatch.setattr(gpu_calls, "bmm", lambda: lambda a, b: 2 * torch.matmul(a, b))
    with pytest.raises(gpu_session.IncorrectResult):
        gpu_session.compare(workload, gpu)


@contextlib.contextmanager
def mode(inside: list[bool], *, batch_invariant: bool) -> Iterator[None]:
    inside.append(batch_invariant)
    yield
    inside.append(False)


INVARIANT = GpuWorkload("invariant", "step", "f32", 40, 8, 300)


def test_batch_invariant_mode(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    inside: list[bool] = []
    monkeypatch.setattr(matmul_grad, "deterministic", functools.partial(mode, inside), raising=False)
    row = gpu_session.compare(INVARIANT, gpu)
    assert inside == [True, False]
    assert row["error"]["rows that change with m"]["ours"] == 0


def test_bits_that_change_with_m_are_wrong(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul_grad, "deterministic", functools.partial(mode, []), raising=False)
    monkeypatch.setattr(gpu_calls, "mm", lambda precision: lambda a, b: torch.mm(a, b) * (1 + 2**-23 * (len(a) == 39)))
    with pytest.raises(gpu_session.IncorrectResult, match="rows that change with m: error 39"):
        gpu_session.compare(INVARIANT, gpu)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_lost_step_of_k_is_seen(dtype: torch.dtype) -> None:
    x, y = baseline.draw(64, 64, 4096, dtype).of("forward")
    exact = (x.double() @ y.double()).to(dtype)
    assert gpu_correctness.judge("whole", exact, exact, x, y).right
    lost = (x[:, :-1].double() @ y[:-1].double()).to(dtype)
    assert not gpu_correctness.judge("lost", lost, exact, x, y).right


def test_one_long_chain_is_right_where_torch_adds_many() -> None:
    x, y = baseline.draw(1, 64, 18944, torch.float32).of("forward")
    chain = torch.zeros(1, 64)
    for i in range(x.shape[1]):
        chain += x[:, i : i + 1] * y[i]
    exact = (x.double() @ y.double()).float()
    verdict = gpu_correctness.judge("chain", chain, exact, x, y)
    assert verdict.right and verdict.error > 2 * verdict.torch_error


def test_verdict_keeps_what_json_cannot() -> None:
    assert gpu_correctness.Verdict("x", float("nan"), 0.5, 1.0).as_row() == {"ours": "nan", "torch": 0.5, "limit": 1.0}


def test_launch_cost_never_waits_inside(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    monkeypatch.setattr(gpu, "wait", lambda: events.append("wait"))
    assert gpu_session.host_batch(lambda: events.append("call"), gpu)() > 0
    assert events == ["call"] * 3 + ["wait"] + ["call"] * gpu_session.QUEUE + ["wait"]
    row = gpu_session.launch_cost(8, "f32", gpu)
    assert row["name"] == "f32 8×8" and row["rounds"] >= 3
    assert {"torch.mm", "matmul_grad.mm", "torch.ops.matmul_grad.mm"} < set(row["seconds"])


def test_launch_cost_of_the_native_entry_tells_what_became_of_its_recipes(
    gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_session.cuda, "status", lambda: "")
    monkeypatch.setattr(gpu_session.table, "counts", lambda: (7, 0))
    assert "recipes" not in gpu_session.launch_cost(8, "f32", gpu)
    monkeypatch.setenv(gpu_session.cuda.VARIABLE, "1")
    row = gpu_session.launch_cost(8, "f32", gpu)
    assert (row["recipes"], row["refused"]) == (7, 0)
    monkeypatch.setattr(gpu_session.table, "counts", lambda: (7, 2))
    with pytest.raises(gpu_session.IncorrectResult, match="2 of 7 recipes"):
        gpu_session.launch_cost(8, "f32", gpu)
    monkeypatch.setattr(gpu_session.cuda, "status", lambda: "no libcuda")
    with pytest.raises(gpu_session.Skipped, match="no libcuda"):
        gpu_session.launch_cost(8, "f32", gpu)


def test_memory_tells_the_peak_from_what_is_kept(gpu: Any) -> None:
    gpu.memory = [1000, 1032, 1032, 1040]
    gpu.peaks = [1532, 1640]
    row = gpu_session.memory(GpuWorkload("products", "step", "f32", 9, 8, 7), gpu)
    assert row["bytes"] == {"matmul_grad": {"peak": 500, "kept": 32}, "torch": {"peak": 600, "kept": 8}}


def test_float32_is_ieee_whatever_was_set(gpu: Any) -> None:
    setting: Any = torch.backends.cuda.matmul
    before = setting.fp32_precision
    try:
        setting.fp32_precision = "tf32"
        gpu.multiply_in_ieee()
        assert setting.fp32_precision == "ieee"
    finally:
        setting.fp32_precision = before


def test_tf32_is_judged_by_its_operands() -> None:
    x, y = baseline.draw(64, 64, 1024, torch.float32).of("forward")
    short = [(v.view(torch.int32) + 0x1000 & -0x2000).view(torch.float32) for v in (x, y)]
    exact, rounded = (x.double() @ y.double()).float(), (short[0].double() @ short[1].double()).float()
    assert gpu_correctness.judge("tf32", rounded, exact, x, y, "tf32").right
    assert not gpu_correctness.judge("tf32", rounded, exact, x, y, "ieee").right
    lost = (short[0][:, :-1].double() @ short[1][:-1].double()).float()
    assert not gpu_correctness.judge("lost", lost, exact, x, y, "tf32").right
