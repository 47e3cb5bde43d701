"""Linear maps and products of no rows, no features or no sums: results and gradients are torch's."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

import matmul_grad

F32 = torch.float32
# Of the input, and how many features it becomes.
SHAPES = [((3, 4, 0), 5), ((0,), 5), ((3, 4, 6), 0), ((6,), 0), ((3, 0, 6), 5), ((0, 4, 0), 5), ((3, 4, 0), 0)]
Call = Callable[..., Tensor]
CALLS: dict[str, tuple[Call, Call]] = {
    "linear": (matmul_grad.linear, functional.linear),
    "matmul": (lambda x, w, b: matmul_grad.matmul(x, w.t()) + b, lambda x, w, b: torch.matmul(x, w.t()) + b),
    "activation": (
        lambda x, w, b: matmul_grad.linear(x, w, b, "gelu"),
        lambda x, w, b: functional.gelu(functional.linear(x, w, b)),
    ),
    "gated": (
        lambda x, w, b: matmul_grad.gated_linear(x, w, w, b),
        lambda x, w, b: functional.silu(functional.linear(x, w)) * functional.linear(x, w, b),
    ),
}


class Mode(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def results(
    call: Call, shape: tuple[int, ...], n: int, mode: contextlib.AbstractContextManager[object], wide: bool = False
) -> list[Tensor]:
    """The result, and the gradients of input, weight and bias."""
    dtype = torch.bfloat16 if wide else F32
    leaves = [torch.ones(shape, dtype=dtype).requires_grad_() for shape in (shape, (n, shape[-1]), (n,))]
    if wide:
        leaves[1].grad_dtype = F32
    result = call(*leaves)
    with mode:
        result.sum().backward()
    grads = [leaf.grad for leaf in leaves]
    assert all(grad is not None for grad in grads)
    return [result, *grads]


@pytest.mark.parametrize(("shape", "n"), SHAPES, ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_results_and_gradients(name: str, shape: tuple[int, ...], n: int) -> None:
    """Backward by itself, and where Python follows it."""
    ours, theirs = CALLS[name]
    expected = results(theirs, shape, n, contextlib.nullcontext())
    for mode in (contextlib.nullcontext(), Mode()):
        with matmul_grad.strict():
            found = results(ours, shape, n, mode)
        torch.testing.assert_close(found, expected)


@pytest.mark.skipif(not hasattr(Tensor, "grad_dtype"), reason="this torch has no grad_dtype")
@pytest.mark.parametrize(("shape", "n"), SHAPES, ids=str)
@pytest.mark.parametrize("name", ["linear", "activation"])
def test_gradients_that_are_kept_in_float32(name: str, shape: tuple[int, ...], n: int) -> None:
    ours, theirs = CALLS[name]
    with matmul_grad.strict():
        found = results(ours, shape, n, contextlib.nullcontext(), wide=True)
    expected = results(theirs, shape, n, contextlib.nullcontext())
    assert [x.dtype for x in found] == [torch.bfloat16] * 2 + [F32] + [torch.bfloat16]
    torch.testing.assert_close([x.to(F32) for x in found], expected, rtol=0.01, atol=0.0)


@pytest.mark.parametrize("name", CALLS)
def test_vmap_over_no_items(name: str) -> None:
    weight, bias = torch.ones(5, 3).requires_grad_(), torch.ones(5)
    ours, theirs = (lambda x, call=call: call(x, weight, bias) for call in CALLS[name])
    for shape in ((0, 4, 3), (2, 0, 3)):
        x = torch.ones(shape)
        torch.testing.assert_close(torch.vmap(ours)(x), torch.vmap(theirs)(x))
    result, many = ours(torch.ones(4, 3)), torch.ones(0, 4, 5)
    (found,) = torch.vmap(lambda grad: torch.autograd.grad(result, weight, grad))(many)
    assert found.shape == (0, 5, 3)
