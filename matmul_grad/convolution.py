"""The public functions of convolution, with torch's arguments: each is the operator, once its arguments are plain."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from . import convolution_vmap as convolution_vmap
from . import fallback, strict_mode
from .convolution_ops import convolve_fitting
from .convolution_shapes import Geometry, fits
from .ops import DTYPES

Numbers = int | Sequence[int]


def conv1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Numbers = 1,
    padding: Numbers | str = 0,
    dilation: Numbers = 1,
    groups: int = 1,
) -> Tensor:
    """Convolution over one dimension, differentiable to any order.

    Y[n, co, p] = bias[co] + Σ_{ci, u} W[co, ci, u] · X[n, ci, p · stride + u · dilation - padding]

    shapes      input (n, ci, size) or (ci, size), weight (co, ci / groups, taps), bias (co)
    strides     any; the result has the memory format of the input
    dtypes      float16, bfloat16, float32, float64 on CPU and CUDA; the rest is torch.nn.functional.conv1d, and so are
                one channel a group, and bfloat16 on CPUs with instructions for it; float32 on CUDA follows
                torch.backends.cudnn.conv.fp32_precision
    aliasing    the result is new memory
    rounding    as ``mm``; the gradient of a 16-bit filter that is kept in float32 (``grad_dtype``) is not rounded
    errors      torch.nn.functional.conv1d's
    determinism an element depends on its window, its filter and their order alone: not on the batch or the size
    source      docs/design.md, "Convolutions"; kernels/native/convolution.py, kernels/gpu/convolution.py

    ``padding`` may be "valid" or "same"; where "same" needs one more element behind, the input is copied once.

    >>> import torch, matmul_grad
    >>> x, w = torch.arange(5.0).view(1, 1, 5), torch.tensor([[[1.0, 0.0, -1.0]]])
    >>> matmul_grad.conv1d(x, w, padding=1).tolist()
    [[[-1.0, -2.0, -2.0, -2.0, 3.0]]]
    """
    return _convolve("conv1d", 1, (input, weight, bias), stride, padding, dilation, groups)


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Numbers = 1,
    padding: Numbers | str = 0,
    dilation: Numbers = 1,
    groups: int = 1,
) -> Tensor:
    """Convolution over two dimensions, differentiable to any order: ``conv1d`` has the facts.

    shapes      input (n, ci, height, width) or (ci, height, width), weight (co, ci / groups, taps, taps), bias (co)

    >>> import torch, matmul_grad
    >>> x, w = torch.arange(9.0).view(1, 1, 3, 3), torch.ones(1, 1, 2, 2, requires_grad=True)
    >>> y = matmul_grad.conv2d(x, w)
    >>> y.sum().backward()
    >>> y.tolist(), w.grad.tolist()
    ([[[[8.0, 12.0], [20.0, 24.0]]]], [[[[8.0, 12.0], [20.0, 24.0]]]])
    """
    return _convolve("conv2d", 2, (input, weight, bias), stride, padding, dilation, groups)


def conv3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Numbers = 1,
    padding: Numbers | str = 0,
    dilation: Numbers = 1,
    groups: int = 1,
) -> Tensor:
    """Convolution over three dimensions, differentiable to any order: ``conv1d`` has the facts.

    shapes      input (n, ci, depth, height, width) or without n, weight (co, ci / groups, taps, taps, taps), bias (co)

    >>> import torch, matmul_grad
    >>> matmul_grad.conv3d(torch.ones(1, 2, 3, 3, 3), torch.ones(4, 2, 2, 2, 2), stride=2).flatten().tolist()
    [16.0, 16.0, 16.0, 16.0]
    """
    return _convolve("conv3d", 3, (input, weight, bias), stride, padding, dilation, groups)


def conv_transpose1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Numbers = 1,
    padding: Numbers = 0,
    output_padding: Numbers = 0,
    groups: int = 1,
    dilation: Numbers = 1,
) -> Tensor:
    """Transposed convolution over one dimension, differentiable to any order: what ``conv1d`` does to a gradient.

    Y[n, co, q] = bias[co] + Σ_{ci, u, p} W[ci, co, u] · X[n, ci, p]      q = p · stride + u · dilation - padding

    shapes      input (n, ci, size) or (ci, size), weight (ci, co / groups, taps), bias (co)
    strides     as ``conv1d``
    dtypes      as ``conv1d``; the rest is torch.nn.functional.conv_transpose1d
    aliasing    as ``conv1d``
    rounding    as ``conv1d``
    errors      torch.nn.functional.conv_transpose1d's
    determinism as ``conv1d``
    source      as ``conv1d``

    >>> import torch, matmul_grad
    >>> x, w = torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[1.0, 1.0, 1.0]]])
    >>> matmul_grad.conv_transpose1d(x, w, stride=2).tolist()
    [[[1.0, 1.0, 3.0, 2.0, 2.0]]]
    """
    return _convolve("conv_transpose1d", 1, (input, weight, bias), stride, padding, dilation, groups, output_padding)


def conv_transpose2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Numbers = 1,
    padding: Numbers = 0,
    output_padding: Numbers = 0,
    groups: int = 1,
    dilation: Numbers = 1,
) -> Tensor:
    """Transposed convolution over two dimensions, differentiable to any order: ``conv_transpose1d`` has the facts.

    shapes      input (n, ci, height, width) or (ci, height, width), weight (ci, co / groups, taps, taps), bias (co)

    >>> import torch, matmul_grad
    >>> matmul_grad.conv_transpose2d(torch.ones(1, 1, 2, 2), torch.ones(1, 1, 2, 2)).tolist()
    [[[[1.0, 2.0, 1.0], [2.0, 4.0, 2.0], [1.0, 2.0, 1.0]]]]
    """
    return _convolve("conv_transpose2d", 2, (input, weight, bias), stride, padding, dilation, groups, output_padding)


def conv_transpose3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Numbers = 1,
    padding: Numbers = 0,
    output_padding: Numbers = 0,
    groups: int = 1,
    dilation: Numbers = 1,
) -> Tensor:
    """Transposed convolution over three dimensions, differentiable to any order: ``conv_transpose1d`` has the facts.

    shapes      input (n, ci, depth, height, width) or without n, weight (ci, co / groups, taps, taps, taps), bias (co)

    >>> import torch, matmul_grad
    >>> matmul_grad.conv_transpose3d(torch.ones(1, 1, 1, 1, 1), torch.ones(1, 3, 2, 2, 2), stride=2).shape
    torch.Size([1, 3, 2, 2, 2])
    """
    return _convolve("conv_transpose3d", 3, (input, weight, bias), stride, padding, dilation, groups, output_padding)


FUNCTIONS = {f.__name__: f for f in (conv1d, conv2d, conv3d, conv_transpose1d, conv_transpose2d, conv_transpose3d)}


DEFAULTS = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1, "output_padding": 0}


def _convolve(
    name: str, rank: int, operands: tuple[Any, Any, Any], stride: Any, padding: Any, dilation: Any, groups: Any,
    output_padding: Any = None,
) -> Tensor:  # fmt: skip
    """By the operator, or by torch's function: for other operands, and for every error."""
    input, weight, bias = operands
    if not fallback.is_needed_to_compose(input, weight, *(() if bias is None else (bias,))):
        window = _geometry(rank, weight, stride, padding, dilation, groups, output_padding)
        result = None if window is None else _by_operator(rank, input, weight, bias, *window)
        if result is not None:
            return result
        strict_mode.note_fallback(input, weight)
    named = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    if output_padding is not None:
        named["output_padding"] = output_padding
    given = {key: value for key, value in named.items() if type(value) is not int or value != DEFAULTS[key]}
    tensors = operands if bias is not None else operands[:2]  # as they are called most often: so its errors name them
    return getattr(functional, name)(*tensors, **given)


