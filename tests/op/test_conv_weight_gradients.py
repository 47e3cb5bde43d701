"""Gradients of 16-bit filters that are kept in float32: stored from the sums, without a rounding to 16 bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dtypes import ACCELERATED
from torch import Tensor, nn

import matmul_grad
from matmul_grad.testing import assert_same_bits, integers

pytestmark = pytest.mark.skipif(not hasattr(Tensor, "grad_dtype"), reason="this torch has no grad_dtype")
WIDE = torch.float32
NARROW = [dtype for name, dtype in ACCELERATED.items() if name in ("bf16", "f16")]
every_dtype = pytest.mark.parametrize("dtype", NARROW, ids=str)
WEIGHT_GRADIENT = torch.ops.matmul_grad.convolution_weight_gradient.default

# Function, sizes of the image and of the filter, and the window.
Case = tuple[str, tuple[int, ...], tuple[int, ...], dict[str, Any]]
CASES: dict[str, Case] = {
    "conv1d": ("conv1d", (1, 3, 200), (5, 3, 3), {}),
    "conv2d": ("conv2d", (2, 4, 17, 19), (6, 4, 3, 3), {"padding": 1}),
    "conv2d-groups": ("conv2d", (3, 6, 17, 19), (4, 3, 3, 2), {"stride": 2, "groups": 2}),
    "conv3d": ("conv3d", (1, 2, 7, 8, 9), (3, 2, 2, 2, 2), {"dilation": 2}),
    "conv_transpose2d": ("conv_transpose2d", (2, 4, 15, 16), (4, 5, 3, 3), {"stride": 2, "padding": 1}),
}
every_case = pytest.mark.parametrize("case", CASES)


def drawn(size: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    return integers(1, torch.Size(size).numel(), dtype, seed).view(size)


def kept_wide(x: Tensor) -> Tensor:
    leaf = x.detach().clone().requires_grad_()
    leaf.grad_dtype = WIDE
    return leaf


def exact(case: str, x: Tensor, w: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of the image and of the filter, in float64."""
    name, _, _, window = CASES[case]
    leaves = x.detach().double().requires_grad_(), w.detach().double().requires_grad_()
    return torch.autograd.grad(getattr(nn.functional, name)(*leaves, **window), leaves, grad.double())


