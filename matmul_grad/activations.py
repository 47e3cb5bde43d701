"""``activation(input + A · B)`` as one operator: its kernel, its gradient, and the rules of vmap and autocast.

    C  = f(S)         S = input + A · B; f is applied before the only rounding
    dS = dC · f'      one pass; f' is computed from C for relu and tanh, from S for gelu, gelu_tanh and silu

and then as for addmm: dA = dS · Bᵀ, dB = Aᵀ · dS, dinput = dS summed over what input was expanded by. Beside the
operands one matrix is saved: C, which the caller has anyway, or S. The graph has a node for S and one for f. Under
transforms and in forward mode it has one for both, with S as a second result. Either way a further derivative of f'
goes through the node of S, and nothing is computed twice.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import autocast, fallback, strict_mode
from .activation_formulas import BY_TORCH, gradient_by_torch, one_pass_by_torch, require_name
from .autograd import (
    _below_autograd,
    _Node,
    fused_gradients,
    may_have_tangents,
    outer_levels_record,
    save_operands,
    with_graph,
)
from .flops import count_flops
from .gradient_dtypes import kept_dtype
from .gradients import addend_gradient, flattened
from .kernels.cpu.gemm_args import BY_RESULT
from .ops import (
    DTYPES,
    NAMESPACE,
    TAGS,
    accelerated,
    addition,
    can_be_added,
    has_work,
    library,
    product,
    require_storage,
)
from .vmap import Dims, in_front

ARGUMENTS = "(Tensor? self, Tensor mat1, Tensor mat2, str activation)"


# --- kernels --------------------------------------------------------------------------------------------------------


def argument(self: Tensor | None, mat1: Tensor, mat2: Tensor) -> Tensor:
    """S, by the differentiable operators."""
    return product(mat1, mat2) if self is None else addition(self, mat1, mat2, 1, 1)


def argument_by_torch(self: Tensor | None, mat1: Tensor, mat2: Tensor) -> Tensor:
    return torch.mm(mat1, mat2) if self is None else torch.addmm(self, mat1, mat2)


def addmm_activation_by_torch(self: Tensor | None, mat1: Tensor, mat2: Tensor, activation: str) -> Tensor:
    require_name(activation)
    return BY_TORCH[activation](argument_by_torch(self, mat1, mat2))


def supported(self: Tensor | None, mat1: Tensor, mat2: Tensor) -> bool:
    """Whether these kernels compute f(S)."""
    if mat1.dim() != 2 or not accelerated(mat1, mat2) or not (self is None or can_be_added(self, mat1, mat2)):
        strict_mode.note_fallback(mat1, mat2)
        return False
    return has_work(mat1, mat2)


def _fused(self: Tensor | None, mat1: Tensor, mat2: Tensor, activation: str, pre: Tensor | None) -> Tensor:
    """f(S) of supported operands, and S into ``pre``."""
    require_storage(mat1, mat2, *(() if self is None else (self,)))
    if not mat1.is_cuda:
        from .kernels.native import direct

        return direct.product(mat1, mat2, direct.Epilogue(1.0, 1.0, self, activation, pre))
    from .kernels.gpu import launch

    try:
        return launch.addmm(mat1, mat2, launch.Epilogue(1, 1, self, activation, pre))
    except launch.CannotBuild:  # from now on `launch.supports` is False
        strict_mode.note_fallback(mat1, mat2)
        by_torch = argument_by_torch(self, mat1, mat2)
        return BY_TORCH[activation](by_torch if pre is None else pre.copy_(by_torch))


def _forward(self: Tensor | None, mat1: Tensor, mat2: Tensor, activation: str) -> Tensor:
    require_name(activation)
    if not supported(self, mat1, mat2):
        return addmm_activation_by_torch(self, mat1, mat2, activation)
    return _fused(self, mat1, mat2, activation, None)


def _forward_and_keep(self: Tensor | None, mat1: Tensor, mat2: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """f(S) and S."""
    require_name(activation)
    if not supported(self, mat1, mat2):
        pre = argument_by_torch(self, mat1, mat2)
        return BY_TORCH[activation](pre), pre
    pre = mat1.new_empty(mat1.shape[0], mat2.shape[1])
    return _fused(self, mat1, mat2, activation, pre), pre


def _gradient(grad: Tensor, kept: Tensor, activation: str) -> Tensor:
    require_name(activation)
    plain = grad.device.type == "cpu" and grad.dtype == kept.dtype and grad.layout == kept.layout == torch.strided
    if not (plain and grad.shape == kept.shape and grad.dim() == 2 and grad.numel() and accelerated(grad, kept.t())):
        one_pass = grad.layout == kept.layout == torch.strided and grad.dtype == kept.dtype
        return (one_pass_by_torch if one_pass else gradient_by_torch)(grad, kept, activation).contiguous()
    from .kernels.native import direct

    require_storage(grad, kept)
    return direct.gradient(activation, grad, kept)


def _fake_forward(self: Tensor | None, mat1: Tensor, mat2: Tensor, activation: str) -> Tensor:
    require_name(activation)
    return argument_by_torch(self, mat1, mat2)


def _fake_forward_and_keep(self: Tensor | None, mat1: Tensor, mat2: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    result = _fake_forward(self, mat1, mat2, activation)
    return result, torch.empty_like(result)


def _fake_gradient(grad: Tensor, kept: Tensor, activation: str) -> Tensor:
    return grad.new_empty(grad.shape)


# --- autograd -------------------------------------------------------------------------------------------------------


def shape_and_dtype(input: Tensor | None) -> tuple[torch.Size, torch.dtype] | None:
    """Of the gradient of what is added."""
    return None if input is None else (input.shape, kept_dtype(input))


class AddmmActivation(_Node):
    """``addmm_activation`` as a node of the graph: its result, and for an activation that needs it S."""

    @staticmethod
    def forward(ctx: Any, input: Tensor | None, self: Tensor, mat2: Tensor, activation: str) -> Any:
        _, needs_self, needs_mat2, _ = ctx.needs_input_grad
        ctx.set_materialize_grads(False)
        ctx.activation, ctx.input = activation, shape_and_dtype(input)
        by_result = activation in BY_RESULT
        operator = _addmm_activation if by_result else _addmm_activation_kept
        levels = torch._C._are_functorch_transforms_active()
        with outer_levels_record() if levels else _below_autograd():
            outputs = operator(input, self, mat2, activation)
        kept = outputs if by_result else outputs[1]
        save_operands(ctx, self, mat2, needs_self, needs_mat2, kept)
        if may_have_tangents():
            ctx.save_for_forward(self, mat2, kept)
        return outputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_kept: Tensor | None = None) -> tuple[Tensor | None, ...]:
        self, mat2, kept = ctx.saved_tensors
        terms = [] if grad is None else [_activation_gradient(grad, kept, ctx.activation)]
        if grad_kept is not None:
            terms.append(grad_kept)
        if not terms:
            return None, None, None, None
        total = sum(terms[1:], terms[0])
        needs_input, *needs = ctx.needs_input_grad[:3]
        dinput = addend_gradient(total, *ctx.input) if needs_input else None
        dself, dmat2 = fused_gradients(total, self, mat2, (needs[0], needs[1]), ctx.column_major)
        return dinput, dself, dmat2, None

    @staticmethod
    def jvp(ctx: Any, dinput: Tensor | None, dself: Tensor | None, dmat2: Tensor | None, _: Any) -> Any:
        """dS = dinput + dA · B + A · dB,  dC = dS · f'"""
        self, mat2, kept = ctx.saved_tensors
        functorch = torch._C._are_functorch_transforms_active()
        with outer_levels_record() if functorch else contextlib.nullcontext():
            terms = [] if dinput is None else [dinput]
            if dself is not None:
                terms.append(product(dself, mat2))
            if dmat2 is not None:
                terms.append(product(self, dmat2))
            total = sum(terms[1:], terms[0]).expand(kept.shape)
            tangent = gradient_by_torch(total, kept, ctx.activation)
            return tangent if ctx.activation in BY_RESULT else (tangent, total)


