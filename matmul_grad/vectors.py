"""Functions of vectors, each one product of matrices: ``mv``, ``addmv``, ``dot`` and ``vdot``."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from . import fallback, strict_mode
from .dispatch_state import is_plain
from .fallback import alike, unsafe_view
from .ops import DTYPES, are_too_large, compiled, eager
from .out_variants import (
    are_dense,
    copy_to,
    expect_more,
    is_left_to_torch,
    non_default,
    overlaps_addend,
    repeats_an_element,
    write_compiled,
)
from .scalars import real_scales

_mm = torch.ops.matmul_grad.mm.default
_addmm = torch.ops.matmul_grad.addmm.default
_eager_matmul = eager(torch.ops.matmul_grad.matmul.default)


def mv(input: Tensor, vec: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Product of a matrix and a vector, differentiable to any order.

    c = A · v,  dA = dc · vᵀ,  dv = Aᵀ · dc

    shapes      input (m, k), vec (k) → (m); every size ≥ 0
    strides     as ``mm``
    dtypes      as ``mm``; the rest is torch.mv
    aliasing    the result is new memory, or ``out``, which may share memory with an operand
    rounding    as ``mm``
    errors      torch.mv's
    determinism as ``mm``: the bits of a column of ``mm``
    source      as ``mm``

    Under autocast it casts where torch.mv does: on CUDA.

    >>> import torch, matmul_grad
    >>> matmul_grad.mv(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([1.0, 10.0])).tolist()
    [21.0, 43.0]
    """
    if out is not None:
        return _run_with_out(mv, (input, vec), {}, out)
    if not is_dynamo_compiling():
        result = compiled.mv(input, vec)
        if result is not None:
            return result
    if _is_left_to_torch((2, 1), input, vec):
        return torch.mv(input, vec)
    with _own_autocast(input):
        if not torch.compiler.is_compiling():
            return _eager_matmul(input, vec)
        return unsafe_view(_mm(input, vec.unsqueeze(1)), (input.shape[0],))


def addmv(
    input: Tensor, mat: Tensor, vec: Tensor, *, beta: float = 1, alpha: float = 1, out: Tensor | None = None
) -> Tensor:
    """Product of a matrix and a vector, to which something is added; differentiable to any order.

    c = beta · input + alpha · (A · v),  dinput = beta · dc,  dA = alpha · dc · vᵀ,  dv = alpha · Aᵀ · dc

    shapes      input any that expands to (m), mat (m, k), vec (k) → (m); every size ≥ 0
    strides     as ``mm``
    dtypes      as ``addmm``; the rest is torch.addmv
    aliasing    as ``mv``; ``out`` may be ``input``
    rounding    as ``addmm``
    errors      torch.addmv's
    determinism as ``mm``
    source      as ``addmm``

    With ``beta`` = 0 the input is not read. Under autocast it casts where torch.addmv does: on CUDA.

    >>> import torch, matmul_grad
    >>> matmul_grad.addmv(torch.ones(2), torch.eye(2), torch.tensor([1.0, 10.0]), beta=3).tolist()
    [4.0, 13.0]
    """
    if out is not None:
        return _run_with_out(addmv, (input, mat, vec), {"beta": beta, "alpha": alpha}, out)
    if not is_dynamo_compiling():
        result = compiled.addmv(input, mat, vec, beta, alpha)
        if result is not None:
            return result
    if not _is_left_to_torch((2, 1), mat, vec, input):
        scales = real_scales(mat, beta, alpha)
        if scales is not None and are_too_large(mat.dtype, scales[0], scales[1], is_vector=True):
            return torch.addmv(input, mat, vec, beta=beta, alpha=alpha)  # which takes none that the dtype cannot hold
        if scales is not None:
            column = input.unsqueeze(1) if input.dim() else input
            with _own_autocast(mat):
                result = _addmm(column, mat, vec.unsqueeze(1), beta=scales[0], alpha=scales[1])
            return unsafe_view(result, (mat.shape[0],))
        strict_mode.note_fallback(mat, vec)
    return torch.addmv(input, mat, vec, **non_default({"beta": beta, "alpha": alpha}))


