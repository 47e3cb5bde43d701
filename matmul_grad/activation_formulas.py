"""The activations by name, and their gradients, composed of torch's functions: the fallback, and what is recorded."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .kernels.cpu.gemm_args import ACTIVATIONS

NAMES = ACTIVATIONS[1:]
INV_SQRT2, INV_SQRT_2PI = math.sqrt(0.5), 1 / math.sqrt(2 * math.pi)
SLOPE, CUBIC = 2 * math.sqrt(2 / math.pi), 0.044715

BY_TORCH: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "silu": functional.silu,
    "tanh": torch.tanh,
}


def require_name(activation: Any) -> None:
    if activation not in NAMES:
        raise ValueError(f"activation must be None or one of {', '.join(NAMES)}, got {activation!r}")


# --- the gradient of f, composed of functions that have derivatives of every order ----------------------------------


def _relu_gradient(grad: Tensor, y: Tensor) -> Tensor:
    return torch.where(y <= 0, torch.zeros_like(grad), grad)


def _gelu_gradient(grad: Tensor, x: Tensor) -> Tensor:
    return grad * (torch.erfc(x * -INV_SQRT2) * 0.5 + x * torch.exp(x * x * -0.5) * INV_SQRT_2PI)


def _gelu_tanh_gradient(grad: Tensor, x: Tensor) -> Tensor:
    sigmoid = torch.sigmoid(SLOPE * (x + CUBIC * x * x * x))
    return grad * (sigmoid + x * sigmoid * (1 - sigmoid) * (SLOPE + 3 * SLOPE * CUBIC * x * x))


def _silu_gradient(grad: Tensor, x: Tensor) -> Tensor:
    sigmoid = torch.sigmoid(x)
    return grad * (sigmoid + x * sigmoid * (1 - sigmoid))


def _tanh_gradient(grad: Tensor, y: Tensor) -> Tensor:
    return grad * (1 - y * y)


GRADIENTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "relu": _relu_gradient,
    "gelu": _gelu_gradient,
    "gelu_tanh": _gelu_tanh_gradient,
    "silu": _silu_gradient,
    "tanh": _tanh_gradient,
}


def gradient_by_torch(grad: Tensor, kept: Tensor, activation: str) -> Tensor:
    """grad · f' in torch's functions; 16-bit operands are computed with in float32, as in the kernel."""
    wide = torch.float32 if grad.dtype.itemsize == 2 else grad.dtype
    return GRADIENTS[activation](grad.to(wide), kept.to(wide)).to(grad.dtype)


# --- the gradient of f, in one pass of torch's, which has not all derivatives ----------------------------------------

aten = torch.ops.aten
ONE_PASS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "relu": lambda grad, y: aten.threshold_backward.default(grad, y, 0),
    "gelu": lambda grad, x: aten.gelu_backward.default(grad, x),
    "gelu_tanh": lambda grad, x: aten.gelu_backward.default(grad, x, approximate="tanh"),
    "silu": lambda grad, x: aten.silu_backward.default(grad, x),
    "tanh": lambda grad, y: aten.tanh_backward.default(grad, y),
}


def one_pass_by_torch(grad: Tensor, kept: Tensor, activation: str) -> Tensor:
    """``gradient_by_torch`` where no graph is recorded: for devices without a kernel of ours."""
    return ONE_PASS[activation](grad, kept)
