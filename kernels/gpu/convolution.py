"""Convolutions of CUDA tensors: forward, input gradient and weight gradient, each one product over patches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import settings
from .config import workspace_bytes
from .convolution_plan import (
    Convolution,
    PatchProduct,
    choose_tile,
    convolution_plans,
    forward_product,
    input_gradient_product,
    weight_gradient_product,
)
from .convolution_plan import Tensor as Shape
from .epilogue import Epilogue
from .launch import CannotBuild as CannotBuild
from .launch import Launch, cached_launch, run_kernels, target_of
from .launch import supports as supports_tensor
from .operands import INTERPRETED, NAMES
from .run import Runner

Product = Callable[[Convolution, Shape, Shape, Shape], PatchProduct]


def supports(input: Tensor, weight: Tensor) -> bool:
    """Whether the three functions support these: batched, 1 to 3 spatial dimensions, on a GPU that mm supports."""
    same = input.dtype == weight.dtype and input.device == weight.device and input.dim() == weight.dim()
    return same and 3 <= input.dim() <= 5 and supports_tensor(input) and supports_tensor(weight)


def forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Y[s, o, y] = bias[o] + sum over (c, t) of X[s, c, y * stride - padding + t * dilation] * W[o, c, t].

    Shapes: X (samples, channels, spatial), W (out channels, channels / groups, taps), as torch.convolution; 1 to 3
    spatial dimensions, tuples of as many numbers. Sizes may be 0.
    Strides: any. The result is channels_last where X is, else contiguous.
    Dtypes: alike: float16, bfloat16, float32, float64; float32 by torch's setting for convolutions.
    Rounding: once, the bias included, from a sum in float32 (float64 for float64), over (c, t): channels upward and
    the taps of each; where BLOCK_K divides their number, blocks of channels upward and the taps of each block.
    Edges: masks; padding is neither stored nor read.
    Determinism: on one GPU model an output has the same bits in any batch and any image.
    Memory: the result.
    """
    sizes = [
        (size + 2 * pad - step * (taps - 1) - 1) // by + 1
        for size, taps, by, pad, step in zip(input.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
    ]
    result = new_image(input, (input.shape[0], weight.shape[0], *sizes))
    conv = Convolution(tuple(stride), tuple(padding), tuple(dilation), groups)
    return _run(forward_product, conv, (input, weight, result), bias)


def input_gradient(
    grad: Tensor,
    weight: Tensor,
    input_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    bias: Tensor | None = None,
) -> Tensor:
    """dX[s, c, x] = bias[c] + sum over (o, t) of dY[s, o, (x + padding - t * dilation) / stride] * W[o, c, t].

    The sum is over the taps t whose coordinate is a whole number. With a bias: the transposed convolution of dY.
    input_size: the shape of dX, which is channels_last where dY is.
    Memory: the result. All else as `forward`, the sum over (o, t).
    """
    conv = Convolution(tuple(stride), tuple(padding), tuple(dilation), groups)
    return _run(input_gradient_product, conv, (grad, weight, new_image(grad, input_size)), bias)


def weight_gradient(
    grad: Tensor,
    input: Tensor,
    weight_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """dW[o, c, t] = sum over (s, y) of dY[s, o, y] * X[s, c, y * stride - padding + t * dilation]; contiguous.

    Dtypes: the result may have float32 of 16-bit operands, by ``out_dtype``: the sum itself.
    Determinism: the sum may be cut into parts, by the shapes alone, which are added in order; not where
    `matmul_grad.deterministic(batch_invariant=True)` holds. Memory: the result, and at most 32 MiB of parts.
    All else as `forward`, the sum over (s, y).
    """
    conv = Convolution(tuple(stride), tuple(padding), tuple(dilation), groups)
    return _run(weight_gradient_product, conv, (input, grad, grad.new_empty(tuple(weight_size), dtype=out_dtype)), None)


def new_image(like: Tensor, size: Sequence[int]) -> Tensor:
    """A result in the memory format of an image: channels_last where its channels are adjacent, else contiguous."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    last = formats.get(like.dim())
    if last is not None and like.is_contiguous(memory_format=last) and not like.is_contiguous():
        return torch.empty(tuple(size), dtype=like.dtype, device=like.device, memory_format=last)
    return like.new_empty(tuple(size))


def precision_now(dtype: torch.dtype) -> str:
    """How torch would multiply float32 in a convolution on a GPU at this moment: "tf32", or how "ieee" is to be read.

    torch's setting is apart from the one of products: `torch.backends.cudnn.conv.fp32_precision`, "tf32" by default.
    """
    if dtype != torch.float32:
        return "ieee"
    setting: Any = torch.backends.cudnn
    return "tf32" if setting.conv.fp32_precision == "tf32" else settings.float32


def _run(product: Product, conv: Convolution, tensors: tuple[Tensor, Tensor, Tensor], bias: Tensor | None) -> Tensor:
    """Launch a product over patches of A and B, and the bias if there is one, into the third tensor."""
    (a, b, c), precision = tensors, precision_now(tensors[0].dtype)
    if c.numel() == 0:
        return c
    if a.numel() == 0 or b.numel() == 0:
        return c.zero_() if bias is None else c.copy_(bias.view(1, -1, *[1] * (c.dim() - 2)).expand_as(c))
    bias = None if bias is None else bias.contiguous()
    layouts = [(x.shape, x.stride(), x.data_ptr() % 16) for x in (*tensors, *([] if bias is None else [bias]))]
    key = (product.__name__, conv, *layouts, a.dtype, c.dtype, a.get_device(), precision, settings.invariant)
    launch = cached_launch(key, lambda: _make_launch(product, conv, tensors, precision, bias is not None))
    named: dict[str, Any] = {"a": a, "b": b}
    if bias is not None:
        named |= {"source": bias, **Epilogue().scalars()}
    return run_kernels(launch, named, c)


def _make_launch(
    product: Product, conv: Convolution, tensors: tuple[Tensor, Tensor, Tensor], precision: str, bias: bool
) -> Launch:
    a, _, c = tensors
    made = product(conv, *(Shape(tuple(x.shape), x.stride()) for x in tensors))
    problem = made.problem(NAMES[a.dtype], precision, settings.invariant)
    try:
        config = choose_tile(problem, made.family(problem.dtype, precision), target_of(a))
    except ValueError as error:  # more phases or groups than a grid has programs
        raise CannotBuild(str(error)) from error
    plans = convolution_plans(made, problem, config, upcast=INTERPRETED and a.dtype == torch.bfloat16, bias=bias)
    work = torch.float64 if a.dtype == torch.float64 else torch.float32
    return Launch(tuple(map(Runner, plans)), tuple(c.shape), workspace_bytes(problem, config) // work.itemsize, work)
