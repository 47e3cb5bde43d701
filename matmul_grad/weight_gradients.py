"""Linear layers whose weight gradient goes from the product to where it is kept, in float32.

    C  = A · Wᵀ + bias
    dW = dCᵀ · A            stored in float32 where the weight's gradient is kept in float32
    dbias = 1ᵀ · dC         likewise
    G += dCᵀ · A            with ``accumulate``, in the product, where G is ``weight.main_grad`` or ``weight.grad``

Other layers are ``mm`` of the transposed weight, whose gradient passes through a view and is rounded to the dtype of
the weight. Here the weight itself is the operand of the node.

An addition to G is made where backward is going to add to ``weight.grad`` and nobody is to see the contribution by
itself. What AccumulateGrad gets instead is a zero: a sparse tensor without elements. It adds nothing, and the hooks
that follow, those of DistributedDataParallel and FSDP2 among them, find the sum in ``weight.grad``. docs/design.md,
"Weight gradients in float32", has the reasons.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .autocast import DEVICES
from .autograd import _below_autograd, _Node
from .dispatch_state import is_plain
from .fallback import PLAIN, is_needed_to_compose
from .gradient_dtypes import NARROW, WIDE, is_kept_in_float32, kept_dtype, product_in
from .gradients import addend_gradient, flattened, is_column_major
from .kernels.cpu.fork_safety import fork_safe_lock
from .kernels.native.torch_layout import is_autograd_compiled
from .ops import DTYPES, accelerated, accumulate, compute, product
from .out_variants import can_write, mark_written

# Threads that run backward at the same time add to one gradient in turn.
_locks = [fork_safe_lock() for _ in range(16)]


@dataclass(frozen=True)
class Layer:
    """What a node multiplies, beside its inputs.

    weight, bias: in the dtype of the product, which under autocast is not theirs. computed: A · Wᵀ + bias, where it is
    known. accumulate: whether wgrad may add to the gradient that is there.
    """

    weight: Tensor
    bias: Tensor | None
    accumulate: bool
    computed: Tensor | None = None


class Linear(_Node):
    """A linear layer as a node whose edge to the weight is direct. input (…, k), weight (n, k), bias (n) or None."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, layer: Layer) -> Tensor:
        needs_input, needs_weight, _, _ = ctx.needs_input_grad
        is_cast = layer.weight is not weight
        ctx.save_for_backward(input if needs_weight else None, layer.weight if needs_input else None)
        # Of a weight that was cast, a second derivative needs the original; the node keeps no version of it.
        ctx.original = (weight, weight._version) if is_cast and needs_input else None
        ctx.accumulate, ctx.shape = layer.accumulate, input.shape
        ctx.column_major = is_column_major(weight)
        ctx.kept, ctx.kept_bias = (None if x is None else kept_dtype(x) for x in (weight, bias))
        if layer.computed is not None:
            return layer.computed.detach()
        with _below_autograd():
            result: Tensor = torch.ops.matmul_grad.linear.default(input, layer.weight, layer.bias)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        needs_input, needs_weight, needs_bias, _ = ctx.needs_input_grad
        rows = flattened(grad, 1)
        dinput, dweight, dbias = None, None, None
        if needs_input:
            dinput = product(rows, _differentiable(ctx, weight)).view(ctx.shape)
        if needs_bias:
            dbias = addend_gradient(rows, rows.shape[1:], ctx.kept_bias)
        if needs_weight:
            dweight = _weight_gradient(ctx, rows, flattened(input, 1))
        return dinput, dweight, dbias, None


def _differentiable(ctx: Any, weight: Tensor) -> Tensor:
    """The weight in the dtype of the product, as a function of the parameter where a second derivative follows."""
    if ctx.original is None or not torch.is_grad_enabled():
        return weight
    original, version = ctx.original
    if original._version != version:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace operation: "
            f"a weight of {tuple(original.shape)} is at version {original._version}; expected version {version} instead"
        )
    return original.to(weight.dtype)


def _weight_gradient(ctx: Any, rows: Tensor, input: Tensor) -> Tensor:
    """dW, or a zero where it was added to the gradient that is there."""
    if ctx.accumulate and not torch.is_grad_enabled():
        node = ctx.next_functions[1][0]
        if _is_added_later(node) and _add(node.variable, rows, input):
            return torch.empty(node.variable.shape, dtype=ctx.kept, device=rows.device, layout=torch.sparse_coo)
    wide = ctx.kept == WIDE and rows.dtype in NARROW
    if ctx.column_major:
        return product_in(input.t(), rows, wide).t()
    return product_in(rows.t(), input, wide)


# --- accumulation ---------------------------------------------------------------------------------------------------


def _is_added_later(node: Any) -> bool:
    """Whether what is returned goes straight to AccumulateGrad of a parameter, which runs in this backward."""
    weight: Any = getattr(node, "variable", None)
    if type(weight) not in PLAIN or not weight.requires_grad or weight._backward_hooks:
        return False
    if torch.is_anomaly_enabled():  # which looks at each contribution
        return False
    try:
        return bool(torch._C._will_engine_execute_node(node))
    except RuntimeError:  # torch.autograd.grad asks for this gradient, or no engine runs
        return False