def operands(case: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Image, filter, and the gradient of the result: integers, whose sums 16 bits do not hold."""
    name, image, filters, window = CASES[case]
    x, w = drawn(image, dtype, 1) * 31, drawn(filters, dtype, 2)
    return x, w, drawn(tuple(getattr(nn.functional, name)(x.float(), w.float(), **window).shape), dtype, 3)


@every_dtype
@every_case
@pytest.mark.parametrize("needs_x", [True, False], ids=["both", "alone"])
def test_sums_are_not_rounded(case: str, needs_x: bool, dtype: torch.dtype) -> None:
    x, w, grad = operands(case, dtype)
    dx, dw = exact(case, x, w, grad)
    leaf, bias = kept_wide(w), kept_wide(w.new_zeros(grad.shape[1]))
    with matmul_grad.strict():
        getattr(matmul_grad, CASES[case][0])(x.requires_grad_(needs_x), leaf, bias, **CASES[case][3]).backward(grad)
    assert leaf.grad.dtype == bias.grad.dtype == WIDE
    assert_same_bits(leaf.grad + 0.0, dw.to(WIDE) + 0.0)
    assert not torch.equal(leaf.grad, leaf.grad.to(dtype).to(WIDE)), "the case is too easy"
    assert torch.equal(bias.grad, grad.double().sum((0, *range(2, grad.dim()))).to(WIDE))
    if needs_x:
        assert torch.equal(x.grad, dx.to(dtype))


@pytest.mark.parametrize("convert", [True, False], ids=["converted", "Conv2d"])
def test_modules(convert: bool) -> None:
    kind = nn.Conv2d if convert else matmul_grad.nn.Conv2d
    module = kind(4, 6, 3, padding=1, padding_mode="circular", dtype=torch.bfloat16)
    if convert:
        module = matmul_grad.convert(module, kinds=(nn.Conv2d,))
    module.weight.grad_dtype = WIDE
    x, grad = drawn((2, 4, 17, 19), torch.bfloat16, 1) * 31, drawn((2, 6, 17, 19), torch.bfloat16, 3)
    module(x).backward(grad)
    wide = nn.functional.pad(x, (1, 1, 1, 1), "circular").double()
    expected = torch.nn.grad.conv2d_weight(wide, module.weight.shape, grad.double())
    assert_same_bits(module.weight.grad + 0.0, expected.to(WIDE) + 0.0)
    assert module.bias.grad.dtype == torch.bfloat16


@every_case
def test_the_graph_of_the_gradient_is_that_of_the_sums(case: str) -> None:
    """By ``create_graph``, so by the operator; and its own derivatives."""
    x, w, grad = operands(case, torch.bfloat16)
    x.requires_grad_()
    leaf, grad = kept_wide(w), grad.requires_grad_()
    y = getattr(matmul_grad, CASES[case][0])(x, leaf, **CASES[case][3])
    (dw,) = torch.autograd.grad(y, leaf, grad, create_graph=True)
    assert_same_bits(dw.detach() + 0.0, exact(case, x, w, grad.detach())[1].to(WIDE) + 0.0)
    ones = torch.ones_like(dw)
    found = torch.autograd.grad(dw, (x, grad), ones)
    wide = [t.detach().double().requires_grad_() for t in (x, w, grad)]
    y = getattr(nn.functional, CASES[case][0])(*wide[:2], **CASES[case][3])
    (dw,) = torch.autograd.grad(y, wide[1], wide[2], create_graph=True)
    for one, other in zip(found, torch.autograd.grad(dw, (wide[0], wide[2]), ones.double()), strict=True):
        assert one.dtype == torch.bfloat16
        assert torch.equal(one, other.to(torch.bfloat16))


def test_the_operator_with_a_dtype() -> None:
    x, w, grad = operands("conv2d", torch.bfloat16)
    arguments = [1, 1], [1, 1], [1, 1], 1
    wide = WEIGHT_GRADIENT(grad, x, list(w.shape), *arguments, WIDE)
    assert_same_bits(wide + 0.0, exact("conv2d", x, w, grad)[1].to(WIDE) + 0.0)
    plain = WEIGHT_GRADIENT(grad, x, list(w.shape), *arguments)
    assert plain.dtype == torch.bfloat16
    assert_same_bits(WEIGHT_GRADIENT(grad, x, list(w.shape), *arguments, torch.bfloat16), plain)
    torch.library.opcheck(WEIGHT_GRADIENT, (grad, x, list(w.shape), *arguments, WIDE))
    with pytest.raises(RuntimeError, match="out_dtype must be the same as input dtype or fp32"):
        WEIGHT_GRADIENT(grad, x, list(w.shape), *arguments, torch.float64)
    with pytest.raises(RuntimeError, match="out_dtype must be the same as input dtype or fp32"):
        WEIGHT_GRADIENT(grad.double(), x.double(), list(w.shape), *arguments, WIDE)
    both = torch.vmap(lambda g: WEIGHT_GRADIENT(g, x, list(w.shape), *arguments, WIDE))(torch.stack([grad, -grad]))
    assert_same_bits(both + 0.0, torch.stack([wide, -wide]) + 0.0)


def test_where_torch_computes_it_has_the_dtype() -> None:
    x, grad = drawn((1, 4, 9, 9), torch.bfloat16, 1), drawn((1, 4, 7, 7), torch.bfloat16, 3)
    arguments = [4, 1, 3, 3], [1, 1], [0, 0], [1, 1], 4
    found = WEIGHT_GRADIENT(grad, x, *arguments, WIDE)
    assert found.dtype == WIDE
    assert torch.equal(found.bfloat16(), WEIGHT_GRADIENT(grad, x, *arguments))


def test_freed_memory_is_not_read() -> None:
    """As FSDP frees parameters between forward and backward."""
    x, w = torch.ones(1, 2, 5, 5).requires_grad_(), torch.ones(3, 2, 3, 3).requires_grad_()
    y = matmul_grad.conv2d(x, w)
    w.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="its data is not allocated yet"):
        y.sum().backward()
