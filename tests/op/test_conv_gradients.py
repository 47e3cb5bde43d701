"""Derivatives of convolutions by finite differences, to the second order and in both modes; vmap against a loop."""

import functools
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import matmul_grad
from matmul_grad.testing import normal

WEIGHT_GRADIENT = torch.ops.matmul_grad.convolution_weight_gradient
Case = tuple[str, tuple[int, ...], tuple[int, ...], dict[str, Any]]
CASES: dict[str, Case] = {
    "conv1d": ("conv1d", (2, 2, 5), (3, 2, 2), {"padding": 1}),
    "conv2d": ("conv2d", (1, 4, 4, 3), (2, 2, 3, 2), {"stride": (2, 1), "padding": (1, 0), "groups": 2}),
    "conv2d-dilated": ("conv2d", (1, 2, 5, 5), (2, 2, 2, 2), {"stride": 2, "dilation": (1, 3)}),
    "conv2d-same": ("conv2d", (1, 2, 3, 4), (2, 2, 2, 3), {"padding": "same"}),
    "conv3d": ("conv3d", (1, 2, 3, 3, 2), (2, 2, 2, 2, 2), {"stride": (2, 1, 1)}),
    "conv_transpose1d": ("conv_transpose1d", (2, 2, 3), (2, 3, 3), {"stride": 2, "padding": 1, "output_padding": 1}),
    "conv_transpose2d": ("conv_transpose2d", (1, 4, 2, 2), (4, 1, 2, 2), {"stride": (3, 1), "groups": 2}),
    "conv_transpose2d-over": (  # what a stride of 1 would not reach is cut off from the gradient
        "conv_transpose2d", (1, 2, 2, 2), (2, 2, 2, 2), {"dilation": 3, "output_padding": (2, 1)},
    ),
    "conv_transpose3d": ("conv_transpose3d", (1, 2, 2, 1, 2), (2, 2, 2, 2, 1), {"stride": 2}),
}  # fmt: skip
# Forward mode scripts parts of torch that torch itself has deprecated; "same" with even kernels pads, and warns.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.*"),
    pytest.mark.filterwarnings("ignore:Using padding='same'"),
]
every_case = pytest.mark.parametrize("case", CASES)


def operands(case: str) -> tuple[Any, list[Tensor]]:
    name, input, weight, named = CASES[case]
    filters = weight[1] * named.get("groups", 1) if "transpose" in name else weight[0]
    tensors = [drawn(*size, seed=seed) for seed, size in enumerate((input, weight, (filters,)))]
    return functools.partial(getattr(matmul_grad, name), **named), tensors


def drawn(*size: int, seed: int = 0) -> Tensor:
    return normal(1, torch.Size(size).numel(), torch.float64, seed=seed + 1).view(size)


@every_case
def test_gradcheck(case: str) -> None:
    function, tensors = operands(case)
    leaves = tuple(x.requires_grad_() for x in tensors)
    assert gradcheck(function, leaves, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True)


@every_case
def test_gradgradcheck(case: str) -> None:
    function, tensors = operands(case)
    leaves = tuple(x.requires_grad_() for x in tensors)
    assert gradgradcheck(function, leaves, check_fwd_over_rev=True, check_rev_over_rev=True, check_batched_grad=True)


def test_weight_gradient_gradcheck() -> None:
    grad, input = drawn(1, 2, 2, 2).requires_grad_(), drawn(1, 4, 3, 3, seed=1).requires_grad_()

    def function(grad: Tensor, input: Tensor) -> Tensor:
        return WEIGHT_GRADIENT(grad, input, [2, 2, 2, 2], [2, 1], [1, 0], [1, 1], 2)

    assert gradcheck(function, (grad, input), check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(function, (grad, input))


@pytest.mark.parametrize("needs", list(itertools.product((False, True), repeat=3))[1:], ids=str)
def test_only_what_is_needed(needs: tuple[bool, ...]) -> None:
    """Each choice of leaves: their gradients, and of operands only those that they use are saved."""
    function, tensors = operands("conv2d")
    leaves = [x.requires_grad_(need) for x, need in zip(tensors, needs, strict=True)]
    result = function(*leaves)
    saved = [x is not None for x in result.grad_fn.saved_tensors]
    assert saved == [needs[1], needs[0]]
    found = torch.autograd.grad(result.sum(), [x for x in leaves if x.requires_grad])
    whole = [x.detach().requires_grad_() for x in tensors]
    expected = torch.autograd.grad(function(*whole).sum(), whole)
    torch.testing.assert_close(list(found), [x for x, need in zip(expected, needs, strict=True) if need])


@every_case
def test_vmap(case: str) -> None:
    """Each choice of what is batched, at the front or at the end, against a loop; gradients too."""
    function, tensors = operands(case)
    for dims in itertools.product((None, 0, -1), (None, 0, -1), (None, 0)):
        if dims == (None, None, None):
            continue
        given = [
            x if dim is None else torch.stack([x, 2 * x - 1, 3 - x], dim) for x, dim in zip(tensors, dims, strict=True)
        ]
        items = [[x if dim is None else x.select(dim, i) for x, dim in zip(given, dims, strict=True)] for i in range(3)]
        expected = torch.stack([function(*item) for item in items])
        torch.testing.assert_close(torch.vmap(function, dims)(*given), expected)
        gradient = torch.func.grad(lambda *x: function(*x).sin().sum(), (0, 1, 2))
        grads = [torch.stack(x) for x in zip(*(gradient(*item) for item in items), strict=True)]
        torch.testing.assert_close(list(torch.vmap(gradient, dims)(*given)), grads)


def test_transforms() -> None:
    """jvp, jacrev and a Hessian against torch's."""
    function, (x, w, b) = operands("conv1d")
    theirs = functools.partial(torch.nn.functional.conv1d, padding=1)
    for f, g in ((function, theirs), (lambda *a: function(*a).pow(3).sum(), lambda *a: theirs(*a).pow(3).sum())):
        torch.testing.assert_close(
            torch.func.jvp(f, (x, w, b), (w.new_ones(2, 2, 5), w, b)),
            torch.func.jvp(g, (x, w, b), (w.new_ones(2, 2, 5), w, b)),
        )
        torch.testing.assert_close(torch.func.jacrev(f, (0, 1, 2))(x, w, b), torch.func.jacrev(g, (0, 1, 2))(x, w, b))
    torch.testing.assert_close(torch.func.hessian(f, (0, 1))(x, w, b), torch.func.hessian(g, (0, 1))(x, w, b))
