"""What the switch runs for operands whose gradients are kept in another dtype: torch's products, recorded by our nodes.

torch's derivatives have the dtype of their operands, and ``linear`` has a transposed view above them, so nothing below
autograd can keep a gradient unrounded. Compiled entries look at ``aten::linear``, ``mm`` and ``addmm`` under
AutogradCPU, pass all else on to torch's kernels, and call these.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .autograd import has_own_graph
from .functional import linear_to_parameters
from .gradient_dtypes import is_kept_in_float32
from .ops import addition, can_be_added, library, product
from .scalars import real_scales


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    result = linear_to_parameters(input, weight, bias, None, False) if is_kept_in_float32(weight) else None
    return torch.nn.functional.linear(*_views(input, weight), bias) if result is None else result


def _mm(self: Tensor, mat2: Tensor) -> Tensor:
    return product(self, mat2) if _fit(self, mat2) else torch.mm(*_views(self, mat2))


def _addmm(self: Tensor, mat1: Tensor, mat2: Tensor, *, beta: Any = 1, alpha: Any = 1) -> Tensor:
    scales = real_scales(mat1, beta, alpha)
    if scales is None or not _fit(mat1, mat2) or not (has_own_graph(self, mat1) and can_be_added(self, mat1, mat2)):
        return torch.addmm(self, *_views(mat1, mat2), beta=beta, alpha=alpha)
    return addition(self, mat1, mat2, *scales)


def _fit(a: Tensor, b: Tensor) -> bool:
    """Whether the operators here record the product, and leave nothing to torch's function, which would come back."""
    return a.dim() == b.dim() == 2 and a.shape[1] == b.shape[0] and a.device == b.device and has_own_graph(a, b)


def _views(*operands: Tensor) -> list[Tensor]:
    """The operands for torch's function, which is not to look at them again: views are no leaves."""
    return [x.view_as(x) for x in operands]


_SCHEMAS = {
    "linear": "(Tensor input, Tensor weight, Tensor? bias=None) -> Tensor",
    "mm": "(Tensor self, Tensor mat2) -> Tensor",
    "addmm": "(Tensor self, Tensor mat1, Tensor mat2, *, Scalar beta=1, Scalar alpha=1) -> Tensor",
}
for name, kernel in (("linear", _linear), ("mm", _mm), ("addmm", _addmm)):
    library.define(f"_aten_{name}{_SCHEMAS[name]}")
    library.impl(f"_aten_{name}", kernel, "CompositeImplicitAutograd")
