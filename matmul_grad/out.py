"""``out=``: a product written to memory that the caller has; and what torch alone takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import strictness
from .autograd import is_plain
from .ops import accelerated, are_scales, can_be_added, compute, has_work

Operands = tuple[Any, ...]
Scales = dict[str, Any]


def into(
    torchs: Callable[..., Tensor], operands: Operands, scales: Scales, out_dtype: torch.dtype | None, out: Tensor | None
) -> Tensor:
    """``torchs(*operands, **scales, out=out)``, by these kernels where they can write to ``out``.

    What they cannot is torch's, with its results and its errors: an ``out`` of another dtype or device, or one that
    shares memory with an operand or with itself; scales that are no real numbers; and every ``out_dtype``.
    """
    if not _says_torch(operands, out):
        if out is None or out_dtype is not None or not _fit(operands, scales, out):
            strictness.hand_over(*operands[-2:])
        elif not is_plain(*operands, out):
            return _copied(getattr(torch.ops.matmul_grad, torchs.__name__)(*operands, **scales), out)
        elif has_work(*operands[-2:], **scales):
            _resize(out, (*operands[-2].shape[:-1], operands[-1].shape[-1]))
            if _can_write(out, operands):
                return _written(out, operands, scales)
            strictness.hand_over(*operands[-2:])
    named = {name: value for name, value in (("out_dtype", out_dtype), ("out", out)) if value is not None}
    return torchs(*operands, **scales, **named)


def _says_torch(operands: Operands, out: Tensor | None) -> bool:
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


def _resize(out: Tensor, shape: tuple[int, ...]) -> None:
    if out.shape != shape:
        torch.ops.aten._resize_output_(out, shape, out.device)  # with torch's warning


def _copied(result: Tensor, out: Tensor) -> Tensor:
    """For tracers and subclasses, which do not see what is written past them."""
    _resize(out, result.shape)
    return out.copy_(result)


def _written(out: Tensor, operands: Operands, scales: Scales) -> Tensor:
    *inputs, mat1, mat2 = operands
    compute(mat1, mat2, *inputs, **scales, out=out)
    if not out.is_inference():
        torch.autograd.graph.increment_version(out)
    return out


def _can_write(out: Tensor, operands: Operands) -> bool:
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
