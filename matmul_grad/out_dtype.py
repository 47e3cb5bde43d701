"""Products of 16-bit operands with a float32 result: the sums, without the rounding to 16 bits.

    C = beta · input + alpha · (A · B)      A and B of 16 bits, C of float32, input of either

The operators mm_dtype, bmm_dtype, addmm_dtype and baddbmm_dtype have the schemas of aten's overloads ``dtype``, which
exist on CUDA alone and without a gradient. A gradient is the product of dC and the other operand in float32, which
holds both, and is rounded once, to the dtype of its operand, or not at all where that is kept in float32:

    dA = alpha · dC · Bᵀ,  dB = alpha · Aᵀ · dC,  dinput = beta · dC      summed over what input was expanded by

Every further derivative comes from the same lines.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import fallback, sharding, strict_mode
from .autograd import _below_autograd, _Node, may_have_tangents, outer_levels_record, scaled, with_graph
from .flops import count_flops
from .gradient_dtypes import NARROW, is_kept_in_float32
from .gradients import gradients
from .kernels.native.op_table import OWN
from .ops import (
    NAMESPACE,
    SCHEMAS,
    TAGS,
    accelerated,
    addition,
    compute,
    has_work,
    library,
    product,
    rank_of,
    require_storage,
    torch_impl_of,
)
from .vmap import Dims, in_front

WIDE = torch.float32
WRONG = "out_dtype must be the same as input dtype or fp32 for fp16/bf16 inputs"  # torch's

Input = Tensor | None


def operator_of(name: str) -> Any:
    return getattr(torch.ops.matmul_grad, f"{name}_dtype").default


def multiply(input: Input, mat1: Tensor, mat2: Tensor, beta: float = 1, alpha: float = 1) -> Tensor:
    """The differentiable operator for these operands, with a float32 result."""
    batched = mat1.dim() == 3
    if input is None:
        return operator_of("bmm" if batched else "mm")(mat1, mat2, WIDE)
    name = "baddbmm" if batched else "addmm"
    return operator_of(name)(input, mat1, mat2, WIDE, beta=beta, alpha=alpha)


def converted(input: Input, mat1: Tensor, mat2: Tensor, beta: float = 1, alpha: float = 1) -> Tensor:
    """The differentiable product of operands that are converted to float32: the same terms, summed in another order."""
    a, b = mat1.to(WIDE), mat2.to(WIDE)
    return scaled(product(a, b), alpha) if input is None else addition(input.to(WIDE), a, b, beta, alpha)


# --- kernels --------------------------------------------------------------------------------------------------------


def _operands(name: str, arguments: tuple[Any, ...]) -> tuple[Input, Tensor, Tensor, torch.dtype]:
    """input or None, mat1, mat2, out_dtype"""
    return arguments if "add" in name else (None, *arguments)


def _raise_or_shape(name: str, input: Input, mat1: Tensor, mat2: Tensor, scales: dict[str, float]) -> Tensor:
    """torch's product, for its errors and its shape."""
    inputs = () if input is None else (input.to(mat1.dtype) if input.dtype == WIDE else input,)
    result: Tensor = torch_impl_of(name)(*inputs, mat1, mat2, **scales)
    return result


def _expands(input: Tensor, mat1: Tensor, mat2: Tensor) -> bool:
    shape = (*mat1.shape[:-1], mat2.shape[-1])
    fits = all(size in (1, whole) for size, whole in zip(reversed(input.shape), reversed(shape)))
    return input.layout == torch.strided and input.dim() <= len(shape) and fits and input.device == mat1.device


def make_kernel(name: str) -> Callable[..., Tensor]:
    """Every device, below autograd: these kernels where they support the operands, and else torch's."""

    def kernel(*arguments: Any, **scales: Any) -> Tensor:
        input, mat1, mat2, out_dtype = _operands(name, arguments)
        require_wide(mat1, out_dtype)
        fits = input is None or (input.dtype in (mat1.dtype, WIDE) and _expands(input, mat1, mat2))
        supported = mat1.dim() == rank_of(name) and fits and accelerated(mat1, mat2)
        if not supported or not has_work(mat1, mat2, **scales):
            if not supported:
                strict_mode.note_fallback(mat1, mat2)
            if mat1.device.type != "cpu":
                return getattr(torch.ops.aten, name).dtype(*arguments, **scales)
            _raise_or_shape(name, input, mat1, mat2, scales)
            return converted(input, mat1, mat2, **scales)
        if input is not None:
            require_storage(input)
        out = mat1.new_empty((*mat1.shape[:-1], mat2.shape[-1]), dtype=WIDE)
        return compute(mat1, mat2, None if input is None else input.to(WIDE), **scales, out=out)

    return kernel


def require_wide(mat: Tensor, out_dtype: torch.dtype) -> None:
    if out_dtype != WIDE or mat.dtype not in NARROW:
        raise RuntimeError(WRONG)


def make_fake(name: str) -> Callable[..., Tensor]:
    def fake(*arguments: Any, **scales: Any) -> Tensor:
        input, mat1, mat2, out_dtype = _operands(name, arguments)
        require_wide(mat1, out_dtype)
        return _raise_or_shape(name, input, mat1, mat2, scales).to(WIDE)

    return fake


