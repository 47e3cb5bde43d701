"""Operands of mm in float64, compared to its rounding."""

from typing import Any

import torch
from torch import Tensor

from matmul_grad.testing import normal

MM, MM_BACKWARD = torch.ops.matmul_grad.mm, torch.ops.matmul_grad.mm_backward

DOUBLE = torch.float64


def pair(m: int = 3, n: int = 2, k: int = 4, needs: bool = False) -> tuple[Tensor, Tensor]:
    a, b = normal(m, k, DOUBLE, seed=1), normal(k, n, DOUBLE, seed=2)
    return a.requires_grad_(needs), b.requires_grad_(needs)


def assert_close(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
