"""``out=``: a result in memory that the caller has. Nothing is resized or written before the outcome is known.

by compiled code          an ordinary ``out`` of the right shape, of ordinary operands
written in place          ``out`` has the shape and shares no memory with the matrices; it may be what is added
by a temporary            ``out`` is to be resized, or shares memory with an operand: the result is copied
torch's error             ``out`` and what is added are dense and overlap in part
product and copy          tracers, modes, subclasses, which do not see what is written past them
by torch                  the rest
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from . import fallback, strict_mode
from .dispatch_state import is_plain
from .ops import accelerated, can_be_added, compiled, compute, const_data_ptr, has_work, outs_status, require_storage
from .out_dtype import call as call_with_dtype
from .scalars import real_scales

Operands = tuple[Any, ...]
Scales = dict[str, Any]


def run_with_out(
    name: str, operands: Operands, scales: Scales, out_dtype: torch.dtype | None, out: Tensor | None
) -> Tensor:
    """``torch.<name>(*operands, **scales, out=out)``, by these kernels where they can write to ``out``.

    The rest falls back to PyTorch (same results, same errors): an ``out`` of another dtype or device, one whose
    elements share memory with each other; scales that are no real numbers; and an ``out_dtype`` on CUDA. Raises
    RuntimeError where a storage holds fewer elements than its tensor has.
    """
    if out is not None and out_dtype is None and write_compiled(name, operands, scales, out):
        return out
    if not is_left_to_torch(operands, out):
        if isinstance(out_dtype, torch.dtype):
            result = _with_dtype(name, operands, scales, out_dtype, out)
            if result is not None:
                return result
        elif out is None or out_dtype is not None:
            strict_mode.note_fallback(*operands[-2:])
        else:
            result = _computed(name, operands, scales, out)
            if result is not None:
                return result
    more = {key: value for key, value in (("out_dtype", out_dtype), ("out", out)) if value is not None}
    return getattr(torch, name)(*operands, **non_default(scales), **more)


def write_compiled(name: str, operands: Operands, scales: Scales, out: Tensor) -> bool:
    """Whether compiled code has written the product to ``out``: an ordinary one, of the right shape."""
    if is_dynamo_compiling() or getattr(compiled, f"{name}_out")(*operands, *scales.values(), out) is None:
        return False
    mark_written(out)
    return True


def expect_more(out: Tensor) -> None:
    """After a product into ``out`` in Python, have compiled code write the next ones."""
    if out.device.type == "cpu":
        outs_status()


def _with_dtype(
    name: str, operands: Operands, scales: Scales, out_dtype: torch.dtype, out: Tensor | None
) -> Tensor | None:
    numbers = real_scales(operands[-1], *scales.values())
    if numbers is None or (out is not None and (out.dtype != out_dtype or out.device != operands[-1].device)):
        strict_mode.note_fallback(*operands[-2:])
        return None
    result = call_with_dtype(name, operands, dict(zip(scales, numbers, strict=True)), out_dtype)
    return result if result is None or out is None else copy_to(result, out)


def _computed(name: str, operands: Operands, scales: Scales, out: Tensor) -> Tensor | None:
    """The product, in ``out``, or None where torch's function takes the call."""
    mat1, mat2 = operands[-2:]
    numbers = real_scales(mat1, *scales.values())
    real = {} if numbers is None else dict(zip(scales, numbers, strict=True))
    if numbers is not None and torch.compiler.is_compiling() and out.dtype == mat1.dtype:
        return _traced(name, operands, real, out)
    if numbers is None or not _fit(operands, out):
        strict_mode.note_fallback(mat1, mat2)
    elif not is_plain(*operands, out):
        return _traced(name, operands, real, out)
    else:
        return _computed_by_kernels(name, operands, real, out)
    return None


def _computed_by_kernels(name: str, operands: Operands, scales: dict[str, Any], out: Tensor) -> Tensor | None:
    """``_computed`` for matching operands, without a graph, transform, mode or subclass."""
    *inputs, mat1, mat2 = operands
    is_resized = out.shape != (*mat1.shape[:-1], mat2.shape[-1])
    if not has_work(mat1, mat2, **scales):
        require_storage(*operands, *([] if is_resized else [out]))
        if not is_resized and not _is_non_overlapping(out):
            return None
        return copy_to(getattr(torch, name)(*operands, **non_default(scales)), out)
    input = inputs[0] if inputs else None
    if is_resized:
        return copy_to(compute(mat1, mat2, input, **scales), out)
    overlaps_source = scales.get("beta") != 0 and overlaps_addend(out, inputs)
    if overlaps_source and are_dense(out, inputs[0].expand(out.shape)):
        pass  # torch's error
    elif not repeats_an_element(out) and (overlaps_source or _overlaps_any(out, mat1, mat2)):
        require_storage(out)
        return copy_to(compute(mat1, mat2, input, **scales), out)
    elif _is_non_overlapping(out):
        compute(mat1, mat2, input, out=out, **scales)
        mark_written(out)
        expect_more(out)  # last, since it may be interrupted
        return out
    require_storage(*operands, out)
    strict_mode.note_fallback(mat1, mat2)
    return None


