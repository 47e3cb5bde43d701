"""Functions composed of the operators: ``matmul`` and ``linear``."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from . import fallback, strict_mode
from .activation_formulas import BY_TORCH, require_name
from .activations import in_two_nodes, linear_activation
from .api import mm
from .broadcast import broadcast_product, is_broadcastable
from .fallback import alike, unsafe_view
from .gradients import flattened
from .ops import COMPOSED_SCHEMAS, DTYPES, by_compiled_code, compiled, eager, library, native_status
from .out_variants import copy_to, is_left_to_torch, write_compiled
from .weight_gradients import is_direct, layer_of, record

_mm = torch.ops.matmul_grad.mm.default
_bmm = torch.ops.matmul_grad.bmm.default
_addmm = torch.ops.matmul_grad.addmm.default
_eager_mm, _eager_bmm, _eager_addmm = map(eager, (_mm, _bmm, _addmm))
_eager_matmul = eager(torch.ops.matmul_grad.matmul.default)
_eager_linear = eager(torch.ops.matmul_grad.linear.default)


def matmul(input: Tensor, other: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Product of two vectors, matrices or batches of matrices, which are broadcast; differentiable to any order.

    C[…] = A[…] · B[…]

    shapes      input (…, m, k) or (k), other (…, k, n) or (k) → (…, m, n), without m or n where that was a vector
    strides     as ``mm``; a batch that is broadcast is not copied larger than it is
    dtypes      as ``mm``; the rest is torch.matmul
    aliasing    the result is new memory, or ``out``
    rounding    as ``mm``
    errors      torch.matmul's
    determinism as ``mm``
    source      as ``mm``

    >>> import torch, matmul_grad
    >>> matmul_grad.matmul(torch.ones(5, 1, 2, 3), torch.ones(4, 3, 2)).shape
    torch.Size([5, 4, 2, 2])
    >>> matmul_grad.matmul(torch.ones(3), torch.arange(3.0))
    tensor(3.)
    """
    if out is not None:
        return _matmul_out(input, other, out)
    if not is_dynamo_compiling():
        result = compiled.matmul(input, other)
        if result is not None:
            return result
    if fallback.is_needed_to_compose(input, other):
        return torch.matmul(input, other)
    return _matmul(input, other) if torch.compiler.is_compiling() else _eager_matmul(input, other)


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None) -> Tensor:
    """What ``torch.nn.Linear`` computes, and an activation of it; differentiable to any order.

    C = activation(A · Wᵀ + bias)

    shapes      input (…, k), weight (n, k) or (k), bias (n) or () → (…, n), or (…)
    strides     as ``mm``; an input that cannot be seen as one matrix is copied, as in torch
    dtypes      as ``mm``; the rest is torch.nn.functional.linear
    aliasing    the result is new memory
    rounding    as ``addmm``, after the activation
    errors      torch.nn.functional.linear's; ValueError for an unknown activation
    determinism as ``mm``
    source      as ``addmm``; kernels/cpu/activation.py

    ``activation`` is None, "relu", "gelu", "gelu_tanh", "silu" or "tanh". On a CPU it is applied where the product is
    stored, and backward keeps the result of relu and tanh, and A · Wᵀ + bias for the others.

    >>> import torch, matmul_grad
    >>> matmul_grad.linear(torch.ones(2, 3), torch.ones(1, 3), torch.tensor([0.5])).tolist()
    [[3.5], [3.5]]
    >>> matmul_grad.linear(torch.ones(2, 3), torch.tensor([[1.0, 0, 0], [-1, 0, 0]]), activation="relu").tolist()
    [[1.0, 0.0], [1.0, 0.0]]
    """
    if activation is not None:
        return _linear_activation(input, weight, bias, activation)
    if not is_dynamo_compiling():
        result = compiled.linear(input, weight, bias)
        if result is not None:
            return result
    if is_dynamo_compiling() or fallback.is_needed_to_compose(input, weight, *(() if bias is None else (bias,))):
        return linear_composed(input, weight, bias)
    return linear_composed(input, weight, bias) if torch.compiler.is_compiling() else _eager_linear(input, weight, bias)


def matmul_composed(self: Tensor, other: Tensor) -> Tensor:
    """``matmul`` as a composition of the other operators: where a transform, a mode or a tracer follows it."""
    if self.device.type == "cpu":
        native_status()
    return torch.matmul(self, other) if fallback.is_needed_to_compose(self, other) else _matmul(self, other)


def linear_to_parameters(
    input: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, accumulate: bool
) -> Tensor | None:
    """``linear`` whose weight gradient is stored as it is kept, or added to what is there; None where it cannot be."""
    found = layer_of(input, weight, bias, accumulate)
    if found is None:
        return None
    input, layer = found
    if activation is None:
        return record(input, weight, bias, layer)
    require_name(activation)
    rows = flattened(input, 1)
    result = in_two_nodes(
        layer.bias, rows, layer.weight.t(), activation, lambda s: record(rows, weight, bias, replace(layer, computed=s))
    )
    return result if input.dim() == 2 else unsafe_view(result, (*input.shape[:-1], weight.shape[0]))


