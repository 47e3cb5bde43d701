"""Layers that add to their weight's gradient, and what the gradients are: whole numbers, exactly."""

from typing import Any

import torch
from torch import Tensor, nn

import matmul_grad
from matmul_grad.testing import assert_same_bits, integers

WIDE, BF16 = torch.float32, torch.bfloat16
K, N, ROWS, PARTS = 20, 11, 24, 3


def layer(dtype: torch.dtype = WIDE, keeps: torch.dtype | None = None, **named: Any) -> matmul_grad.Linear:
    made = matmul_grad.Linear(K, N, dtype=dtype, accumulate=True, **named)
    with torch.no_grad():
        made.weight.copy_(integers(N, K, dtype, 9))
        if made.bias is not None:
            made.bias.copy_(integers(1, N, dtype, 8)[0])
    if keeps is not None:
        made.weight.grad_dtype = keeps
    return made


def batch(dtype: torch.dtype = WIDE) -> tuple[Tensor, Tensor]:
    """A and dC of all parts."""
    return integers(PARTS * ROWS, K, dtype, 1) * 31, integers(PARTS * ROWS, N, dtype, 2)


def train(made: nn.Module, parts: int = PARTS, dtype: torch.dtype = WIDE) -> None:
    for a, grad in zip(*(x.chunk(parts) for x in batch(dtype)), strict=True):
        made(a).backward(grad)


def exact(dtype: torch.dtype = WIDE) -> Tensor:
    a, grad = (x.double() for x in batch(dtype))
    return grad.t() @ a


def assert_exact(found: Tensor | None, expected: Tensor) -> None:
    assert found is not None
    assert_same_bits(found.contiguous() + 0.0, expected.to(found.dtype) + 0.0)