def _by_operator(
    rank: int, input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, behind: tuple[int, ...]
) -> Tensor | None:
    """The convolution of an input that is first padded at its end by ``behind``; None where torch's function raises."""
    if input.dtype not in DTYPES or not fallback.alike(input, weight):
        return None
    if input.dim() not in (rank + 1, rank + 2) or not (bias is None or fallback.alike(input, bias)):
        return None
    batched = input if input.dim() == rank + 2 else input.unsqueeze(0)
    if any(behind):
        batched = functional.pad(batched, [x for size in reversed(behind) for x in (0, size)])
    if not fits(batched.shape, weight.shape, None if bias is None else bias.shape, geometry):
        return None
    result = convolve_fitting(batched, weight, bias, geometry)
    return result if input.dim() == rank + 2 else result.squeeze(0)


def _geometry(
    rank: int, weight: Tensor, stride: Any, padding: Any, dilation: Any, groups: Any, output_padding: Any
) -> tuple[Geometry, tuple[int, ...]] | None:
    """With what "same" pads an input by at its end, before the operator pads both ends; None for what is no number."""
    transposed = output_padding is not None
    zeros, behind = (0,) * rank, (0,) * rank
    steps, by, more = (_numbers(rank, x) for x in (stride, dilation, output_padding if transposed else 0))
    if steps is None or by is None or more is None or not _is_int(groups):
        return None
    if not isinstance(padding, str):
        pads = _numbers(rank, padding)
    elif transposed or weight.dim() != rank + 2:
        return None
    elif padding == "valid":
        pads = zeros
    elif padding == "same" and all(x == 1 for x in steps):
        whole = [d * (taps - 1) for d, taps in zip(by, weight.shape[2:])]
        pads, behind = tuple(x // 2 for x in whole), tuple(x % 2 for x in whole)
    else:
        return None
    return None if pads is None else (Geometry(steps, pads, by, transposed, more, groups), behind)


def _is_int(x: Any) -> bool:
    return isinstance(x, (int, torch.SymInt)) and not isinstance(x, bool)


def _numbers(rank: int, x: Any) -> tuple[int, ...] | None:
    """One number for each dimension, as torch reads them."""
    if type(x) is int or _is_int(x):
        return (x,) * rank
    if not isinstance(x, (tuple, list)) or len(x) not in (1, rank) or not all(map(_is_int, x)):
        return None
    return tuple(x) if len(x) == rank else (x[0],) * rank
