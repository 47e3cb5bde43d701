"""What the switch runs for a linear layer whose weight gradient is kept in float32: ``linear``, by a node of ours.

torch's derivatives have the dtype of their operands, and ``linear`` has a transposed view above them, so nothing below
autograd can keep a gradient unrounded. On a CPU a compiled entry looks at ``aten::linear`` under AutogradCPU, passes
all else on to torch's kernel, and calls this one; on CUDA a kernel in Python does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .functional import linear_to_parameters
from .gradient_dtypes import is_kept_in_float32
from .ops import library


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    result = linear_to_parameters(input, weight, bias, None, False) if is_kept_in_float32(weight) else None
    if result is not None:
        return result
    # Views are no leaves, so that torch's function is not looked at again.
    return torch.nn.functional.linear(input.view_as(input), weight.view_as(weight), bias)


def make_kernel(torch_impl: Any) -> Callable[..., Tensor]:
    """The kernel of ``aten::linear`` under the Autograd key of a device; ``torch_impl`` is PyTorch's."""

    def kernel(keys: Any, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        result = linear_to_parameters(input, weight, bias, None, False) if is_kept_in_float32(weight) else None
        return torch_impl.call_boxed(keys, input, weight, bias) if result is None else result

    return kernel


library.define("_aten_linear(Tensor input, Tensor weight, Tensor? bias=None) -> Tensor")
library.impl("_aten_linear", _linear, "CompositeImplicitAutograd")
