"""Operands in many layouts, and compiled functions of CPython that are there: for the tests of both."""

from __future__ import annotations

import torch
from dtypes import EVERY
from torch import Tensor

import matmul_grad
from matmul_grad import ops
from matmul_grad.kernels.native.python_functions import functions
from matmul_grad.testing import integers

Pair = tuple[Tensor, Tensor]


def load() -> None:
    """The functions return None until the first call of a dtype, and the first with ``out``, have loaded them."""
    assert ops.native_status() == ""
    for dtype in (x.values[0] for x in EVERY):
        matmul_grad.mm(torch.ones(1, 1, dtype=dtype), torch.ones(1, 1, dtype=dtype))
    assert functions.mm(torch.ones(2, 2), torch.ones(2, 2)) is not None
    matmul_grad.mm(torch.ones(2, 2), torch.ones(2, 2), out=torch.empty(2, 2))
    assert functions.mm_out(torch.ones(2, 2), torch.ones(2, 2), torch.empty(2, 2)) is not None


def pair() -> Pair:
    return integers(4, 4, torch.float32, 1), integers(4, 4, torch.float32, 2)


def drawn(sizes: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    count = int(torch.Size(sizes).numel())
    return integers(1, count, dtype, seed).reshape(sizes)


def laid_out(x: Tensor, how: str) -> Tensor:
    """The same values with other strides, between elements that are NaN."""
    if how == "reversed":
        order = tuple(reversed(range(x.dim())))
        return x.permute(order).contiguous().permute(order)
    if how == "sliced":
        whole = x.new_full([2 * size + 1 for size in x.shape], float("nan"))
        part = whole[tuple(slice(1, None, 2) for _ in x.shape)]
        return part.copy_(x)
    if how == "middle":  # as the heads of an attention
        return x if x.dim() < 3 else x.transpose(0, -2).contiguous().transpose(0, -2)
    return x


LAYOUTS = ("plain", "reversed", "sliced", "middle")
