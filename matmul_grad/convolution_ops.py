"""The operators of convolution: ``convolution``, with the schema of aten's, and ``convolution_weight_gradient``.

    Y = W ∗ X      convolution, transposed or not

The gradient of X is the convolution of dY by the same filter, transposed where that of X is not: the same operator.
The gradient of W has an operator of its own, whose two derivatives are convolutions again:

    dX = Wᵀ ∗ dY        convolution, with the other ``transposed``
    dW = dY ⋆ X         convolution_weight_gradient; of a transposed convolution X ⋆ dY; in float32 where that is kept
    d(dY) = dW ∗ X,  d(X) = dWᵀ ∗ dY
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from . import autocast, convolution_by_torch, convolution_direct, convolution_shapes, sharding, strict_mode
from .autograd import _below_autograd, _Node, is_seen_below_autograd, may_have_tangents, outer_levels_record, with_graph
from .convolution_by_torch import memory_format_of
from .convolution_shapes import Geometry, Sizes, channels, fits, fits_gradient, pixels, untransposed
from .dispatch_state import is_idle
from .flops import count_flops
from .gradient_dtypes import is_kept_in_float32
from .ops import DTYPES, NAMESPACE, TAGS, eager, library, require_storage
from .out_dtype import WIDE, require_wide

WINDOW = "SymInt[] stride, SymInt[] padding, SymInt[] dilation"
TRANSPOSED = "bool transposed, SymInt[] output_padding"
SCHEMA = f"(Tensor input, Tensor weight, Tensor? bias, {WINDOW}, {TRANSPOSED}, SymInt groups)"
OUT_DTYPE = "ScalarType? out_dtype=None"
GRADIENT_SCHEMA = f"(Tensor grad, Tensor input, SymInt[] weight_size, {WINDOW}, SymInt groups, {OUT_DTYPE})"
MOST_STEPS = 1 << 27  # of k: what an address of the CPU's kernels holds beside the pixels of a batch


def convolve(input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """The differentiable operator; of operands that are not of one kind torch's."""
    if is_one_kind(input, weight, bias):
        return convolve_fitting(input, weight, bias, geometry)
    result: Tensor = _convolution(input, weight, bias, *geometry)
    return result


