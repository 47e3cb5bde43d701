"""Gradients of 16-bit leaves that torch keeps in float32, by ``grad_dtype``: the product is stored without a rounding.

torch's derivatives have the dtype of their operand, and the engine converts them: a gradient that is float32 in name
has the values of 16 bits. Here the product itself is stored in float32, and the engine has nothing to convert.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .ops import product

NARROW = (torch.bfloat16, torch.float16)
WIDE = torch.float32
NEITHER = (False, False)


def is_kept_in_float32(x: Tensor) -> bool:
    """Whether it is a leaf of 16 bits whose gradient is kept in float32.

    >>> import torch
    >>> weight = torch.ones(2, 2, dtype=torch.bfloat16, requires_grad=True)
    >>> before = is_kept_in_float32(weight)
    >>> weight.grad_dtype = torch.float32
    >>> before, is_kept_in_float32(weight)
    (False, True)
    """
    if x.dtype not in NARROW or not x.requires_grad or not x.is_leaf:
        return False
    return getattr(x, "grad_dtype", None) == WIDE


def kept_dtype(x: Tensor) -> torch.dtype:
    """The dtype of its gradient: float32 of a leaf that ``is_kept_in_float32``, else its own."""
    return WIDE if is_kept_in_float32(x) else x.dtype


def product_in(a: Tensor, b: Tensor, in_float32: bool) -> Tensor:
    """The differentiable product; of two 16-bit operands the sums themselves, where they are asked for."""
    if not in_float32:
        return product(a, b)
    operators = torch.ops.matmul_grad
    operator = operators.bmm_dtype if a.dim() == 3 else operators.mm_dtype
    result: Tensor = operator.default(a, b, WIDE)
    return result
