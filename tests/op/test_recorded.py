"""Products with two gradients, recorded by a C++ node of torch: all cases in which it must behave as torch.mm."""

from collections.abc import Callable
from typing import Any

import pytest
import recorded
import torch
from recorded import DOUBLE, Products, is_recorded, leaves
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

import matmul_grad
from matmul_grad.testing import assert_same_bits, exact_product, integers, normal

pytestmark = recorded.MARKS


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", [(), (5,)], ids=["mm", "bmm"])
def test_both_gradients_are_exact(batch: tuple[int, ...], dtype: torch.dtype) -> None:
    a, b, grad = leaves(*batch, dtype=dtype)
    matmul_grad.mm(torch.ones(1, 1, dtype=dtype), torch.ones(1, 1, dtype=dtype))  # which loads the kernels
    c = (matmul_grad.bmm if batch else matmul_grad.mm)(a, b)
    assert is_recorded(c)
    assert_same_bits(c.detach(), exact_product(a.detach(), b.detach()))
    c.backward(grad)
    assert_same_bits(a.grad, exact_product(grad, b.detach().mT))
    assert_same_bits(b.grad, exact_product(a.detach().mT, grad))


SHAPES: list[tuple[int, ...]] = [(2,), (1,), (3, 2), (1, 2), (3, 1), ()]


@pytest.mark.parametrize("needs", [True, False], ids=["needs", "constant"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_addmm_has_the_gradients_of_torch(shape: tuple[int, ...], needs: bool) -> None:
    a, b, grad = leaves()
    added = integers(1, 6, DOUBLE, seed=9)[0, : torch.Size(shape).numel()].view(shape).clone().requires_grad_(needs)
    c, expected = (function(added, a, b) for function in (matmul_grad.addmm, torch.addmm))
    assert type(c.grad_fn).__name__ == "MkldnnLinearBackward0" and c._version == 0
    assert_same_bits(c.detach(), expected.detach())
    inputs = (a, b, added) if needs else (a, b)
    for ours, theirs in zip(
        torch.autograd.grad(c, inputs, grad), torch.autograd.grad(expected, inputs, grad), strict=True
    ):
        assert_same_bits(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE, torch.bfloat16], ids=str)
@pytest.mark.parametrize("m,n,k", [(3, 2, 4), (17, 33, 129), (64, 64, 64), (300, 120, 7)])
def test_addmm_has_the_bits_of_the_epilogue(m: int, n: int, k: int, dtype: torch.dtype) -> None:
    a, b = normal(m, k, dtype, 1), normal(k, n, dtype, 2)
    added = normal(1, n, dtype, 3)[0]
    matmul_grad.mm(a, b)
    expected = matmul_grad.addmm(added, a, b)
    c = matmul_grad.addmm(added, a.requires_grad_(), b.requires_grad_())
    assert type(c.grad_fn).__name__ == "MkldnnLinearBackward0"
    assert_same_bits(c.detach(), expected)
    one = matmul_grad.addmm(added, a.detach(), b)
    assert (type(one.grad_fn).__name__ == "AddBackward0") == (dtype != torch.bfloat16 and m * n <= 1 << 15)
    assert one._version == 0
    assert_same_bits(one.detach(), expected)


def test_other_addmms_are_recorded_by_functions() -> None:
    a, b, _ = leaves()
    added = torch.ones(2, dtype=DOUBLE, requires_grad=True)

    def node(*operands: Tensor, **scales: float) -> str:
        return type(matmul_grad.addmm(*operands, **scales).grad_fn).__name__

    assert node(added, a, b) == "MkldnnLinearBackward0"
    assert node(added, a, b.detach()) == node(added, a.detach(), b) == "AddBackward0"
    assert node(added, a, b, beta=2) == node(added, a, b, alpha=0.5) == "AddmmBackward"
    assert node(torch._neg_view(added), a, b) == node(added, a.detach(), b.detach()) == "AddmmBackward"
    with forward_ad.dual_level():
        assert node(forward_ad.make_dual(added, torch.ones_like(added)), a, b) == "AddmmBackward"
    for wrong in (torch.ones(3, dtype=DOUBLE), torch.ones(1, 3, 2, dtype=DOUBLE)):
        messages = []
        for addmm in (matmul_grad.addmm, torch.addmm):
            with pytest.raises(RuntimeError) as raised:
                addmm(wrong, a, b)
            messages.append(str(raised.value))
        assert messages[0] == messages[1]
    freed = torch.ones(2, dtype=DOUBLE)
    freed.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="data is not allocated"):
        matmul_grad.addmm(freed, a, b)


@pytest.mark.parametrize("m,n,k", [(1, 1, 1), (70, 65, 129), (1, 300, 7), (33, 1, 500)])
def test_same_bits_as_recorded_by_functions(m: int, n: int, k: int) -> None:
    a, b = normal(m, k, torch.float32, 1).requires_grad_(), normal(k, n, torch.float32, 2).requires_grad_()
    grad = normal(m, n, torch.float32, 3)
    c = matmul_grad.mm(a, b)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        other = matmul_grad.mm(a, b)
    assert is_recorded(c) and not is_recorded(other)
    assert_same_bits(c.detach(), other.detach())
    for x, y in zip(torch.autograd.grad(c, (a, b), grad), torch.autograd.grad(other, (a, b), grad), strict=True):
        assert_same_bits(x, y)


