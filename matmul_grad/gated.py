"""``activation(gate_input + A · G) · (input + A · B)`` as one operator: SwiGLU, GEGLU and their like.

    C  = f(P) · S              P = gate_input + A · G, S = input + A · B; C is rounded once
    dP = dC · S · f'(P)        dS = dC · f(P)       both in one pass

and then as for addmm. Beside the operands P and S are saved, each rounded once. The graph has a node for each of P, S
and C, so that dP is released before the gradients of the other product are allocated, and a further derivative goes
through their nodes. Under transforms and in forward mode the operator is composed of ``addmm`` or ``mm`` and torch's
functions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from . import autocast, fallback, sharding, strict_mode
from .activation_formulas import BY_TORCH, GRADIENTS, require_name
from .activations import argument, argument_by_torch, is_own, is_recorded, record_argument, register_operator, supported
from .autograd import _below_autograd, _Node, may_have_tangents, with_graph
from .fallback import alike
from .flops import count_flops
from .functional import linear
from .gradients import flattened
from .kernels.cpu.gemm_args import BY_RESULT
from .ops import accelerated, compute, require_storage
from .vmap import Dims, in_front
from .weight_gradients import Layer, is_direct, layer_of, record

ARGUMENTS = "(Tensor? self, Tensor? gate_self, Tensor mat1, Tensor mat2, Tensor gate, str activation)"
Input = Tensor | None
Three = tuple[Tensor, Tensor, Tensor]


def gated_linear(
    input: Tensor,
    weight: Tensor,
    gate_weight: Tensor,
    bias: Tensor | None = None,
    gate_bias: Tensor | None = None,
    activation: str = "silu",
) -> Tensor:
    """A linear layer times the activation of another one (SwiGLU, GEGLU, ReGLU); differentiable to any order.

    C = activation(A · Gᵀ + gate_bias) · (A · Wᵀ + bias)

    shapes      input (…, k), weight and gate_weight (n, k), bias and gate_bias (n) or (1) → (…, n)
    strides     as ``linear``; the two halves of one weight are two views of it, and no copies
    dtypes      as ``linear``
    aliasing    the result is new memory
    rounding    as ``addmm``, after the multiplication; A · Gᵀ + gate_bias is rounded too
    errors      torch.nn.functional.linear's; ValueError for an unknown activation, or weights of different shapes
    determinism as ``mm``
    source      kernels/cpu/epilogue.py, kernels/cpu/activation.py

    ``activation`` is one that ``linear`` takes. On a CPU it is computed, and multiplied by, where the second product is
    stored, and backward keeps both products. The feed-forward layer of Llama is
    ``linear(gated_linear(x, up_proj, gate_proj), down_proj)``.

    >>> import torch, matmul_grad
    >>> x, up, gate = torch.ones(2, 3), torch.full((1, 3), 2.0), torch.tensor([[1.0, 1, -5], [1, 1, 2]])
    >>> matmul_grad.gated_linear(x, up.expand(2, 3), gate, activation="relu").tolist()
    [[0.0, 24.0], [0.0, 24.0]]
    """
    require_name(activation)
    operands = [x for x in (input, weight, gate_weight, bias, gate_bias) if x is not None]
    if isinstance(weight, Tensor) and isinstance(gate_weight, Tensor) and weight.shape != gate_weight.shape:
        shapes = f"{tuple(weight.shape)} and {tuple(gate_weight.shape)}"
        raise ValueError(f"weight and gate_weight must have the same shape, got {shapes}")
    composes = fallback.is_needed_to_compose(*operands) or any(fallback.is_sharded(x) for x in operands)
    if not composes:
        fallback.require_storages(*operands)
    fits = not composes and input.dim() > 0 and weight.dim() == 2 and input.shape[-1] == weight.shape[1]
    if not (fits and all(alike(input, x) for x in operands) and _are_rows(weight.shape[0], bias, gate_bias)):
        return BY_TORCH[activation](linear(input, gate_weight, gate_bias)) * linear(input, weight, bias)
    rows = flattened(input, 1)
    found = _gated_to_parameters(rows, (weight, bias), (gate_weight, gate_bias), activation)
    result: Tensor = (
        _addmm_gated(bias, gate_bias, rows, weight.t(), gate_weight.t(), activation) if found is None else found
    )
    return result if input.dim() == 2 else fallback.unsafe_view(result, (*input.shape[:-1], weight.shape[0]))


def _are_rows(n: int, *biases: Input) -> bool:
    return all(bias is None or (bias.dim() == 1 and bias.shape[0] in (1, n)) for bias in biases)


# --- kernels --------------------------------------------------------------------------------------------------------


def _arguments(
    by: Callable[..., Tensor], self: Input, gate_self: Input, mat1: Tensor, mat2: Tensor, gate: Tensor
) -> tuple[Tensor, Tensor]:
    """P and S, by the product and addition of ``by``."""
    return by(gate_self, mat1, gate), by(self, mat1, mat2)


def addmm_gated_by_torch(*arguments: Any) -> Tensor:
    *operands, activation = arguments
    require_name(activation)
    pre, value = _arguments(argument_by_torch, *operands)
    return BY_TORCH[activation](pre) * value


def composed(*arguments: Any) -> Three:
    """C, P and S, by the differentiable operators and torch's functions."""
    *operands, activation = arguments
    pre, value = _arguments(argument, *operands)
    return BY_TORCH[activation](pre) * value, pre, value


