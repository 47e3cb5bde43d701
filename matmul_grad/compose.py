"""What is made of products: ``matmul`` and ``linear``, by torch's own rules of what is folded, expanded and copied."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import strictness
from .api import addmm, bmm, mm
from .out import copied, says_torch


def matmul(input: Tensor, other: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Product of two vectors, matrices or batches of matrices, which are broadcast; differentiable to any order.

    C[…] = A[…] · B[…]

    shapes      input (…, m, k) or (k), other (…, k, n) or (k) → (…, m, n), without m or n where that was a vector
    strides     as ``mm``; copied only where torch.matmul copies: a batch that is expanded in the middle
    dtypes      as ``mm``; the rest is torch.matmul
    aliasing    the result is new memory, or ``out``
    rounding    as ``mm``
    errors      torch.matmul's
    determinism as ``mm``
    source      as ``mm``

    >>> import torch, matmul_grad
    >>> matmul_grad.matmul(torch.ones(5, 1, 2, 3), torch.ones(4, 3, 2)).shape
    torch.Size([5, 4, 2, 2])
    >>> matmul_grad.matmul(torch.ones(3), torch.arange(3.0))
    tensor(3.)
    """
    if out is None:
        return _as_torch(torch.matmul, _matmul, input, other)
    return _as_torch(torch.matmul, _matmul_into, input, other, out=out)


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """What ``torch.nn.Linear`` computes, differentiable to any order.

    C = A · Wᵀ + bias

    shapes      input (…, k), weight (n, k) or (k), bias (n) or () → (…, n), or (…)
    strides     as ``mm``; an input that cannot be seen as one matrix is copied, as in torch
    dtypes      as ``mm``; the rest is torch.nn.functional.linear
    aliasing    the result is new memory
    rounding    as ``addmm``
    errors      torch.nn.functional.linear's
    determinism as ``mm``
    source      as ``addmm``

    >>> import torch, matmul_grad
    >>> matmul_grad.linear(torch.ones(2, 3), torch.ones(1, 3), torch.tensor([0.5])).tolist()
    [[3.5], [3.5]]
    """
    return _as_torch(torch.nn.functional.linear, _linear, input, weight, bias)


def _as_torch(torchs: Callable[..., Tensor], ours: Callable[..., Tensor], *operands: Any, **named: Any) -> Tensor:
    """``ours``; where it fails, torch's own error, if it has one."""
    try:
        return ours(*operands, **named)
    except Exception:
        if not strictness.is_on():
            with torch.no_grad():
                torchs(*operands, **named)
        raise


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if bias is None and weight.dim() <= 2:
        return _matmul(input, weight.t())
    if bias is not None and weight.dim() == 2 and (input.dim() == 2 or (bias.dim() == 1 and input.dim() > 0)):
        if input.dim() == 2:
            return addmm(bias, input, weight.t())
        rows = input.flatten(0, -2) if input.dim() > 1 else input.unsqueeze(0)
        return addmm(bias, rows, weight.t()).view(*input.shape[:-1], weight.shape[0])
    strictness.hand_over(input, weight)
    return torch.nn.functional.linear(input, weight, bias)


def _matmul(input: Tensor, other: Tensor) -> Tensor:
    ranks = input.dim(), other.dim()
    if 0 in ranks or input.device != other.device:
        return torch.matmul(input, other)  # which says so
    if ranks == (1, 1):
        return mm(input.unsqueeze(0), other.unsqueeze(1)).reshape(())
    if ranks == (2, 1):
        return mm(input, other.unsqueeze(1)).squeeze(1)
    if ranks == (1, 2):
        return mm(input.unsqueeze(0), other).squeeze(0)
    if ranks == (2, 2):
        return mm(input, other)
    return _folded(input, other) if _is_folded(input, other) else _batched(input, other)


def _is_folded(input: Tensor, other: Tensor) -> bool:
    """Whether the batch of the longer one joins its rows: the other is no batch, and nothing need be copied.

    A copy is made where the other needs a gradient: its gradient would else be as large as the batch, and summed then.
    """
    first_is_longer = input.dim() >= other.dim()
    long, short = (input, other) if first_is_longer else (other.mT, input)
    if long.dim() < 3 or short.dim() > 2:
        return False
    if short.requires_grad:
        return True
    if input.dim() == 2:
        return False
    steps = zip(long.stride()[:-2], long.stride()[1:-1], long.shape[1:-1], strict=True)
    return long.numel() == 0 or all(step == inner * size for step, inner, size in steps)


def _folded(input: Tensor, other: Tensor) -> Tensor:
    first_is_longer = input.dim() >= other.dim()
    long, short = (input, other) if first_is_longer else (other.mT, input.t())
    rows = long.flatten(0, -2)
    if short.dim() == 1:
        return mm(rows, short.unsqueeze(1)).view(long.shape[:-1])
    result = mm(rows, short).view(*long.shape[:-1], short.shape[1])
    return result if first_is_longer else result.mT.contiguous()


def _batched(input: Tensor, other: Tensor) -> Tensor:
    if input.dim() == other.dim() == 3 and input.shape[0] != other.shape[0]:
        if input.shape[0] == 1 and input.requires_grad:
            return _matmul(input.squeeze(0), other)
        if other.shape[0] == 1 and other.requires_grad:
            return _matmul(input, other.squeeze(0))
    left = input.unsqueeze(0) if input.dim() == 1 else input
    right = other.unsqueeze(1) if other.dim() == 1 else other
    batch = torch.broadcast_shapes(left.shape[:-2], right.shape[:-2])
    a = left.expand(*batch, *left.shape[-2:]).flatten(0, -3)
    b = right.expand(*batch, *right.shape[-2:]).flatten(0, -3)
    return bmm(a, b).view(*batch, *left.shape[-2:-1] * (input.dim() > 1), *right.shape[-1:] * (other.dim() > 1))


def _matmul_into(input: Tensor, other: Tensor, out: Tensor) -> Tensor:
    if says_torch((input, other), out) or out.dtype != input.dtype or out.device != input.device:
        return torch.matmul(input, other, out=out)
    if input.dim() == other.dim() == 2:
        return mm(input, other, out=out)
    with torch.autocast(out.device.type, enabled=False):  # as for torch's own with out=
        return copied(_matmul(input, other), out)
