"""``out=``: a product written to memory that the caller has; and what torch alone takes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import strictness
from .autograd import is_plain
from .ops import accelerated, are_scales, can_be_added, compute, has_work

Operands = tuple[Any, ...]
Scales = dict[str, Any]


def into(name: str, operands: Operands, scales: Scales, out_dtype: torch.dtype | None, out: Tensor | None) -> Tensor:
    """``torch.<name>(*operands, **scales, out=out)``, by these kernels where they can write to ``out``.

    What they cannot is torch's, with its results and its errors: an ``out`` of another dtype or device, or one that
    shares memory with an operand or with itself; scales that are no real numbers; and every ``out_dtype``.
    """
    *_, mat1, mat2 = operands
    if says_torch(operands, out):
        pass
    elif out is None or out_dtype is not None:
        strictness.hand_over(mat1, mat2)
    elif torch.compiler.is_compiling() and out.dtype == mat1.dtype:
        return _traced(name, operands, scales, out)
    elif not _fit(operands, scales, out):
        strictness.hand_over(mat1, mat2)
    elif not is_plain(*operands, out):
        return _traced(name, operands, scales, out)
    elif has_work(mat1, mat2, **scales):
        if out.shape != (*mat1.shape[:-1], mat2.shape[-1]):
            own = torch.bmm if mat1.dim() == 3 else torch.mm
            own(mat1[..., :0], mat2[..., :0, :], out=out)  # resizes it, with torch's warning
        if can_write(out, operands):
            return _written(out, operands, scales)
        strictness.hand_over(mat1, mat2)
    more = {key: value for key, value in (("out_dtype", out_dtype), ("out", out)) if value is not None}
    return getattr(torch, name)(*operands, **given(scales), **more)


def given(scales: Scales) -> Scales:
    """Those that are not the default: torch names in an error what it is called with."""
    return {name: value for name, value in scales.items() if type(value) is not int or value != 1}


def says_torch(operands: Operands, out: Tensor | None) -> bool:
    """Whether torch has an error for it: no tensors, or an ``out`` where a gradient or a transform follows."""
    tensors = operands if out is None else (*operands, out)
    if not all(isinstance(x, Tensor) for x in tensors):
        return True
    recorded = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    return out is not None and (recorded or torch._C._are_functorch_transforms_active())


def _fit(operands: Operands, scales: Scales, out: Tensor) -> bool:
    *inputs, mat1, mat2 = operands
    alike = out.dtype == mat1.dtype and out.device == mat1.device and out.layout == torch.strided
    added = all(can_be_added(input, mat1, mat2) for input in inputs)
    return alike and accelerated(mat1, mat2) and added and are_scales(*scales.values())


def _traced(name: str, operands: Operands, scales: Scales, out: Tensor) -> Tensor:
    """For tracers and subclasses, which do not see what is written past them."""
    with torch.autocast(out.device.type, enabled=False):  # as for torch's own with out=
        return copied(getattr(torch.ops.matmul_grad, name).default(*operands, **scales), out)


def copied(result: Tensor, out: Tensor) -> Tensor:
    """Copy, and resize as torch does, with its warning."""
    return torch.mul(result, 1, out=out)


def _written(out: Tensor, operands: Operands, scales: Scales) -> Tensor:
    *inputs, mat1, mat2 = operands
    compute(mat1, mat2, inputs[0] if inputs else None, out=out, **scales)
    if not out.is_inference():
        torch.autograd.graph.increment_version(out)
    return out


def can_write(out: Tensor, operands: Operands) -> bool:
    """Whether ``out`` keeps its elements apart, and from those of the operands; it may be what is added."""
    *inputs, mat1, mat2 = operands
    shared = [
        x for x in inputs if not (x.data_ptr() == out.data_ptr() and x.expand(out.shape).stride() == out.stride())
    ]
    return _is_spread(out) and not any(_overlap(out, x) for x in (mat1, mat2, *shared))


def _is_spread(x: Tensor) -> bool:
    """Whether no two elements share a place: each stride steps over all that the smaller ones reach."""
    covered = 0
    for step, size in sorted((step, size) for step, size in zip(x.stride(), x.shape, strict=True) if size > 1):
        if step <= covered:
            return False
        covered += (size - 1) * step
    return True


def _overlap(one: Tensor, other: Tensor) -> bool:
    """Whether the memory between first and last element of two tensors meets."""
    (start, end), (begin, stop) = (_extent(x) for x in (one, other))
    return start < stop and begin < end


def _extent(x: Tensor) -> tuple[int, int]:
    reach = sum((size - 1) * step for size, step in zip(x.shape, x.stride(), strict=True)) + 1
    return x.data_ptr(), x.data_ptr() + (reach if x.numel() else 0) * x.element_size()