def convolve_fitting(input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """``convolve`` of operands of one kind, or that autocast makes so; without the dispatcher where it has no part."""
    if not is_idle(input, weight, bias):
        operator = _convolution if is_dynamo_compiling() else _eager_convolution
        result: Tensor = operator(input, weight, bias, *geometry)
        return result
    if _is_recorded(input, weight, bias):
        kernels = _supported(input, weight, weight.shape, geometry) if input.is_cpu and input.shape[0] else None
        return with_graph(_record, input, weight, bias, geometry, kernels)
    with _below_autograd():
        return _fitting(input, weight, bias, geometry)


def weight_gradient(
    grad: Tensor, input: Tensor, weight_size: Sizes, geometry: Geometry, out_dtype: torch.dtype | None = None
) -> Tensor:
    """The differentiable operator, for the filter of a convolution or of a transposed one."""
    if geometry.transposed:
        grad, input, geometry = input, grad, geometry.plain()
    if is_idle(grad, input) and is_one_kind(grad, input):
        if _is_recorded(grad, input):
            return with_graph(_record_gradient, grad, input, tuple(weight_size), geometry, out_dtype)
        with _below_autograd():
            return _gradient_fitting(grad, input, weight_size, geometry, out_dtype)
    result: Tensor = _weight_gradient(grad, input, list(weight_size), *geometry[:3], geometry.groups, out_dtype)
    return result


def input_gradient(grad: Tensor, weight: Tensor, input_size: Sizes, geometry: Geometry) -> Tensor:
    """By the differentiable operator; what lies beyond the input is cut off.

    That is where ``output_padding`` of a transposed convolution, which may reach the dilation, reaches the stride.
    """
    result = convolve(grad, weight, None, geometry.gradient(grad.shape, weight.shape, input_size))
    return convolution_direct.cut(result, input_size)


# --- kernels --------------------------------------------------------------------------------------------------------


@functools.cache
def kernels_for(on_gpu: bool) -> Any:
    """The module of the kernels, or None: no LLVM, no Triton."""
    try:
        if on_gpu:
            from .kernels.gpu import convolution as of_gpu

            return of_gpu
        from .kernels.native import convolution as of_cpu
    except Exception:
        return None
    return of_cpu


def _failure(kernels: Any) -> Any:
    """What the kernels of a GPU raise where none can be built; for an ``except``."""
    return getattr(kernels, "CannotBuild", ())


def _supported(one: Tensor, other: Tensor, weight: Sizes, geometry: Geometry) -> Any:
    """The kernels for operands that fit, or None for torch's: other devices, dtypes, one channel a group, huge sums."""
    on_gpu, groups = one.is_cuda, geometry.groups
    kernels = kernels_for(on_gpu) if on_gpu or one.device.type == "cpu" else None
    depthwise, steps = groups > 1 and weight[1] == 1, max(weight[0], weight[1] * groups) * math.prod(weight[2:])
    if kernels is None or depthwise or steps > MOST_STEPS or not kernels.supports(one, other):
        strict_mode.note_fallback(one, other)
        return None
    return kernels


def is_one_kind(*tensors: Tensor | None) -> bool:
    """Whether they are dense tensors of one device and one dtype, which has a kernel."""
    first = tensors[0]
    assert first is not None
    dtype, device = first.dtype, first.device
    if dtype not in DTYPES:
        return False
    for x in tensors:
        if x is None:
            continue
        if x.dtype is not dtype or x.device != device or x.layout is not torch.strided or x.is_nested:
            return False
    return True


def _forward(input: Tensor, weight: Tensor, bias: Tensor | None, *arguments: Any) -> Tensor:
    geometry = Geometry(*arguments)
    bias_size = None if bias is None else bias.shape
    if not is_one_kind(input, weight, bias) or not fits(input.shape, weight.shape, bias_size, geometry):
        strict_mode.note_fallback(input, weight)
        return convolution_by_torch.convolution(input, weight, bias, *arguments)
    return _fitting(input, weight, bias, geometry)


def _fitting(input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """``_forward`` of operands that fit and are of one kind."""
    if input.shape[0] and (kernels := _supported(input, weight, weight.shape, geometry)) is not None:
        require_storage(input, weight, *(() if bias is None else (bias,)))
        try:
            return _by_kernels(kernels, input, weight, bias, geometry)
        except _failure(kernels):
            strict_mode.note_fallback(input, weight)
    return convolution_by_torch.convolution(input, weight, bias, *geometry)


def _by_kernels(kernels: Any, input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    window = geometry.stride, geometry.padding, geometry.dilation, geometry.groups
    if not geometry.transposed:
        return kernels.forward(input, weight, bias, *window)
    size = input.shape[0], channels(weight.shape, geometry)[1], *pixels(input.shape, weight.shape, geometry)
    return kernels.input_gradient(input, weight, size, *window, bias=bias)


def _gradient(grad: Tensor, input: Tensor, weight_size: Sizes, *arguments: Any) -> Tensor:
    window, out_dtype = _with_out_dtype(grad, arguments)
    geometry = untransposed(*window)
    if not is_one_kind(grad, input) or not fits_gradient(grad.shape, input.shape, weight_size, geometry):
        strict_mode.note_fallback(grad, input)
        return convolution_by_torch.weight_gradient(grad, input, weight_size, *(*window, out_dtype))
    return _gradient_fitting(grad, input, weight_size, geometry, out_dtype)


def _gradient_fitting(
    grad: Tensor, input: Tensor, weight_size: Sizes, geometry: Geometry, out_dtype: torch.dtype | None
) -> Tensor:
    """``_gradient`` of operands that fit and are of one kind."""
    arguments = geometry.stride, geometry.padding, geometry.dilation, geometry.groups, out_dtype
    if grad.shape[0] and (kernels := _supported(grad, input, weight_size, geometry)) is not None:
        require_storage(grad, input)
        try:
            return kernels.weight_gradient(grad, input, tuple(weight_size), *arguments)
        except _failure(kernels):
            strict_mode.note_fallback(grad, input)
    return convolution_by_torch.weight_gradient(grad, input, weight_size, *arguments)


def _with_out_dtype(grad: Tensor, arguments: tuple[Any, ...]) -> tuple[Any, torch.dtype | None]:
    """(stride, padding, dilation, groups) and the dtype, which the dispatcher leaves out where it is None."""
    out_dtype = arguments[4] if len(arguments) > 4 else None
    if out_dtype in (None, grad.dtype):
        return arguments[:4], None
    require_wide(grad, out_dtype)
    return arguments[:4], out_dtype


def _fake_forward(input: Tensor, weight: Tensor, bias: Tensor | None, *arguments: Any) -> Tensor:
    """Size and errors are torch's."""
    size = torch.ops.aten.convolution.default(input, weight, bias, *arguments).shape
    return torch.empty(
        size, dtype=input.dtype, device=input.device, memory_format=memory_format_of(input), layout=input.layout
    )


def _fake_gradient(grad: Tensor, input: Tensor, weight_size: Sizes, *arguments: Any) -> Tensor:
    return grad.new_empty(list(weight_size), dtype=_with_out_dtype(grad, arguments)[-1])


# --- autograd -------------------------------------------------------------------------------------------------------

_keys: Any = torch._C.DispatchKey
_autocast_keys = torch._C.DispatchKeySet(_keys.AutocastCPU) | torch._C.DispatchKeySet(_keys.AutocastCUDA)


def _as_recorded() -> Any:
    """A derivative has the dtype of what was recorded: autocast, as of torch's, does not cast it."""
    return torch._C._ExcludeDispatchKeyGuard(_autocast_keys)


def _outer_levels() -> Any:
    functorch = torch._C._are_functorch_transforms_active()
    return outer_levels_record() if functorch else contextlib.nullcontext()


def _compute(operator: Any, kernel: Callable[..., Tensor], one: Tensor, other: Tensor, *others: Any) -> Tensor:
    """The operator below autograd; its kernel, where the dispatcher has no more to do."""
    with _below_autograd():
        seen = is_seen_below_autograd(one, other, *(x for x in others[:1] if isinstance(x, Tensor)))
        return (operator if seen else kernel)(one, other, *others)


def _kept_dtype(x: Tensor | None) -> torch.dtype | None:
    """Of the gradient, where that is not the operand's."""
    return WIDE if x is not None and is_kept_in_float32(x) else None


class Convolution(_Node):
    """``convolution`` as a node of the graph."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, kernels: Any = None
    ) -> Tensor:
        """kernels: those of the CPU, where they support the operands and nothing follows the call."""
        needs_input, needs_weight, *_ = ctx.needs_input_grad
        ctx.save_for_backward(input if needs_weight else None, weight if needs_input else None)
        ctx.sizes, ctx.geometry, ctx.kernels = (input.shape, weight.shape), geometry, kernels
        ctx.kept, ctx.kept_bias = _kept_dtype(weight), _kept_dtype(bias)
        if may_have_tangents():
            ctx.save_for_forward(input, weight)
        elif kernels is not None:
            require_storage(input, weight, *(() if bias is None else (bias,)))
            return _by_kernels(kernels, input, weight, bias, geometry)
        if not torch._C._are_functorch_transforms_active():
            return _compute(_convolution, _forward, input, weight, bias, *geometry)
        with outer_levels_record():
            return convolve(input, weight, bias, geometry)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        input_size, weight_size = ctx.sizes
        needs_input, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        dinput = dweight = None
        if convolution_direct.is_direct(ctx.kernels, grad, input, weight):
            ours, kernels = convolution_direct, ctx.kernels
            if needs_input:
                dinput = ours.input_gradient(kernels, grad, weight, input_size, ctx.geometry)
            if needs_weight:
                dweight = ours.weight_gradient(kernels, grad, input, weight_size, ctx.geometry, ctx.kept)
        else:
            with _as_recorded():
                dinput = input_gradient(grad, weight, input_size, ctx.geometry) if needs_input else None
                dweight = weight_gradient(grad, input, weight_size, ctx.geometry, ctx.kept) if needs_weight else None
        dbias = grad.sum([0, *range(2, grad.dim())], dtype=ctx.kept_bias) if needs_bias else None
        return dinput, dweight, dbias, None, None

    @staticmethod
    def jvp(ctx: Any, dinput: Tensor | None, dweight: Tensor | None, dbias: Tensor | None, *_: Any) -> Tensor:
        """dY = W ∗ dX + dW ∗ X + dbias"""
        input, weight = ctx.saved_tensors
        with _outer_levels(), _as_recorded():
            terms = [] if dinput is None else [convolve(dinput, weight, dbias, ctx.geometry)]
            if dweight is not None:
                terms.append(convolve(input, dweight, None if terms else dbias, ctx.geometry))
            if terms:
                return sum(terms[1:], terms[0])
            assert dbias is not None
            size = input.shape[0], -1, *pixels(input.shape, weight.shape, ctx.geometry)
            return dbias.view(-1, *[1] * (input.dim() - 2)).expand(size).clone()


class WeightGradient(_Node):
    """``convolution_weight_gradient`` as a node of the graph."""

    @staticmethod
    def forward(
        ctx: Any, grad: Tensor, input: Tensor, weight_size: Sizes, geometry: Geometry, out_dtype: torch.dtype | None
    ) -> Tensor:
        needs_grad, needs_input, *_ = ctx.needs_input_grad
        ctx.save_for_backward(grad if needs_input else None, input if needs_grad else None)
        ctx.sizes, ctx.geometry, ctx.weight_size = (grad.shape, input.shape), geometry, weight_size
        ctx.dtype, ctx.out_dtype = grad.dtype, out_dtype
        if may_have_tangents():
            ctx.save_for_forward(grad, input)
        if not torch._C._are_functorch_transforms_active():
            arguments = *geometry[:3], geometry.groups, out_dtype
            return _compute(_weight_gradient, _gradient, grad, input, weight_size, *arguments)
        with outer_levels_record():
            return weight_gradient(grad, input, weight_size, geometry, out_dtype)

    @staticmethod
    def backward(ctx: Any, dweight: Tensor) -> tuple[Tensor | None, ...]:
        """Where dW has float32, in float32, and rounded once."""
        grad, input = ctx.saved_tensors
        (grad_size, input_size), geometry, dgrad, dinput = ctx.sizes, ctx.geometry, None, None
        with _as_recorded():
            if ctx.needs_input_grad[0]:
                dgrad = convolve(input.to(dweight.dtype), dweight, None, geometry)
                dgrad = convolution_direct.cut(dgrad, grad_size).to(ctx.dtype)
            if ctx.needs_input_grad[1]:
                dinput = input_gradient(grad.to(dweight.dtype), dweight, input_size, geometry).to(ctx.dtype)
        return dgrad, dinput, None, None, None

    @staticmethod
    def jvp(ctx: Any, dgrad: Tensor | None, dinput: Tensor | None, *_: Any) -> Tensor:
        grad, input = ctx.saved_tensors
        arguments = ctx.weight_size, ctx.geometry, ctx.out_dtype
        with _outer_levels(), _as_recorded():
            terms = [] if dgrad is None else [weight_gradient(dgrad, input, *arguments)]
            if dinput is not None:
                terms.append(weight_gradient(grad, dinput, *arguments))
            return sum(terms[1:], terms[0])


_record: Callable[..., Tensor] = Convolution.apply  # type: ignore[attr-defined]  # which torch adds to the base
_record_gradient: Callable[..., Tensor] = WeightGradient.apply  # type: ignore[attr-defined]  # likewise


def _is_recorded(*tensors: Tensor | None) -> bool:
    if torch.is_grad_enabled():
        for x in tensors:
            if x is not None and x.requires_grad:
                return True
    return may_have_tangents()


def _autograd(input: Tensor, weight: Tensor, bias: Tensor | None, *arguments: Any) -> Tensor:
    if not _is_recorded(input, weight, bias):
        return _compute(_convolution, _forward, input, weight, bias, *arguments)
    geometry = Geometry(*arguments)
    bias_size = None if bias is None else bias.shape
    if not is_one_kind(input, weight, bias) or not fits(input.shape, weight.shape, bias_size, geometry):
        strict_mode.note_fallback(input, weight)
        result: Tensor = torch.ops.aten.convolution.default(input, weight, bias, *arguments)
        return result
    return with_graph(_record, input, weight, bias, geometry)


def _gradient_autograd(grad: Tensor, input: Tensor, weight_size: Sizes, *arguments: Any) -> Tensor:
    if not _is_recorded(grad, input):
        return _compute(_weight_gradient, _gradient, grad, input, weight_size, *arguments)
    window, out_dtype = _with_out_dtype(grad, arguments)
    if not is_one_kind(grad, input):
        strict_mode.note_fallback(grad, input)
        return convolution_by_torch.weight_gradient(grad, input, weight_size, *(*window, out_dtype))
    return with_graph(_record_gradient, grad, input, tuple(weight_size), untransposed(*window), out_dtype)


# --- registration --------------------------------------------------------------------------------------------------


def _register(name: str, schema: str, kernels: tuple[Callable[..., Any], ...], count: Callable[..., int]) -> Any:
    """kernels: of every device, of Autograd and of tracing."""
    kernel, recorded, fake = kernels
    library.define(f"{name}{schema} -> Tensor", tags=TAGS)
    library.impl(name, kernel, "CompositeExplicitAutograd")
    library.impl(name, recorded, "Autograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=library)
    count_flops(getattr(torch.ops.matmul_grad, name), count)
    return getattr(torch.ops.matmul_grad, name).default


_convolution = _register("convolution", SCHEMA, (_forward, _autograd, _fake_forward), convolution_shapes.flops)
_eager_convolution = eager(_convolution)
_weight_gradient = _register(
    "convolution_weight_gradient",
    GRADIENT_SCHEMA,
    (_gradient, _gradient_autograd, _fake_gradient),
    convolution_shapes.flops_of_gradient,
)
for device, key in autocast.DEVICES.items():
    library.impl("convolution", autocast.make_cast("convolution", device), key)
sharding.register(sharding.register_convolutions_with)