def linear_composed(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``linear`` likewise."""
    if is_direct(input, weight, bias):
        result = linear_to_parameters(input, weight, bias, None, accumulate=False)
        if result is not None:
            return result
    if bias is None:
        if not fallback.is_needed_to_compose(input, weight):
            if input.dim() > 0 and 0 < weight.dim() <= 2:
                return _matmul(input, weight.t())
            fallback.require_storages(input, weight)
    elif not fallback.is_needed_to_compose(input, weight, bias):
        result = _linear(input, weight, bias)
        if result is not None:
            return result
    return torch.nn.functional.linear(input, weight, bias)


def _linear_activation(input: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """In one operator, or composed of two functions: for what is sharded, falls back, or has an error."""
    require_name(activation)
    operands = (input, weight) if bias is None else (input, weight, bias)
    if fallback.is_needed_to_compose(*operands) or any(fallback.is_sharded(x) for x in operands):
        return BY_TORCH[activation](linear(input, weight, bias))
    fallback.require_storages(*operands)
    if is_direct(input, weight, bias):
        result = linear_to_parameters(input, weight, bias, activation, accumulate=False)
        if result is not None:
            return result
    fits = input.dim() > 0 and weight.dim() == 2 and input.shape[-1] == weight.shape[1] and alike(input, weight)
    if bias is not None:
        fits = fits and bias.dim() == 1 and bias.shape[0] in (1, weight.shape[0]) and alike(input, bias)
    if not fits:
        return BY_TORCH[activation](linear(input, weight, bias))
    return linear_activation(input, weight, bias, activation)


def _linear(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor | None:
    """The layer with a bias, or None for a fallback."""
    add = _addmm if is_dynamo_compiling() else _eager_addmm
    if input.dim() == weight.dim() == 2:
        return add(bias, input, weight.t())
    fallback.require_storages(input, weight, bias)
    if weight.dim() != 2 or bias.dim() != 1 or input.dim() == 0:
        strict_mode.note_fallback(input, weight)
        return None
    n, k = weight.shape
    if input.shape[-1] != k or bias.shape[0] not in (1, n) or not alike(input, weight) or not alike(input, bias):
        return None  # torch's function raises
    rows = input.flatten(0, -2) if input.dim() > 1 else input.unsqueeze(0)
    return unsafe_view(add(bias, rows, weight.t()), (*input.shape[:-1], n))


def _matmul(input: Tensor, other: Tensor) -> Tensor:
    if input.dim() == other.dim() == 2:
        return _mm(input, other) if is_dynamo_compiling() else _eager_mm(input, other)
    result = _one_product(input, other)
    if result is not None:
        return result
    fallback.require_storages(input, other)
    if input.dim() == 0 or other.dim() == 0 or not alike(input, other):
        return torch.matmul(input, other)  # raises
    a = input if input.dim() > 1 else input.unsqueeze(0)
    b = other if other.dim() > 1 else other.unsqueeze(1)
    if a.shape[-1] != b.shape[-2] or not is_broadcastable(a.shape[:-2], b.shape[:-2]):
        return torch.matmul(input, other)  # raises
    if input.dtype not in DTYPES:
        strict_mode.note_fallback(input, other)
        return torch.matmul(input, other)
    shape = (*a.shape[-2:-1] * (input.dim() > 1), *b.shape[-1:] * (other.dim() > 1))
    if a.dim() == b.dim() == 2:
        return unsafe_view(_mm(a, b), shape)
    batch, result = broadcast_product(a, b)
    return unsafe_view(result, (*batch, *shape))


def _one_product(input: Tensor, other: Tensor) -> Tensor | None:
    """Batches that are one product as they lie in memory, in as few steps as there are; None for any others."""
    shape = input.shape
    if is_dynamo_compiling() or len(shape) < 3 or not input.is_contiguous():
        return None
    if not alike(input, other) or input.dtype not in DTYPES:
        return None
    fallback.require_storages(input, other)
    if other.dim() == 2:
        if shape[-1] != other.shape[0]:
            return None
        result = _eager_mm(input.flatten(0, -2), other)
    else:
        if shape[:-2] != other.shape[:-2] or shape[-1] != other.shape[-2] or not _is_batch(other):
            return None
        if len(shape) == 3:
            return _eager_bmm(input, other)
        result = _eager_bmm(input.flatten(0, -3), other.flatten(0, -3))
    return unsafe_view(result, (*shape[:-1], other.shape[-1]))


def _is_batch(tensor: Tensor) -> bool:
    """Whether its matrices follow each other in memory, each dense in either order."""
    return tensor.is_contiguous() or tensor.mT.is_contiguous()


def _matmul_out(input: Tensor, other: Tensor, out: Tensor) -> Tensor:
    if write_compiled("mm", (input, other), {}, out):
        return out
    if is_left_to_torch((input, other), out) or out.dtype != input.dtype or out.device != input.device:
        return torch.matmul(input, other, out=out)
    if input.dim() == other.dim() == 2:
        return mm(input, other, out=out)
    with torch.autocast(out.device.type, enabled=False):  # as for torch's with out=
        result = None if is_dynamo_compiling() else compiled.matmul(input, other)
        return copy_to(_matmul(input, other) if result is None else result, out)


for name, kernel in (("matmul", matmul_composed), ("linear", linear_composed)):
    for key in ("CompositeImplicitAutograd", "FuncTorchBatched", "Batched"):  # a composite under vmap too
        library.impl(name, kernel, key)
    by_compiled_code(f"_{name}_in_python", COMPOSED_SCHEMAS[name], kernel, "CompositeImplicitAutograd")
    library.define(f"_{name}_recorded{COMPOSED_SCHEMAS[name]}")
    library.impl(f"_{name}_recorded", kernel, "CompositeImplicitAutograd")
