"""What is wrong is found, in every dtype, wherever in a result it stands; what is right passes."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from matmul_grad.bench import backends, correctness, inputs, workloads
from matmul_grad.bench.workloads import PASSES, Workload

SHAPES = ((1, 1, 1), (1, 37, 300), (300, 1, 37), (37, 300, 1), (65, 67, 71))


# Without jax, which is in test_processes: it dislikes forks.
ON_CPU = [backend for backend in backends.ALL if "cpu" in backend.devices and backend.name != "jax"]


@pytest.mark.parametrize(("name", "dtype"), [(backend.name, dtype) for backend in ON_CPU for dtype in backend.dtypes])
def test_every_contender_is_right(name: str, dtype: str) -> None:
    backend = backends.BY_NAME[name]
    if not backend.installed:
        pytest.skip(f"{name} is not installed")
    library = backend.library()
    for product, shape, layout in itertools.product(PASSES, SHAPES, ("NN", "NT", "TN")):
        workload = Workload(product, dtype, layout, *shape)
        if backend.takes(workload):
            try:
                correctness.assert_correct(library, workload)
            except backends.Skipped as reason:
                assert name == "blis" and dtype == "f64", reason


def corner(c: Tensor) -> Tensor:
    c = c.clone()
    c[-1, -1] += 1
    return c


def hidden_nan(c: Tensor) -> Tensor:
    c = c.clone()
    c[3, 4] = torch.nan
    return c


CHANGES = [corner, hidden_nan, torch.zeros_like, lambda c: c[:-1], lambda c: c.to(torch.complex64), lambda c: -c]


@pytest.mark.parametrize("dtype", ["f32", "f64", "f16", "bf16"])
@pytest.mark.parametrize("change", CHANGES)
def test_wrong_elements_are_found_on_integers(change: Callable[[Tensor], Tensor], dtype: str) -> None:
    whole = inputs.draw(Workload("forward", dtype, "TN", 65, 67, 71), "integers")
    c = torch.mm(whole.a, whole.b)
    correctness.assert_exact(c, whole.a, whole.b, "torch")
    with pytest.raises(AssertionError, match="planted"):
        correctness.assert_exact(change(c), whole.a, whole.b, "planted")


@pytest.mark.parametrize(("dtype", "narrow"), [("f64", "f32"), ("f32", "bf16"), ("f32", "f16")])
def test_lost_digits_are_found_on_normal_values(dtype: str, narrow: str) -> None:
    """Right on small integers: operands that are rounded on their way."""
    workload = Workload("forward", dtype, "NN", 65, 67, 71)
    kind = Workload("forward", narrow, "NN", 1, 1, 1).torch_dtype
    whole, normal = inputs.draw(workload, "integers"), inputs.draw(workload)
    correctness.assert_exact(torch.mm(whole.a.to(kind).to(whole.a.dtype), whole.b), whole.a, whole.b, "rounded")
    correctness.assert_close(torch.mm(normal.a, normal.b), normal.a, normal.b, "torch")
    with pytest.raises(AssertionError, match=r"rounded: error .* roundings"):
        correctness.assert_close(
            torch.mm(normal.a.to(kind).to(normal.a.dtype), normal.b), normal.a, normal.b, "rounded"
        )


@pytest.mark.parametrize("dtype", ["f32", "f64", "f16", "bf16"])
def test_lost_step_of_k_is_found(dtype: str) -> None:
    whole = inputs.draw(Workload("forward", dtype, "NN", 64, 64, 4096), "integers")
    correctness.assert_exact((whole.a.double() @ whole.b.double()).to(whole.a.dtype), whole.a, whole.b, "whole")
    lost = (whole.a[:, :-1].double() @ whole.b[:-1].double()).to(whole.a.dtype)
    with pytest.raises(AssertionError, match="lost: on integers"):
        correctness.assert_exact(lost, whole.a, whole.b, "lost")


def test_one_long_chain_is_right_where_torch_adds_many() -> None:
    a, b, _ = inputs.draw(Workload("forward", "f32", "NN", 1, 64, 18944))
    chain = torch.zeros(1, 64)
    for i in range(a.shape[1]):
        chain += a[:, i : i + 1] * b[i]
    correctness.assert_close(chain, a, b, "chain")


def test_tf32_is_judged_by_its_operands() -> None:
    a, b, _ = inputs.draw(Workload("forward", "f32", "NN", 64, 64, 1024))
    short = [(v.view(torch.int32) + 0x1000 & -0x2000).view(torch.float32) for v in (a, b)]
    rounded = (short[0].double() @ short[1].double()).float()
    correctness.assert_close(rounded, a, b, "tf32", precision="tf32")
    with pytest.raises(AssertionError, match="ieee: error "):
        correctness.assert_close(rounded, a, b, "ieee")
    lost = (short[0][:, :-1].double() @ short[1][:-1].double()).float()
    with pytest.raises(AssertionError, match="lost: error "):
        correctness.assert_close(lost, a, b, "lost", precision="tf32")


@pytest.mark.parametrize("longest", [8, 4096, 100_000])
@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_sums_of_integers_fit_16_bits(dtype: str, longest: int) -> None:
    whole = inputs.draw(Workload("forward", dtype, "NN", 40, 40, longest), "integers")
    sums = whole.a.double() @ whole.b.double()
    assert torch.equal(sums, sums.to(whole.a.dtype).double())
    assert sums.unique().numel() > 3  # and there is something to sum


def test_pieces_make_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    workload = Workload("forward", "f32", "NT", 13, 11, 300)
    whole, normal = inputs.draw(workload, "integers"), inputs.draw(workload)
    expected = correctness.exact(normal.a, normal.b, [0, 12], [0, 10])
    monkeypatch.setattr(correctness, "PIECE", 1000)
    correctness.assert_exact(torch.mm(whole.a, whole.b), whole.a, whole.b, "in pieces")
    for one, other in zip(expected, correctness.exact(normal.a, normal.b, [0, 12], [0, 10]), strict=True):
        assert abs(one - other).max() < 1e-11
    with pytest.raises(AssertionError, match="1 of 13 rows are wrong, the first is 12"):
        correctness.assert_exact(corner(torch.mm(whole.a, whole.b)), whole.a, whole.b, "in pieces")


@pytest.mark.parametrize(
    "easy",
    [
        torch.zeros(64, 64),
        torch.ones(64, 64),
        torch.rand(64, 64),
        9 * torch.rand(64, 64) - 4.5,
        torch.full((64, 64), torch.nan),
    ],
)
def test_operands_that_are_not_normal_are_refused(easy: Tensor) -> None:
    with pytest.raises(inputs.Unfit, match="not standard normal"):
        inputs.assert_normal([torch.randn(64, 64, generator=torch.Generator().manual_seed(0)), easy])


@pytest.mark.parametrize("dtype", ["f32", "f64", "f16", "bf16"])
def test_drawn_operands_are_normal_and_the_same_each_time(dtype: str) -> None:
    for layout in ("NN", "TN"):
        workload = Workload("forward", dtype, layout, 128, 96, 80)
        inputs.assert_normal(inputs.draw(workload))
        for one, other in zip(inputs.draw(workload), inputs.draw(workload), strict=True):
            assert torch.equal(one, other) and one.stride() == other.stride()


def test_copies_lie_as_the_first_and_go_round() -> None:
    workload = Workload("forward", "f32", "TN", 8, 6, 4)
    sets = list(inputs.copies(inputs.draw(workload), 3))
    assert len({each.a.data_ptr() for each in sets}) == 3
    assert {each.a.stride() for each in sets} == {(1, 8)}
    met: list[int] = []
    call = inputs.alternating([lambda i=i: met.append(i) for i in range(3)])
    for _ in range(7):
        call()
    assert met == [0, 1, 2, 0, 1, 2, 0]


def test_step_of_a_bare_package_is_its_three_products() -> None:
    workload = Workload(workloads.STEP, "f32", "NN", 5, 6, 7)
    whole = inputs.draw(workload, "integers")
    results = backends.Numpy().step(whole)()
    assert [result.shape for result in results] == [(5, 6), (5, 7), (7, 6)]