def dot(input: Tensor, tensor: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Scalar product of two vectors, differentiable to any order.

    c = Σ_k a[k] · b[k],  da = dc · b,  db = dc · a

    shapes      input (k), tensor (k) → (); k ≥ 0
    strides     as ``mm``
    dtypes      as ``mm``; the rest is torch.dot
    aliasing    as ``mv``
    rounding    as ``mm``
    errors      torch.dot's
    determinism as ``mm``
    source      as ``mm``

    Autocast does not cast it, as in torch.

    >>> import torch, matmul_grad
    >>> matmul_grad.dot(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0]))
    tensor(11.)
    """
    if out is not None:
        return _run_with_out(dot, (input, tensor), {}, out)
    if not is_dynamo_compiling():
        result = compiled.dot(input, tensor)
        if result is not None:
            return result
    if _is_left_to_torch((1, 1), input, tensor):
        return torch.dot(input, tensor)
    return _dot(input, tensor)


def vdot(input: Tensor, other: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Scalar product of two vectors, the first one conjugated: of real ones ``dot``, of complex ones torch.vdot.

    c = Σ_k conj(a[k]) · b[k]

    shapes      as ``dot``
    strides     as ``dot``
    dtypes      as ``dot``; the rest is torch.vdot
    aliasing    as ``dot``
    rounding    as ``dot``
    errors      torch.vdot's
    determinism as ``dot``
    source      as ``dot``

    >>> import torch, matmul_grad
    >>> matmul_grad.vdot(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0]))
    tensor(11.)
    """
    if out is not None:
        return _run_with_out(vdot, (input, other), {}, out)
    if not is_dynamo_compiling():
        result = compiled.dot(input, other)  # of real numbers, the dtypes that it takes
        if result is not None:
            return result
    if _is_left_to_torch((1, 1), input, other):
        return torch.vdot(input, other)
    return _dot(input, other)


def _dot(one: Tensor, other: Tensor) -> Tensor:
    with torch.autocast(one.device.type, enabled=False) if _is_autocast(one) else contextlib.nullcontext():
        return unsafe_view(_mm(one.unsqueeze(0), other.unsqueeze(1)), ())


def _is_left_to_torch(ranks: tuple[int, int], one: Tensor, other: Tensor, *inputs: Tensor) -> bool:
    """Whether torch's function takes the call, or raises what is wrong with it."""
    if fallback.is_needed_to_compose(one, other, *inputs):
        return True
    if (one.dim(), other.dim()) != ranks or one.shape[-1] != other.shape[0] or not _alike(one, other):
        return True
    for x in inputs:
        if x.dim() > 1 or (x.dim() and x.shape[0] not in (1, one.shape[0])) or not _alike(one, x):
            return True
        if x.shape != one.shape[:1] and one.numel() == 0:
            fallback.require_storages(x)
            return True  # which gives the shape of the input
    if one.dtype not in DTYPES:
        strict_mode.note_fallback(one, other)
        return True
    return False


def _alike(one: Tensor, other: Tensor) -> bool:
    return alike(one, other) if one.is_cuda else one.dtype == other.dtype and one.device == other.device


def _is_autocast(x: Tensor) -> bool:
    return x.device.type in fallback.DEVICES and torch.is_autocast_enabled(x.device.type)


def _own_autocast(x: Tensor) -> Any:
    """torch casts matrix times vector on CUDA, and on CPU not."""
    if x.is_cuda or not _is_autocast(x):
        return contextlib.nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def _run_with_out(function: Any, operands: tuple[Tensor, ...], scales: dict[str, Any], out: Tensor) -> Tensor:
    """By compiled code in ``out``, or a vector in new memory and then in ``out``."""
    name = function.__name__
    if write_compiled("dot" if name == "vdot" else name, operands, scales, out):  # of real numbers they are the same
        return out
    torch_impl = getattr(torch, name)
    if is_left_to_torch(operands, out) or out.dtype != operands[0].dtype or out.device != operands[0].device:
        return torch_impl(*operands, **non_default(scales), out=out)
    if _overlaps_densely(out, operands, scales):
        return torch_impl(*operands, **non_default(scales), out=out)  # raises
    if repeats_an_element(out):  # torch.mv writes to it unseen
        fallback.require_storages(*operands, *([out] if out.shape == operands[-2].shape[:-1] else []))
        strict_mode.note_fallback(*operands[-2:])
        return torch_impl(*operands, **non_default(scales), out=out)
    if out.dtype in DTYPES:
        expect_more(out)
    with torch.autocast(out.device.type, enabled=False):  # as for torch's with out=
        return copy_to(function(*operands, **scales), out)


def _overlaps_densely(out: Tensor, operands: tuple[Tensor, ...], scales: dict[str, Any]) -> bool:
    """Whether torch refuses to write to ``out``: it overlaps the vector that is added and read, and both are dense."""
    *inputs, one, _ = operands
    if not inputs or inputs[0].shape != out.shape or out.shape != one.shape[:-1] or not is_plain(*operands, out):
        return False
    return scales["beta"] != 0 and overlaps_addend(out, inputs) and are_dense(out, *inputs)
