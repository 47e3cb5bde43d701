"""Autocast, by the rule that aten has for its own products.

Operands on the device that are floating-point, and not float64, are cast to ``torch.get_autocast_dtype``. The cast
stands above autograd, outside of the product's node: gradients come back in the dtype of the parameter. torch keeps
the casts of weights for the rest of an autocast block; here each call casts again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .ops import COMPOSED_SCHEMAS, SCHEMAS, library

DEVICES = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}


def make_cast(name: str, device: str) -> Callable[..., Any]:
    """The Autocast key of one device for one operator."""
    keys: Any = torch._C.DispatchKey
    own = torch._C.DispatchKeySet(getattr(keys, DEVICES[device]))
    operator = getattr(torch.ops.matmul_grad, name).default

    def cast(x: Any, dtype: torch.dtype) -> Any:
        if not isinstance(x, Tensor) or x.device.type != device or not x.is_floating_point():
            return x
        return x if x.dtype in (torch.float64, dtype) else x.to(dtype)

    def call(*operands: Any, **scales: Any) -> Any:
        dtype = torch.get_autocast_dtype(device)
        with torch._C._ExcludeDispatchKeyGuard(own):
            return operator(*(cast(x, dtype) for x in operands), **scales)

    return call


def register_operator(name: str) -> None:
    for device, key in DEVICES.items():
        library.impl(name, make_cast(name, device), key)


def register() -> None:
    for name in (*SCHEMAS, *COMPOSED_SCHEMAS, "mm_backward"):
        register_operator(name)