def non_default(scales: Scales) -> Scales:
    """The scales that are not the default: torch's errors name the arguments of the call."""
    return {name: value for name, value in scales.items() if type(value) is not int or value != 1}


def is_left_to_torch(operands: Operands, out: Tensor | None) -> bool:
    """Whether torch's function takes the call: the gate, or an ``out`` where a gradient or a transform follows.

    An ``out`` that was made in inference mode may not be written elsewhere.
    """
    tensors = operands if out is None else (*operands, out)
    if fallback.is_needed_to_compose(*tensors):
        return True
    if out is None:
        return False
    recorded = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    if recorded or torch._C._are_functorch_transforms_active():
        return True
    return not torch.compiler.is_compiling() and out.is_inference() and not torch.is_inference_mode_enabled()


def copy_to(result: Tensor, out: Tensor) -> Tensor:
    """``out``, with a result copied to it, and resized as torch does, with its warning."""
    if type(out) in fallback.PLAIN and out.shape == result.shape and not torch.compiler.is_compiling():
        require_storage(out)
    return torch.mul(result, 1, out=out)


def _fit(operands: Operands, out: Tensor) -> bool:
    *inputs, mat1, mat2 = operands
    alike = out.dtype == mat1.dtype and out.device == mat1.device
    return alike and accelerated(mat1, mat2) and all(can_be_added(input, mat1, mat2) for input in inputs)


def _traced(name: str, operands: Operands, scales: Scales, out: Tensor) -> Tensor:
    """The operator and a copy."""
    with torch.autocast(out.device.type, enabled=False):  # as for torch's with out=
        return copy_to(getattr(torch.ops.matmul_grad, name).default(*operands, **scales), out)


def mark_written(out: Tensor) -> Tensor:
    """``out``, after it was written past autograd."""
    if not out.is_inference():
        torch.autograd.graph.increment_version(out)
    return out


def can_write(out: Tensor, operands: Operands) -> bool:
    """Whether the elements of ``out`` overlap neither each other nor the operands; it may be what is added."""
    *inputs, mat1, mat2 = operands
    return _is_non_overlapping(out) and not _overlaps_any(out, mat1, mat2) and not overlaps_addend(out, inputs)


def overlaps_addend(out: Tensor, inputs: Sequence[Tensor]) -> bool:
    """Whether ``out`` shares memory with what is added, and is not the same elements."""
    start, strides = const_data_ptr(out), out.stride()
    others = [x for x in inputs if const_data_ptr(x) != start or x.expand(out.shape).stride() != strides]
    return bool(others) and _overlaps_any(out, *others)


def are_dense(*tensors: Tensor) -> bool:
    """Whether torch detects that two tensors overlap: only where their elements fill the memory they span."""
    return all(torch.ops.aten.is_non_overlapping_and_dense(x) for x in tensors)


def repeats_an_element(x: Tensor) -> bool:
    """Whether nothing can be copied to it; some products of torch take it all the same."""
    if x.layout != torch.strided:
        return False
    return any(step == 0 and size > 1 for step, size in zip(x.stride(), x.shape, strict=True))


def _is_non_overlapping(x: Tensor) -> bool:
    """Whether no two elements share an address: each stride is beyond all that the smaller ones reach."""
    if x.is_contiguous():
        return True
    covered = 0
    for step, size in sorted((step, size) for step, size in zip(x.stride(), x.shape, strict=True) if size > 1):
        if step <= covered:
            return False
        covered += (size - 1) * step
    return True


def _overlaps_any(one: Tensor, *others: Tensor) -> bool:
    """Whether the memory between first and last element of a tensor meets that of another."""
    start, end = _extent(one)
    return any(start < stop and begin < end for begin, stop in map(_extent, others))


def _extent(x: Tensor) -> tuple[int, int]:
    start = const_data_ptr(x)
    return start, start + (_reach(x) if x.numel() else 0) * x.element_size()


def _reach(x: Tensor) -> int:
    """Elements from the first to the last, of a tensor that has any."""
    if x.is_contiguous():
        return x.numel()
    return sum((size - 1) * step for size, step in zip(x.shape, x.stride(), strict=True)) + 1