@pytest.mark.parametrize("wanted", [0, 1], ids=["a", "b"])
def test_gradient_of_one_operand_is_one_product(wanted: int) -> None:
    pair, grad = leaves()[:2], leaves()[2]
    c = matmul_grad.mm(*pair)
    with Products() as seen:
        (counted,) = torch.autograd.grad(c, pair[wanted], grad, retain_graph=True)
    assert seen.names == ["matmul_grad::mm"]
    (found,) = torch.autograd.grad(c, pair[wanted], grad)
    assert_same_bits(found, counted)


ONE_GRADIENT: dict[str, tuple[str, tuple[int, ...], tuple[int, ...]]] = {
    "mm": ("mm", (3, 4), (4, 2)),
    "bmm": ("bmm", (5, 3, 4), (5, 4, 2)),
    "matmul of a vector": ("matmul", (5, 3, 4), (4,)),
    "matmul of a matrix": ("matmul", (5, 3, 4), (4, 2)),
    "matmul of batches": ("matmul", (2, 5, 3, 4), (2, 5, 4, 2)),
    "linear": ("linear", (5, 3, 4), (2, 4)),
}


@pytest.mark.parametrize("wanted", [0, 1], ids=["a", "b"])
@pytest.mark.parametrize("case", ONE_GRADIENT)
def test_one_gradient_saves_what_it_uses(case: str, wanted: int) -> None:
    name, *shapes = ONE_GRADIENT[case]
    function, torch_function = getattr(matmul_grad, name), getattr(torch, name, torch.nn.functional.linear)
    pair = [integers(1, torch.Size(shape).numel(), DOUBLE, seed=len(shape)).view(shape).clone() for shape in shapes]
    pair[wanted].requires_grad_()
    c, expected = function(*pair), torch_function(*(x.detach().clone().requires_grad_(x.requires_grad) for x in pair))
    assert type(c.grad_fn).__name__ == "LinearBackward0" and c._version == 0
    assert_same_bits(c.detach(), expected.detach())
    grad = integers(1, c.numel(), DOUBLE, seed=7).view(c.shape)
    (right,) = torch.autograd.grad(torch_function(*pair), pair[wanted], grad)
    with torch.no_grad():
        pair[wanted].zero_()  # it is not saved
    (found,) = torch.autograd.grad(c, pair[wanted], grad, retain_graph=True)
    assert_same_bits(found, right)
    pair[1 - wanted].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(c, pair[wanted], grad)


NOT_RECORDED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "one gradient": lambda a, b: matmul_grad.mm(a, b.detach()),
    "the other gradient": lambda a, b: matmul_grad.mm(a.detach(), b),
    "conjugate": lambda a, b: matmul_grad.mm(torch._neg_view(a), b),
    "no elements": lambda a, b: matmul_grad.mm(a[:0], b),
    "other dtype": lambda a, b: matmul_grad.mm(a, b.to(torch.complex128).real),
}


@pytest.mark.parametrize("name", NOT_RECORDED)
def test_other_products_have_the_gradients_of_torch(name: str) -> None:
    a, b, grad = leaves()
    c = NOT_RECORDED[name](a, b)
    (c * grad[: c.shape[0]]).sum().backward()
    x, y, _ = leaves()
    real, matmul_grad_mm = torch.mm, matmul_grad.mm
    try:
        matmul_grad.mm = real
        expected = NOT_RECORDED[name](x, y)
    finally:
        matmul_grad.mm = matmul_grad_mm
    (expected * grad[: c.shape[0]]).sum().backward()
    assert_same_bits(c.detach(), expected.detach())
    for ours, theirs in ((a, x), (b, y)):
        assert (ours.grad is None) == (theirs.grad is None)
        if ours.grad is not None:
            assert_same_bits(ours.grad, theirs.grad)


def test_under_a_mode_of_python_functions_record() -> None:
    a, b, _ = leaves()
    with Products() as seen:
        c = matmul_grad.mm(a, b)
    assert seen.names == ["matmul_grad::mm"]
    assert not is_recorded(c)


def test_modes_of_backward_see_the_operators_of_this_package() -> None:
    a, b, grad = leaves()
    c = matmul_grad.mm(a, b)
    with Products() as seen:
        c.backward(grad)
    assert seen.names == ["matmul_grad::mm"] * 2
    with FlopCounterMode(display=False) as flops:
        matmul_grad.mm(a, b).backward(grad)
    assert flops.get_total_flops() == 3 * 2 * 3 * 4 * 2


def test_errors_are_torch_s() -> None:
    a, b, grad = leaves()

    def error(call: Callable[[], Any]) -> str:
        with pytest.raises(RuntimeError) as raised:
            call()
        return str(raised.value).split("[", maxsplit=1)[0]

    for pair in ((a, a), (a.view(12), b), (a.view(1, 3, 4), b.view(1, 4, 2))):
        assert error(lambda: matmul_grad.mm(*pair)) == error(lambda: torch.mm(*pair))  # noqa: B023
    for mm in (matmul_grad.mm, torch.mm):
        c = mm(a, b)
        c.backward(grad)
        assert "backward through the graph a second time" in error(lambda: c.backward(grad))  # noqa: B023
    assert error(lambda: matmul_grad.mm(a, b).backward(grad.t())) == error(lambda: torch.mm(a, b).backward(grad.t()))


def test_storage_that_is_freed_before_backward_is_an_error() -> None:
    a, b, grad = leaves()
    c = matmul_grad.mm(a, b)
    b.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="storage"):
        torch.autograd.grad(c, (a, b), grad)