class Argument(_Node):
    """S, which is computed already, as a node of the graph."""

    @staticmethod
    def forward(ctx: Any, input: Tensor | None, self: Tensor, mat2: Tensor, pre: Tensor) -> Tensor:
        _, needs_self, needs_mat2, _ = ctx.needs_input_grad
        save_operands(ctx, self, mat2, needs_self, needs_mat2)
        ctx.input = shape_and_dtype(input)
        return pre.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        self, mat2 = ctx.saved_tensors
        needs_input, *needs = ctx.needs_input_grad[:3]
        dinput = addend_gradient(grad, *ctx.input) if needs_input else None
        return dinput, *fused_gradients(grad, self, mat2, (needs[0], needs[1]), ctx.column_major), None


class Activated(_Node):
    """f(S), which is computed already, as a node of the graph."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, result: Tensor, activation: str) -> Tensor:
        ctx.activation, result = activation, result.detach()
        ctx.save_for_backward(result if activation in BY_RESULT else pre)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (kept,) = ctx.saved_tensors
        return _activation_gradient(grad, kept, ctx.activation), None, None


_record: Callable[..., Any] = AddmmActivation.apply  # type: ignore[attr-defined]  # which torch adds to the base
record_argument: Callable[..., Tensor] = Argument.apply  # type: ignore[attr-defined]  # likewise
_record_activated: Callable[..., Tensor] = Activated.apply  # type: ignore[attr-defined]  # likewise


def in_two_nodes(
    self: Tensor | None,
    mat1: Tensor,
    mat2: Tensor,
    activation: str,
    node_of_argument: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """The second node releases dC and what it has kept before the first one multiplies: one node holds both till then.

    Between them stands S, or where nobody reads that, a number expanded to its shape. ``node_of_argument`` makes
    that of S, if it is not that of ``addmm``.
    """
    with _below_autograd():
        if activation in BY_RESULT:
            result = _addmm_activation(self, mat1, mat2, activation)
            pre = result.new_empty(1).expand(result.shape)
        else:
            result, pre = _addmm_activation_kept(self, mat1, mat2, activation)
    node = record_argument(self, mat1, mat2, pre) if node_of_argument is None else node_of_argument(pre)
    return _record_activated(node, result, activation)


def is_recorded(*tensors: Tensor | None) -> bool:
    needed = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    return needed or may_have_tangents()


def is_own(self: Tensor | None, mat1: Tensor, mat2: Tensor) -> bool:
    """Dense real matrices of one dtype, as for the other operators; the graph of others is that of torch's."""
    operands = [x for x in (self, mat1, mat2) if x is not None]
    return (
        mat1.dim() == mat2.dim() == 2
        and mat1.dtype in DTYPES
        and all(x.dtype == mat1.dtype and x.layout == torch.strided and not x.is_nested for x in operands)
    )


