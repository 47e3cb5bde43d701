"""Convolutions by torch's kernels: the fallback for what this package's do not support.

The functions have the arguments of the operators, whose decompositions for export they are. Where they are recorded,
the graph is that of torch's operators.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .convolution_shapes import Sizes, untransposed

_convolution = torch.ops.aten.convolution.default
_backward = torch.ops.aten.convolution_backward.default


def memory_format_of(tensor: Tensor) -> torch.memory_format:
    """Channels last, or contiguous: what the result of a convolution of the tensor has."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(tensor.dim())
    if last is not None and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=last):
        return last
    return torch.contiguous_format


def convolution(input: Tensor, weight: Tensor, bias: Tensor | None, *arguments: Any) -> Tensor:
    """``aten::convolution``, in the memory format of the input."""
    result = _convolution(input, weight, bias, *arguments)
    return result.contiguous(memory_format=memory_format_of(input))


def weight_gradient(
    grad: Tensor,
    input: Tensor,
    weight_size: Sizes,
    stride: Sizes,
    padding: Sizes,
    dilation: Sizes,
    groups: int,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """The gradient of the filter of a convolution of ``input``, from that of its result.

    A result that has less pixels than the convolution gives is the input of a transposed one. With another
    ``out_dtype`` it is converted, and so rounded before.
    """
    geometry = untransposed(stride, padding, dilation, groups)
    weight = input.new_empty(1).expand(list(weight_size))
    back = geometry.gradient(grad.shape, weight_size, input.shape)
    if any(more >= step for more, step in zip(back.output_padding, geometry.stride)):
        grad, input, geometry = input, grad, back
    result: Tensor = _backward(grad, input, weight, None, *geometry, [False, True, False])[1]
    return result.contiguous().to(out_dtype or result.dtype)
