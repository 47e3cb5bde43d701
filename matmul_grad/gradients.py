"""The gradients of a product, composed of differentiable products; and of those whose nodes compiled code records.

dA = dC · Bᵀ      dgrad
dB = Aᵀ · dC      wgrad
dbias = 1ᵀ · dC   of a row that was added
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .dispatch_state import is_plain
from .gradient_dtypes import NARROW, NEITHER, WIDE, product_in
from .kernels.native.torch_layout import without_modes
from .ops import TAG_OF_B, TAG_OF_BATCHES, TAG_OF_VECTOR, TAG_RANK, accelerated, compiled, compute


def transposed(matrix: Tensor) -> Tensor:
    return matrix.mT if matrix.dim() == 3 else matrix.t()  # non-matrix inputs raise inside the product


def is_column_major(matrix: Tensor) -> bool:
    """As in PyTorch's derivative of mm: the gradient gets the memory order of its operand."""
    strides = matrix.stride()
    return len(strides) == 2 and strides[0] == 1 and strides[1] == matrix.shape[0]


def gradients(
    grad: Tensor,
    self: Tensor | None,
    mat2: Tensor | None,
    needs: tuple[bool, bool],
    column_major: bool = False,
    in_float32: tuple[bool, bool] = NEITHER,
) -> tuple[Tensor | None, Tensor | None]:
    """(dgrad, wgrad), None for what ``needs`` leaves out; an operand that only that one uses may be None.

    Each has the memory order of its operand, as in PyTorch: ``column_major`` of one that is None. Those ``in_float32``
    are the sums of 16-bit operands, without a rounding.
    """
    dgrad, wgrad = None, None
    if needs[0] and mat2 is not None:
        swap = column_major if self is None else is_column_major(self)
        wide = in_float32[0]
        dgrad = product_in(mat2, grad.t(), wide).t() if swap else product_in(grad, transposed(mat2), wide)
    if needs[1] and self is not None:
        swap = column_major if mat2 is None else is_column_major(mat2)
        wide = in_float32[1]
        wgrad = product_in(grad.t(), self, wide).t() if swap else product_in(transposed(self), grad, wide)
    return dgrad, wgrad


def addend_gradient(grad: Tensor, shape: Sequence[int], kept: torch.dtype) -> Tensor:
    """``grad`` summed to the sizes of what was added to a product; ``kept`` is its dtype, or float32 of 16 bits.

    Of a row, as a bias is, the sums are the product 1ᵀ · grad on a CPU, where nothing follows it: added in the order of
    every product, and rounded once. Elsewhere they are torch's.
    """
    if _is_row(grad, shape):
        ones = _one(grad.dtype).expand(grad.shape[0])
        sums = compiled.matmul(ones, grad) if kept == grad.dtype else _wide_product(ones, grad)
        if sums is not None:
            return sums if len(shape) == 1 else sums.view(shape)
    return grad.to(kept).sum_to_size(shape)


def _is_row(grad: Tensor, shape: Sequence[int]) -> bool:
    """Whether ``shape`` is one row of the matrix ``grad``, which has elements on a CPU, and nothing follows it."""
    if grad.dim() != 2 or grad.device.type != "cpu" or not is_plain(grad):
        return False
    is_row = len(shape) > 0 and shape[-1] == grad.shape[1] == math.prod(shape)
    return is_row and grad.shape != shape and grad.numel() > 0


@functools.cache
def _one(dtype: torch.dtype) -> Tensor:
    with without_modes():
        return torch.ones((), dtype=dtype, device="cpu")


def _wide_product(ones: Tensor, grad: Tensor) -> Tensor | None:
    """Of 16 bits, in float32; None where these kernels do not compute it."""
    row = ones.unsqueeze(0)
    if grad.dtype not in NARROW or not accelerated(row, grad):
        return None
    return compute(row, grad, out=grad.new_empty((1, grad.shape[1]), dtype=WIDE))[0]