def _autograd(self: Tensor | None, mat1: Tensor, mat2: Tensor, activation: str) -> Tensor:
    require_name(activation)
    if not is_own(self, mat1, mat2):
        strict_mode.note_fallback(mat1, mat2)
        return addmm_activation_by_torch(self, mat1, mat2, activation)
    if not is_recorded(self, mat1, mat2):
        with _below_autograd():
            return _addmm_activation(self, mat1, mat2, activation)
    if not may_have_tangents() and all(x is None or type(x) in fallback.PLAIN for x in (self, mat1, mat2)):
        return in_two_nodes(self, mat1, mat2, activation)
    outputs = with_graph(_record, self, mat1, mat2, activation)
    return outputs if activation in BY_RESULT else outputs[0]


def _autograd_and_keep(self: Tensor | None, mat1: Tensor, mat2: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """At an outer level of transforms, where both results are needed."""
    require_name(activation)
    if not is_own(self, mat1, mat2) or (is_recorded(self, mat1, mat2) and activation in BY_RESULT):
        pre = argument(self, mat1, mat2)
        return BY_TORCH[activation](pre), pre
    if not is_recorded(self, mat1, mat2):
        with _below_autograd():
            return _addmm_activation_kept(self, mat1, mat2, activation)
    result: tuple[Tensor, Tensor] = with_graph(_record, self, mat1, mat2, activation)  # type: ignore[assignment]  # two tensors
    return result


def _gradient_autograd(grad: Tensor, kept: Tensor, activation: str) -> Tensor:
    require_name(activation)
    if is_recorded(grad, kept):
        return gradient_by_torch(grad, kept, activation)
    with _below_autograd():
        return _activation_gradient(grad, kept, activation)


# --- vmap -----------------------------------------------------------------------------------------------------------


def _batched_argument(info: Any, in_dims: Dims, *operands: Tensor | None) -> Tensor:
    front = (None if x is None else in_front(x, dim, info.batch_size, 2) for x, dim in zip(operands, in_dims))
    self, mat1, mat2 = front
    assert mat1 is not None and mat2 is not None
    return argument(self, mat1, mat2)


def _rows_alone(in_dims: Dims) -> bool:
    """Whether mat1 is batched alone: its items are more rows."""
    return in_dims[1] is not None and in_dims[0] is None and in_dims[2] is None


def _rule(info: Any, in_dims: Dims, self: Any, mat1: Tensor, mat2: Tensor, activation: str) -> tuple[Tensor, int]:
    if _rows_alone(in_dims) and (self is None or self.dim() < 2):
        items = mat1.movedim(in_dims[1] or 0, 0)
        rows = _addmm_activation(self, items.flatten(0, 1), mat2, activation)
        return rows.unflatten(0, items.shape[:2]), 0
    return BY_TORCH[activation](_batched_argument(info, in_dims, self, mat1, mat2)), 0


def _rule_and_keep(info: Any, in_dims: Dims, self: Any, mat1: Tensor, mat2: Tensor, activation: str) -> Any:
    if _rows_alone(in_dims) and (self is None or self.dim() < 2):
        items = mat1.movedim(in_dims[1] or 0, 0)
        both = _addmm_activation_kept(self, items.flatten(0, 1), mat2, activation)
        return tuple(rows.unflatten(0, items.shape[:2]) for rows in both), (0, 0)
    pre = _batched_argument(info, in_dims, self, mat1, mat2)
    return (BY_TORCH[activation](pre), pre), (0, 0)


def _gradient_rule(info: Any, in_dims: Dims, grad: Tensor, kept: Tensor, activation: str) -> tuple[Tensor, int]:
    front = (in_front(x, dim, info.batch_size, 2) for x, dim in zip((grad, kept), in_dims))
    items = [x.expand(info.batch_size, *x.shape[1:]) for x in front]
    result = _activation_gradient(*(x.flatten(0, 1) for x in items), activation)
    return result.unflatten(0, items[0].shape[:2]), 0


# --- registration ---------------------------------------------------------------------------------------------------


def register_operator(name: str, schema: str, kernels: tuple[Callable[..., Any], ...]) -> Any:
    """kernels: of every device, of Autograd, of tracing and of vmap."""
    composite, recorded, fake, rule = kernels
    library.define(f"{name}{schema}", tags=TAGS)
    library.impl(name, composite, "CompositeExplicitAutograd")
    library.impl(name, recorded, "Autograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=library)
    torch.library.register_vmap(f"{NAMESPACE}::{name}", rule, lib=library)
    return getattr(torch.ops.matmul_grad, name).default


def _flops(_: Any, mat1: Any, mat2: Any, *__: Any) -> int:
    return 2 * math.prod(mat1) * mat2[-1]


_addmm_activation = register_operator(
    "addmm_activation", f"{ARGUMENTS} -> Tensor", (_forward, _autograd, _fake_forward, _rule)
)
_addmm_activation_kept = register_operator(
    "_addmm_activation_kept",
    f"{ARGUMENTS} -> (Tensor, Tensor)",
    (_forward_and_keep, _autograd_and_keep, _fake_forward_and_keep, _rule_and_keep),
)
_activation_gradient = register_operator(
    "_activation_gradient",
    "(Tensor grad, Tensor kept, str activation) -> Tensor",
    (_gradient, _gradient_autograd, _fake_gradient, _gradient_rule),
)
count_flops(torch.ops.matmul_grad.addmm_activation, _flops)
count_flops(torch.ops.matmul_grad._addmm_activation_kept, _flops)
autocast.register_operator("addmm_activation")


def linear_activation(input: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """``linear`` of operands that ``functional.linear`` has found to fit."""
    rows = flattened(input, 1)
    result = _addmm_activation(bias, rows, weight.t(), activation)
    return (
        result
        if input.dim() == 2
        else torch.ops.aten._unsafe_view.default(result, (*input.shape[:-1], weight.shape[0]))
    )
