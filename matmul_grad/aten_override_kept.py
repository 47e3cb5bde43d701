"""What the switch runs for operands whose gradient is kept in float32: ``linear``, ``mm`` and ``addmm``, by our nodes.

torch's derivatives have the dtype of their operands, and ``linear`` has a transposed view above them, so nothing below
autograd can keep a gradient unrounded. On a CPU compiled entries look at these operators under AutogradCPU, pass all
else on to torch's kernels, and call these ones; on CUDA kernels in Python do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .functional import linear_to_parameters
from .gradient_dtypes import is_kept_in_float32
from .ops import accelerated, addition, are_scales, can_be_added, has_work, library, product


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    """Recorded by a node of ours, or None where torch's kernel is to take the call; so are the others."""
    return linear_to_parameters(input, weight, bias, None, False) if is_kept_in_float32(weight) else None


def _mm(self: Tensor, mat2: Tensor) -> Tensor | None:
    return product(self, mat2) if _is_kept(self, mat2) and has_work(self, mat2) else None


def _addmm(self: Tensor, mat1: Tensor, mat2: Tensor, *, beta: Any = 1, alpha: Any = 1) -> Tensor | None:
    if not _is_kept(mat1, mat2) or not can_be_added(self, mat1, mat2) or not are_scales(beta, alpha):
        return None
    return addition(self, mat1, mat2, beta, alpha) if has_work(mat1, mat2, beta, alpha) else None


def _is_kept(mat1: Tensor, mat2: Tensor) -> bool:
    """Whether a gradient is kept in float32, of two matrices that our operators multiply: they call torch's for no
    others, which would come back here."""
    kept = is_kept_in_float32(mat1) or is_kept_in_float32(mat2)
    return kept and mat1.dim() == 2 and accelerated(mat1, mat2)


RECORDED: dict[str, Callable[..., Tensor | None]] = {"linear": _linear, "mm": _mm, "addmm": _addmm}
SCHEMAS = {
    "linear": "(Tensor input, Tensor weight, Tensor? bias=None) -> Tensor",
    "mm": "(Tensor self, Tensor mat2) -> Tensor",
    "addmm": "(Tensor self, Tensor mat1, Tensor mat2, *, Scalar beta=1, Scalar alpha=1) -> Tensor",
}


def make_composite(name: str) -> Callable[..., Tensor]:
    """The kernel that a compiled entry calls."""
    recorded, torch_impl = RECORDED[name], getattr(torch.ops.aten, name).default

    def kernel(*operands: Tensor | None, **scales: Any) -> Tensor:
        result = recorded(*operands, **scales)
        if result is not None:
            return result
        # Views are no leaves, so that torch's function is not looked at again.
        views = (x if x is None else x.view_as(x) for x in operands)
        other: Tensor = torch_impl(*views, **scales)
        return other

    return kernel


def make_kernel(name: str, torch_impl: Any) -> Callable[..., Tensor]:
    """The kernel of an operator of aten's under the Autograd key of a device; ``torch_impl`` is PyTorch's."""
    recorded = RECORDED[name]

    def kernel(keys: Any, *operands: Tensor | None, **scales: Any) -> Tensor:
        result = recorded(*operands, **scales)
        return torch_impl.call_boxed(keys, *operands, **scales) if result is None else result

    return kernel


for name, schema in SCHEMAS.items():
    library.define(f"_aten_{name}{schema}")
    library.impl(f"_aten_{name}", make_composite(name), "CompositeImplicitAutograd")