def _supported(self: Input, gate_self: Input, mat1: Tensor, mat2: Tensor, gate: Tensor) -> bool:
    """Whether these kernels compute both products; they multiply them on a CPU."""
    return supported(self, mat1, mat2) and supported(gate_self, mat1, gate) and mat2.shape == gate.shape


def _forward(self: Input, gate_self: Input, mat1: Tensor, mat2: Tensor, gate: Tensor, activation: str) -> Tensor:
    require_name(activation)
    operands = self, gate_self, mat1, mat2, gate
    if not _supported(*operands):
        return addmm_gated_by_torch(*operands, activation)
    if is_on_gpu(mat1):
        return _on_gpu(*operands, activation, keep=False)[0]
    pre = compute(mat1, gate, gate_self)
    return _multiply_into(pre, self, mat1, mat2, activation, pre, None)


def _forward_and_keep(*arguments: Any) -> Three:
    """C, P and S."""
    *operands, activation = arguments
    require_name(activation)
    self, gate_self, mat1, mat2, gate = operands
    if not _supported(*operands):
        pre, value = _arguments(argument_by_torch, *operands)
        return BY_TORCH[activation](pre) * value, pre, value
    if is_on_gpu(mat1):
        return _on_gpu(self, gate_self, mat1, mat2, gate, activation, keep=True)
    pre = compute(mat1, gate, gate_self)
    value, out = torch.empty_like(pre), torch.empty_like(pre)
    return _multiply_into(out, self, mat1, mat2, activation, pre, value), pre, value


def is_on_gpu(tensor: Tensor) -> bool:
    return tensor.is_cuda


def _on_gpu(
    self: Input, gate_self: Input, mat1: Tensor, mat2: Tensor, gate: Tensor, activation: str, *, keep: bool
) -> Any:
    """C, and with ``keep`` P and S: in one launch, or of two products where those are predicted to be faster."""
    from .kernels.gpu import gated, launch

    require_storage(mat1, mat2, gate, *(x for x in (self, gate_self) if x is not None))
    try:
        found = gated.product(gated.Gated(mat1, mat2, gate, self, gate_self, activation, keep))
        if found is not None:
            return found
    except launch.CannotBuild:
        strict_mode.note_fallback(mat1, mat2)
    pre, value = compute(mat1, gate, gate_self), compute(mat1, mat2, self)
    return BY_TORCH[activation](pre) * value, pre, value


def _multiply_into(
    out: Tensor, self: Input, mat1: Tensor, mat2: Tensor, activation: str, gate: Tensor, pre: Input
) -> Tensor:
    """out = f(gate) · S; out may be the gate, of which each element is read where it is written."""
    from .kernels.native import direct

    require_storage(mat1, mat2, *(() if self is None else (self,)))
    return direct.product(mat1, mat2, direct.Epilogue(1.0, 1.0, self, activation, pre, gate), out)