def _add(weight: Tensor, rows: Tensor, input: Tensor) -> bool:
    """Add dCᵀ · A to the gradient of the weight; False where that is not possible, and nothing has changed."""
    if not rows.numel() or not input.numel() or not is_plain(rows, input) or not accelerated(rows.t(), input):
        return False
    dtype = rows.dtype if rows.dtype not in NARROW else WIDE
    with _locks[(id(weight) >> 8) % len(_locks)]:
        found = getattr(weight, "main_grad", None)
        if isinstance(found, Tensor):
            if getattr(weight, "overwrite_main_grad", False):  # the first contribution is to replace what is there
                return False
        else:
            found = weight.grad
            if found is None:
                return _set_first(weight, rows, input, dtype)
        if not _is_target(found, weight, rows, input, dtype):
            return False
        accumulate(rows.t(), input, found)
        mark_written(found)
        if found is not weight.grad and hasattr(weight, "grad_added_to_main_grad"):
            weight.grad_added_to_main_grad = True
    return True


def _set_first(weight: Tensor, rows: Tensor, input: Tensor, dtype: torch.dtype) -> bool:
    """Make the first gradient on a CPU, where threads may run backward at the same time; elsewhere torch stores it."""
    if weight.device.type != "cpu" or dtype != kept_dtype(weight):
        return False
    out = (
        torch.empty_like(weight, dtype=dtype)
        if is_column_major(weight)
        else weight.new_empty(weight.shape, dtype=dtype)
    )
    compute(rows.t(), input, out=out)
    weight.grad = out
    return True


def _is_target(found: Tensor, weight: Tensor, rows: Tensor, input: Tensor, dtype: torch.dtype) -> bool:
    """Whether the product can add to a gradient: a dense tensor in the dtype of the sums, apart from the operands."""
    if type(found) not in PLAIN or found.layout != torch.strided or found.requires_grad or found.is_inference():
        return False
    fits = found.shape == weight.shape and found.dtype == dtype and found.device == rows.device
    return fits and is_plain(found) and can_write(found, (rows.t(), input))


# --- which layers ---------------------------------------------------------------------------------------------------

_record = Linear.apply  # type: ignore[attr-defined]  # which torch adds to the base


def record(input: Tensor, weight: Tensor, bias: Tensor | None, layer: Layer) -> Tensor:
    """The layer with its graph, of operands that ``layer_of`` has found to fit."""
    result: Tensor = _record(input, weight, bias, layer)
    return result


def is_direct(input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the gradient of a layer's weight is kept in float32, and nothing but autograd follows the product."""
    if torch.compiler.is_compiling():  # Dynamo cannot ask in which dtype a gradient is kept
        return False
    if torch._C._len_torch_function_stack() or type(weight) not in PLAIN or not is_kept_in_float32(weight):
        return False
    return _is_followed_by_autograd_alone(input, weight, bias)


def layer_of(input: Tensor, weight: Tensor, bias: Tensor | None, accumulate: bool) -> tuple[Tensor, Layer] | None:
    """The input in the dtype of the product, and the rest of the layer; None for a layer that is computed otherwise."""
    if not _is_followed_by_autograd_alone(input, weight, bias):
        return None
    cast = {x.dtype: _dtype_of_product(x) for x in (input, weight, bias) if x is not None}
    dtype = cast[input.dtype]
    if dtype not in DTYPES or set(cast.values()) != {dtype}:
        return None
    inner_weight, inner_bias = (x if x is None or x.dtype == dtype else x.detach().to(dtype) for x in (weight, bias))
    assert inner_weight is not None
    return input.to(dtype), Layer(inner_weight, inner_bias, accumulate)


def _dtype_of_product(x: Tensor) -> torch.dtype:
    """The dtype of an operand, which autocast may change."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.is_floating_point() and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype


def _is_followed_by_autograd_alone(input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether a graph is recorded of a weight that is a parameter, without a transform, tracer, tangent or subclass."""
    if torch._C._len_torch_function_stack():  # before an attribute is read, which a mode would see
        return False
    if not (weight.requires_grad and weight.is_leaf and torch.is_grad_enabled()):
        return False
    operands = (input, weight) if bias is None else (input, weight, bias)
    if not all(type(x) in PLAIN and x.layout == torch.strided for x in operands):
        return False
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active():
        return False
    if forward_ad._current_level >= 0 or is_autograd_compiled() or is_needed_to_compose(*operands):
        return False
    on_one_device = all(x.device == weight.device for x in operands) and weight.device.type in DEVICES
    fits = weight.dim() == 2 and input.dim() > 0 and input.shape[-1] == weight.shape[1]
    return on_one_device and fits and (bias is None or bias.shape == weight.shape[:1])