class Wide(_Node):
    """A product with a float32 result as a node of the graph."""

    @staticmethod
    def forward(ctx: Any, input: Input, mat1: Tensor, mat2: Tensor, beta: float, alpha: float) -> Tensor:
        _, needs_mat1, needs_mat2, *_ = ctx.needs_input_grad
        ctx.save_for_backward(mat1 if needs_mat2 else None, mat2 if needs_mat1 else None)
        ctx.dtypes = [WIDE if is_kept_in_float32(x) else x.dtype for x in (mat1, mat2)]
        ctx.beta, ctx.alpha = beta, alpha
        ctx.input = None if input is None else (input.shape, input.dtype)
        if may_have_tangents():
            ctx.save_for_forward(mat1, mat2)
        functorch = torch._C._are_functorch_transforms_active()
        with outer_levels_record() if functorch else _below_autograd():
            return multiply(input, mat1, mat2, beta, alpha)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        mat1, mat2 = (None if x is None else x.to(WIDE) for x in ctx.saved_tensors)
        needs_input, *needs = ctx.needs_input_grad[:3]
        both = gradients(grad, mat1, mat2, (needs[0], needs[1]))
        dmat1, dmat2 = (None if x is None else scaled(x, ctx.alpha).to(kept) for x, kept in zip(both, ctx.dtypes))
        dinput = scaled(grad, ctx.beta).sum_to_size(ctx.input[0]).to(ctx.input[1]) if needs_input else None
        return dinput, dmat1, dmat2, None, None

    @staticmethod
    def jvp(ctx: Any, dinput: Input, dmat1: Input, dmat2: Input, *_: Any) -> Tensor:
        """dC = beta · dinput + alpha · (dA · B + A · dB)"""
        mat1, mat2 = ctx.saved_tensors
        functorch = torch._C._are_functorch_transforms_active()
        with outer_levels_record() if functorch else contextlib.nullcontext():
            terms = [] if dinput is None else [scaled(dinput.to(WIDE), ctx.beta)]
            if dmat1 is not None:
                terms.append(scaled(multiply(None, dmat1, mat2), ctx.alpha))
            if dmat2 is not None:
                terms.append(scaled(multiply(None, mat1, dmat2), ctx.alpha))
            return sum(terms[1:], terms[0]).expand(*mat1.shape[:-1], mat2.shape[-1])


_record: Callable[..., Tensor] = Wide.apply  # type: ignore[attr-defined]  # which torch adds to the base


def make_autograd_kernel(name: str) -> Callable[..., Tensor]:
    def kernel(*arguments: Any, **scales: Any) -> Tensor:
        input, mat1, mat2, out_dtype = _operands(name, arguments)
        if out_dtype == mat1.dtype:
            with torch.autocast(mat1.device.type, enabled=False):
                return getattr(torch.ops.matmul_grad, name).default(*arguments[:-1], **scales)
        needed = any(x is not None and x.requires_grad for x in (input, mat1, mat2))
        if not (torch.is_grad_enabled() and needed) and not may_have_tangents():
            with _below_autograd():
                return operator_of(name)(*arguments, **scales)
        require_wide(mat1, out_dtype)
        return with_graph(_record, input, mat1, mat2, scales.get("beta", 1.0), scales.get("alpha", 1.0))

    return kernel


# --- vmap, registration, the public functions -----------------------------------------------------------------------


def _flops(mat1: Any, mat2: Any, *_: Any) -> int:
    return 2 * math.prod(mat1) * mat2[-1]


def _flops_of_addmm(_: Any, mat1: Any, mat2: Any, *__: Any) -> int:
    return _flops(mat1, mat2)


def make_rule(name: str) -> Callable[..., Any]:
    rank = rank_of(name)

    def rule(info: Any, in_dims: Dims, *arguments: Any, **scales: Any) -> tuple[Tensor, int]:
        """One batch more, which joins the one that is there."""
        front = [in_front(x, dim, info.batch_size, rank) for x, dim in zip(arguments[:-1], in_dims)]
        if rank == 3:
            batch = front[-1].shape[:2]
            front = [x.expand(*batch, *x.shape[2:]).flatten(0, 1) for x in front]
        mat1, mat2 = front[-2:]
        result = multiply(front[0] if len(front) == 3 else None, mat1, mat2, **scales)
        return (result if rank == 2 else result.unflatten(0, batch)), 0

    return rule


def with_out_dtype(schema: str) -> str:
    """A schema with the argument behind the matrices.

    >>> with_out_dtype("(Tensor self, Tensor mat2) -> Tensor")
    '(Tensor self, Tensor mat2, ScalarType out_dtype) -> Tensor'
    """
    end = ", *" if ", *" in schema else ")"
    return schema.replace(end, f", ScalarType out_dtype{end}", 1)


def _register() -> None:
    for op in OWN:
        name = f"{op.name}_dtype"
        library.define(f"{name}{with_out_dtype(SCHEMAS[op.name])}", tags=TAGS)
        library.impl(name, make_kernel(op.name), "CompositeExplicitAutograd")
        library.impl(name, make_autograd_kernel(op.name), "Autograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", make_fake(op.name), lib=library)
        torch.library.register_vmap(f"{NAMESPACE}::{name}", make_rule(op.name), lib=library)
        count_flops(getattr(torch.ops.matmul_grad, name), _flops_of_addmm if op.has_addend else _flops)


_register()
sharding.register(sharding.register_out_dtype_with)


def call(name: str, operands: tuple[Any, ...], scales: dict[str, float], out_dtype: torch.dtype) -> Tensor | None:
    """A public function with an ``out_dtype``; None where torch's takes the call."""
    if operands[-1].device.type != "cpu":
        strict_mode.note_fallback(*operands[-2:])
        return None
    if any(fallback.is_sharded(x) for x in operands):
        input, mat1, mat2 = operands if len(operands) == 3 else (None, *operands)
        return converted(input, mat1, mat2, **scales)
    return operator_of(name)(*operands, out_dtype, **scales)