def flattened(x: Tensor, kept: int) -> Tensor:
    """With one dimension before the last ``kept`` ones, one of which may be empty, so that -1 would be ambiguous.

    The older vmap has a rule of reshape and none of flatten.
    """
    return x if x.dim() == kept + 1 else x.reshape(math.prod(x.shape[:-kept]), *x.shape[-kept:])


def recorded_gradients(
    grad: Tensor, a: Tensor | None, b: Tensor | None, needs: tuple[bool, bool], column_major: bool = False
) -> tuple[Tensor | None, Tensor | None]:
    """``gradients`` of operands of any ranks that compiled code records, composed of differentiable products.

    B is a matrix, a vector or has the batch of A; grad has that of A. One of them may be None where only the other
    one is used.
    """
    is_vector = grad.dim() < a.dim() if a is not None else b is not None and b.dim() == 1
    matrix = grad.unsqueeze(-1) if is_vector else grad
    if b is not None and is_vector:
        b = b.unsqueeze(1)
    is_batched = matrix.dim() > 2 and (b.dim() > 2 if b is not None else not is_vector)
    rank, kept = matrix.dim(), 2 if is_batched else 1
    flat_a, flat_b = None if a is None else flattened(a, kept), b
    if is_batched and b is not None:
        flat_b = flattened(b, kept)
    da, db = gradients(flattened(matrix, kept), flat_a, flat_b, needs, column_major)
    if da is not None and rank != da.dim():
        da = da.view(*matrix.shape[:-1], da.shape[-1])
    if db is not None and is_batched and rank != db.dim():
        db = db.view(*matrix.shape[:-2], *db.shape[-2:])
    return da, db.squeeze(1) if db is not None and is_vector else db


def matmul_backward(
    grad: Tensor | None, self: Tensor, other: Tensor, mask: list[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """``aten::matmul_backward`` for nodes that compiled code has recorded, where Python follows backward."""
    return (None, None) if grad is None else recorded_gradients(grad, self, other, (mask[0], mask[1]))


def addmm_backward(self: Tensor, grad: Tensor | None, weight: Tensor, mask: list[bool]) -> tuple[Tensor | None, ...]:
    """``aten::mkldnn_linear_backward`` likewise: of self · weight to which something is added."""
    if grad is None:
        return None, None, None
    return (*recorded_gradients(grad, self, weight, (mask[0], mask[1])), grad if mask[2] else None)


def linear_backward(self: Tensor, grad: Tensor | None, weight: Tensor, mask: list[bool]) -> tuple[Tensor | None, ...]:
    """``aten::linear_backward`` likewise: of self · weightᵀ; or of the one operand that a tag is for."""
    if grad is None:
        return None, None, None
    tag = weight.dim() - TAG_RANK
    if tag < 0:
        da, db = recorded_gradients(grad, self, weight.t(), (mask[0], mask[1]))
        return da, None if db is None else db.t(), grad if mask[2] else None
    return None, None, gradient_by_tag(grad, self, tag)


def gradient_by_tag(grad: Tensor, saved: Tensor, tag: int) -> Tensor | None:
    """The gradient of the operand that is not saved: see ``state.py``."""
    is_b, column, linear = tag >= TAG_OF_B, bool(tag & 1), bool(tag & 2)
    if not is_b:
        return recorded_gradients(grad, None, saved.t() if linear else saved, (True, False), column)[0]
    if tag in (TAG_OF_VECTOR, TAG_OF_BATCHES):
        return recorded_gradients(grad, saved, None, (False, True))[1]
    db = gradients(flattened(grad, 1), flattened(saved, 1), None, (False, True), column != linear)[1]
    return db.t() if linear and db is not None else db


OF_ATEN: dict[str, Callable[..., Any]] = {
    "matmul_backward": matmul_backward,
    "linear_backward": linear_backward,
    "mkldnn_linear_backward": addmm_backward,
}
