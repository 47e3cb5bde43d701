"""``beta`` and ``alpha``: numbers of any type that torch accepts, as float64 for the operators where that is exact."""

from __future__ import annotations

import numbers
from typing import Any

import torch
from torch import Tensor

from .ops import DTYPES, are_scales


def real_scales(operand: Tensor, *scales: Any) -> list[Any] | None:
    """The scales of a product as float64, or None for a fallback.

    >>> import numpy, torch
    >>> real_scales(torch.ones(2, 2), 2, numpy.float32(0.5)), real_scales(torch.ones(2, 2), 1j, 1)
    ([2, 0.5], None)
    """
    if operand.dtype in DTYPES and are_scales(*scales):
        return list(scales)
    given = [x if type(x) in (int, float) else _as_number(x) for x in scales]
    real = [float(x) if type(x) is int and 2**53 < abs(x) < 2**63 and int(float(x)) == x else x for x in given]
    return real if operand.dtype in DTYPES and are_scales(*real) else None


def _as_number(x: Any) -> Any:
    """NumPy's numbers and a tensor of one, as torch reads them; anything else as it is."""
    if isinstance(x, Tensor):
        return x if x.dim() or x.requires_grad or torch.compiler.is_compiling() else x.item()
    if isinstance(x, bool):
        return x
    if isinstance(x, int | float):
        return int(x) if isinstance(x, int) else float(x)
    if type(x).__module__ != "numpy":
        return x
    if isinstance(x, numbers.Integral) or type(x).__name__ in ("bool", "bool_"):
        return int(x)
    return float(x) if isinstance(x, numbers.Real) else x
