"""Both gradients of a convolution by the CPU's kernels, called from its node: where nothing else follows the call.

A forward has found that the kernels support its operands. A gradient has the sizes and the dtype of the result, as the
engine sees to, and nothing is recorded of it, so that operators and checks of sizes would add nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .convolution_shapes import Geometry, Sizes
from .dispatch_state import is_idle
from .ops import require_storage


def is_direct(kernels: Any, grad: Tensor, input: Tensor | None, weight: Tensor | None) -> bool:
    """Whether the gradients of these saved operands, of which one may be None, can be left to the kernels."""
    if kernels is None or torch.is_grad_enabled():
        return False
    saved = [x for x in (input, weight) if x is not None]
    return bool(saved) and is_idle(grad, *saved) and all([kernels.supports(grad, x) for x in saved])


def input_gradient(kernels: Any, grad: Tensor, weight: Tensor, size: Sizes, geometry: Geometry) -> Tensor:
    window = geometry.stride, geometry.padding, geometry.dilation, geometry.groups
    require_storage(grad, weight)
    if not geometry.transposed:
        return kernels.input_gradient(grad, weight, size, *window)
    return cut(kernels.forward(grad, weight, None, *window), size)


def weight_gradient(
    kernels: Any, grad: Tensor, input: Tensor, size: Sizes, geometry: Geometry, out_dtype: torch.dtype | None
) -> Tensor:
    window = geometry.stride, geometry.padding, geometry.dilation, geometry.groups
    require_storage(grad, input)
    pair = (input, grad) if geometry.transposed else (grad, input)
    return kernels.weight_gradient(*pair, size, *window, out_dtype)


def cut(tensor: Tensor, size: Sizes) -> Tensor:
    """Its first pixels, as many as ``size`` has."""
    for dim in range(2, tensor.dim()):
        if tensor.shape[dim] != size[dim]:
            tensor = tensor.narrow(dim, 0, size[dim])
    return tensor