def gated_gradients_by_torch(grad: Tensor, pre: Tensor, value: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """dP and dS in torch's functions; 16-bit operands are computed with in float32, as in the kernel."""
    wide = torch.float32 if grad.dtype.itemsize == 2 else grad.dtype
    grad_, pre_, value_ = grad.to(wide), pre.to(wide), value.to(wide)
    activated = BY_TORCH[activation](pre_)
    dpre = GRADIENTS[activation](grad_ * value_, activated if activation in BY_RESULT else pre_)
    return dpre.to(grad.dtype), (grad_ * activated).to(grad.dtype)


def _gradients(grad: Tensor, pre: Tensor, value: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    require_name(activation)
    three = grad, pre, value
    alike_ = all(x.dtype == grad.dtype and x.layout == torch.strided and x.shape == grad.shape for x in three)
    if not (alike_ and grad.device.type == "cpu" and grad.dim() == 2 and grad.numel() and _are_accelerated(*three)):
        dpre, dvalue = gated_gradients_by_torch(grad, pre, value, activation)
        return dpre.contiguous(), dvalue.contiguous()
    from .kernels.native import direct

    require_storage(*three)
    return direct.gradients_of_gated(activation, grad, pre, value)


def _are_accelerated(grad: Tensor, pre: Tensor, value: Tensor) -> bool:
    return accelerated(grad, pre.t()) and accelerated(grad, value.t())


def _fake_forward(*arguments: Any) -> Tensor:
    require_name(arguments[-1])
    pre, value = _arguments(argument_by_torch, *arguments[:-1])
    return pre * value


def _fake_forward_and_keep(*arguments: Any) -> Three:
    result = _fake_forward(*arguments)
    return result, torch.empty_like(result), torch.empty_like(result)


def _fake_gradients(grad: Tensor, pre: Tensor, value: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    return grad.new_empty(grad.shape), grad.new_empty(grad.shape)


# --- autograd -------------------------------------------------------------------------------------------------------


class Gated(_Node):
    """f(P) · S, which is computed already, as a node of the graph."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, value: Tensor, result: Tensor, activation: str) -> Tensor:
        ctx.activation = activation
        ctx.save_for_backward(pre, value)
        return result.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *_gated_gradients(grad, *ctx.saved_tensors, ctx.activation), None, None


_record_gated: Callable[..., Tensor] = Gated.apply  # type: ignore[attr-defined]  # which torch adds to the base


def _autograd_and_keep(*arguments: Any) -> Three:
    *operands, activation = arguments
    require_name(activation)
    if not _are_own(*operands):
        strict_mode.note_fallback(*operands[2:4])
        pre, value = _arguments(argument_by_torch, *operands)
        return BY_TORCH[activation](pre) * value, pre, value
    recorded = is_recorded(*operands)
    if recorded and may_have_tangents():
        return composed(*arguments)
    with _below_autograd():
        result, pre, value = _addmm_gated_kept(*arguments)
    if recorded:
        self, gate_self, mat1, mat2, gate = operands
        pre = with_graph(record_argument, gate_self, mat1, gate, pre)
        value = with_graph(record_argument, self, mat1, mat2, value)
        result = with_graph(_record_gated, pre, value, result, activation)
    return result, pre, value


def _are_own(self: Input, gate_self: Input, mat1: Tensor, mat2: Tensor, gate: Tensor) -> bool:
    return is_own(self, mat1, mat2) and is_own(gate_self, mat1, gate)


def _autograd(*arguments: Any) -> Tensor:
    if is_recorded(*arguments[:-1]) or not _are_own(*arguments[:-1]):
        return _autograd_and_keep(*arguments)[0]
    with _below_autograd():
        result: Tensor = _addmm_gated(*arguments)
    return result


def _gradients_autograd(grad: Tensor, pre: Tensor, value: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    require_name(activation)
    if is_recorded(grad, pre, value):
        return gated_gradients_by_torch(grad, pre, value, activation)
    with _below_autograd():
        both: tuple[Tensor, Tensor] = _gated_gradients(grad, pre, value, activation)
    return both


def _gated_to_parameters(
    rows: Tensor, layer: tuple[Tensor, Input], gate: tuple[Tensor, Input], activation: str
) -> Tensor | None:
    """``gated_linear`` whose weight gradients are stored as they are kept; None where none is kept in float32."""
    found = [layer_of(rows, *each, False) if is_direct(rows, *each) else None for each in (layer, gate)]
    kept = next((each for each in found if each is not None), None)
    if kept is None:
        return None
    rows = kept[0]
    halves = [each[1] if each else _cast(*one, rows.dtype) for one, each in zip((layer, gate), found)]
    (weight, bias), (gate_weight, gate_bias) = ((half.weight, half.bias) for half in halves)
    with _below_autograd():
        result, pre, value = _addmm_gated_kept(bias, gate_bias, rows, weight.t(), gate_weight.t(), activation)
    nodes = [
        record(rows, *one, replace(half, computed=computed))
        if each
        else record_argument(half.bias, rows, half.weight.t(), computed)
        for one, each, half, computed in zip((layer, gate), found, halves, (value, pre))
    ]
    return _record_gated(nodes[1], nodes[0], result, activation)


def _cast(weight: Tensor, bias: Input, dtype: torch.dtype) -> Layer:
    return Layer(weight.to(dtype), None if bias is None else bias.to(dtype), False)


# --- vmap -----------------------------------------------------------------------------------------------------------


def _rule_and_keep(info: Any, in_dims: Dims, *arguments: Any) -> tuple[Three, tuple[int, int, int]]:
    *operands, activation = arguments
    self, gate_self, mat1, mat2, gate = operands
    alone = all(dim is None for dim in (*in_dims[:2], *in_dims[3:5])) and _have_no_rows(self, gate_self)
    if alone:  # mat1 is batched, and its items are more rows
        items = mat1.movedim(in_dims[2] or 0, 0)
        three = _addmm_gated_kept(self, gate_self, items.flatten(0, 1), mat2, gate, activation)
        return tuple(x.unflatten(0, items.shape[:2]) for x in three), (0, 0, 0)
    front = [None if x is None else in_front(x, dim, info.batch_size, 2) for x, dim in zip(operands, in_dims)]
    return composed(*front, activation), (0, 0, 0)


def _have_no_rows(*inputs: Input) -> bool:
    return all(x is None or x.dim() < 2 for x in inputs)


def _rule(info: Any, in_dims: Dims, *arguments: Any) -> tuple[Tensor, int]:
    return _rule_and_keep(info, in_dims, *arguments)[0][0], 0


def _gradients_rule(info: Any, in_dims: Dims, *arguments: Any) -> tuple[tuple[Tensor, ...], tuple[int, int]]:
    *three, activation = arguments
    front = (in_front(x, dim, info.batch_size, 2) for x, dim in zip(three, in_dims))
    items = [x.expand(info.batch_size, *x.shape[1:]) for x in front]
    both = _gated_gradients(*(x.flatten(0, 1) for x in items), activation)
    return tuple(x.unflatten(0, items[0].shape[:2]) for x in both), (0, 0)


# --- registration ---------------------------------------------------------------------------------------------------


def _flops(_: Any, __: Any, mat1: Any, mat2: Any, *___: Any) -> int:
    return 4 * math.prod(mat1) * mat2[-1]


_addmm_gated = register_operator("addmm_gated", f"{ARGUMENTS} -> Tensor", (_forward, _autograd, _fake_forward, _rule))
_addmm_gated_kept = register_operator(
    "_addmm_gated_kept",
    f"{ARGUMENTS} -> (Tensor, Tensor, Tensor)",
    (_forward_and_keep, _autograd_and_keep, _fake_forward_and_keep, _rule_and_keep),
)
_gated_gradients = register_operator(
    "_gated_gradients",
    "(Tensor grad, Tensor pre, Tensor value, str activation) -> (Tensor, Tensor)",
    (_gradients, _gradients_autograd, _fake_gradients, _gradients_rule),
)
count_flops(torch.ops.matmul_grad.addmm_gated, _flops)
count_flops(torch.ops.matmul_grad._addmm_gated_kept, _flops)
autocast.register_operator("addmm_gated")
sharding.register(sharding.register_activated_with)
