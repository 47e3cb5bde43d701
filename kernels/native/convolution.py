"""Convolutions on CPU: the driver of the GEMM, with an operand that is patches of an image (patches_args.py).

    C[co, (b, pixel)]      = Σ_{ci, tap} W[co, (ci, tap)] · X[b, ci, pixel · stride + tap · dilation - padding]
    dX[ci, (b, pixel)]     = Σ_{co, tap} W[co, ci, tap] · dY[b, co, (pixel + padding - tap · dilation) / stride]
    dW[co, (ci, tap)]      = Σ_{b, pixel} dY[b, co, pixel] · X[b, ci, pixel · stride + tap · dilation - padding]

Sums run in the order in which their indices stand here, so an element of C depends on its window and its filter, and
one of dX on the gradients that reach it: not on the batch, the size of the image, the layout or the number of threads.
dX is gathered: pixels whose coordinates have one remainder of division by the stride are reached by the same taps, so
each of those phases is one product. Groups are a batch of products, and so are the samples of large images. Nothing is
allocated but the result.
"""

from __future__ import annotations

import functools
import itertools
import math
from array import array
from typing import Any

import torch
from torch import Tensor

from ..cpu import driver
from ..cpu import gemm_args as g
from ..cpu import patches_args as p
from ..cpu.config import BlockConfig
from . import direct
from .convolution_operands import (
    WORD,
    Batch,
    Operand,
    Result,
    Side,
    Sizes,
    View,
    Window,
    columns_of_pixels,
    filter_of,
    part_of,
    patches_of,
    phases,
    rows_of_pixels,
    runs,
    view_of,
)
from .torch_layout import const_data_ptr, has_thread_pool

MOST_PIXELS = 1 << 27  # of a batch: an index of them and a step of k share the 64 bits of an address, see FREE_STRIDE
MANY_PIXELS = 1024  # of an image, from which on a sample is a product of its own: below, panels would be cut too often
SHORTEST_RUN = 4  # taps in a row, from which on they are stored as a run of their own
UNUSED = (0,) * (g.GEMM_ARGS - g.SOURCE)  # arguments that most products leave as they are


def supports(input: Tensor, weight: Tensor) -> bool:
    """Whether these kernels compute convolutions of two dense tensors with 1 to 3 spatial dimensions.

    Batches of more than MOST_PIXELS are torch's, and dtypes without kernels.
    """
    if not input.is_cpu or not weight.is_cpu or input.dtype is not weight.dtype:
        return False
    if input.layout is not torch.strided or weight.layout is not torch.strided or not 3 <= input.dim() <= 5:
        return False
    if input.numel() > MOST_PIXELS * input.shape[1] or weight.numel() > MOST_PIXELS * weight.shape[1]:
        return False
    return direct.supports(input.dtype)


def forward(
    input: Tensor, weight: Tensor, bias: Tensor | None, stride: Sizes, padding: Sizes, dilation: Sizes, groups: int
) -> Tensor:
    """The convolution of a batch, in the memory format of ``input``; no size is 0.

    input (n, ci, …), weight (co, ci / groups, …), bias (co) or None; stride, padding and dilation of each dimension.
    """
    x, w = view_of(input), view_of(weight)
    kernel = w.sizes[2:]
    pixels = [
        (size + 2 * pad - by * (taps - 1) - 1) // step + 1
        for size, pad, by, taps, step in zip(x.sizes[2:], padding, dilation, kernel, stride)
    ]
    out = _empty(input, (x.sizes[0], w.sizes[0], *pixels))
    window = Window(x, stride, kernel, dilation, [-pad for pad in padding])
    _convolve(filter_of(w, 0, groups), window, view_of(out, True), groups, bias, out.dtype)
    return out


def input_gradient(
    grad: Tensor,
    weight: Tensor,
    input_size: Sizes,
    stride: Sizes,
    padding: Sizes,
    dilation: Sizes,
    groups: int,
    bias: Tensor | None = None,
) -> Tensor:
    """The gradient of a convolution's input, or with a bias (ci) a transposed convolution; no size is 0."""
    out, dy, w = _empty(grad, input_size), view_of(grad), view_of(weight)
    whole, ones = view_of(out, True), (1,) * len(stride)
    if _is_tiled(dy, w, whole, stride, padding, dilation):
        if any(size != taps * count for size, taps, count in zip(input_size[2:], w.sizes[2:], dy.sizes[2:])):
            _fill(out, bias)
        _convolve_tiles(dy, w, whole, groups, bias, out.dtype)
        return out
    if max(stride) == 1:
        window = Window(dy, ones, w.sizes[2:], [-by for by in dilation], padding)
        _convolve(filter_of(w, 1, groups), window, whole, groups, bias, out.dtype)
        return out
    dimensions = zip(input_size[2:], w.sizes[2:], stride, padding, dilation)
    for phase in itertools.product(*[phases(*of_dimension) for of_dimension in dimensions]):
        if not all([x.taps for x in phase]):
            _fill(out[(slice(None), slice(None), *[slice(x.first, None, x.step) for x in phase])], bias)
            continue
        window = Window(dy, ones, [x.taps for x in phase], [x.by for x in phase], [x.start for x in phase])
        _convolve(filter_of(w, 1, groups, phase), window, part_of(whole, phase), groups, bias, out.dtype)
    return out


def weight_gradient(
    grad: Tensor, input: Tensor, weight_size: Sizes, stride: Sizes, padding: Sizes, dilation: Sizes, groups: int
) -> Tensor:
    """The gradient of a convolution's filter; no size is 0."""
    out, dy, x = grad.new_empty(weight_size), view_of(grad), view_of(input)
    co, ci, *kernel = weight_size
    pixels, n, rows = dy.sizes[2:], ci * math.prod(kernel), co // groups
    if dy.sizes[0] == 1 and dy.dense is not None:
        a = Operand(dy.address, dy.strides[1], dy.dense, rows * dy.strides[1])
    else:
        a = rows_of_pixels(dy, 1, rows * p.FREE_STRIDE)
    free, k = Side(x.strides[1], kernel, dilation), Side(x.strides[0], pixels, stride)
    b = patches_of(x, free, k, [-pad for pad in padding], n * p.FREE_STRIDE)
    by_group, sizes = Batch(groups, a.group, b.group, rows * n), (rows, n, dy.sizes[0] * math.prod(pixels))
    _run(out.dtype, sizes, a, b, Result(out.data_ptr(), n, 1), (by_group, Batch()))
    return out


# --- products -------------------------------------------------------------------------------------------------


def _convolve(a: Operand, window: Window, c: View, groups: int, bias: Tensor | None, dtype: torch.dtype) -> None:
    """c[sample, (group, i), pixel] = Σ_p a[group, i, p] · b[group, p, (sample, pixel)] + bias[group, i]"""
    image, (samples, channels, *pixels), c_rs = window.image, c.sizes, c.strides[1]
    m, n, of_group, dense = channels // groups, math.prod(pixels), image.sizes[1] // groups, c.dense
    k, step, columns = of_group * math.prod(window.taps), image.strides[0], None
    apart = dense is not None and (samples == 1 or n >= MANY_PIXELS)  # a sample is a product
    joined = dense is not None and c.strides[0] == n * dense  # all samples are one, in a C of two strides
    b = columns_of_pixels(window, pixels, of_group, not apart) if apart or joined else None
    if b is None:
        free, of_k = Side(step, pixels, window.stride), Side(image.strides[1], window.taps, window.dilation)
        b, step = patches_of(image, free, of_k, window.start, k * p.K_STRIDE), n * p.FREE_STRIDE
    if not (apart or joined):
        columns = runs(pixels, c.strides[2:], c.strides[0]) if dense is None else runs([n], [dense], c.strides[0])
    source, s_rs = (0, 0) if bias is None else (const_data_ptr(bias), bias.stride(0))
    by_group, by_sample = Batch(groups, a.group, b.group, m * c_rs, m * s_rs), Batch()
    if apart:
        by_sample = Batch(samples, 0, step, c.strides[0])
    else:
        n *= samples
    result = Result(c.address, c_rs, 0 if dense is None or columns is not None else dense, source, s_rs, columns)
    _run(dtype, (m, n, k), a, b, result, (by_group, by_sample))


def _is_tiled(dy: View, w: View, c: View, stride: Sizes, padding: Sizes, dilation: Sizes) -> bool:
    """Whether a pixel of dX is reached by one pixel and one tap, and taps of a row are adjacent, in the filter too."""
    kernel = w.sizes[2:]
    if kernel[-1] < SHORTEST_RUN or c.strides[-1] != 1 or tuple(kernel) != tuple(stride) or any(padding):
        return False
    for size, taps, by, count in zip(c.sizes[2:], kernel, dilation, dy.sizes[2:]):
        if size < taps * count or (by > 1 and taps > 1):
            return False
    return dy.dense is not None and w.dense == 1 and w.strides[1] == math.prod(kernel)


def _convolve_tiles(dy: View, w: View, c: View, groups: int, bias: Tensor | None, dtype: torch.dtype) -> None:
    """c[sample, (group, ci), (pixel, tap)] = Σ_co dY[sample, (group, co), pixel] · W[(group, co), ci, tap] + bias"""
    (samples, co, *pixels), (_, ci, *kernel), channel = dy.sizes, w.sizes, c.strides[1]
    source, s_cs = (0, 0) if bias is None else (const_data_ptr(bias), bias.stride(0))
    a = Operand(dy.address, dy.dense or 0, dy.strides[1], co // groups * dy.strides[1])
    b = Operand(w.address, 1, w.strides[0], co // groups * w.strides[0])
    columns = runs(kernel, c.strides[2:], channel, s_cs)
    rows = runs(pixels, [taps * distance for taps, distance in zip(kernel, c.strides[2:])], 0)
    batches = Batch(groups, a.group, b.group, ci * channel, ci * s_cs), Batch(samples, dy.strides[0], 0, c.strides[0])
    sizes = math.prod(pixels), ci * math.prod(kernel), co // groups
    _run(dtype, sizes, a, b, Result(c.address, 0, 0, source, 0, columns, rows), batches)


def _fill(part: Tensor, bias: Tensor | None) -> None:
    """Pixels that no tap reaches."""
    part.copy_(torch.zeros((), dtype=part.dtype) if bias is None else bias.view(-1, *[1] * (part.dim() - 2)))


def _run(
    dtype: torch.dtype, sizes: tuple[int, int, int], a: Operand, b: Operand, c: Result, batches: tuple[Batch, Batch]
) -> None:
    """All products of two batches: those of the longer one in one call of the driver."""
    one, other = batches
    inner, outer = (one, other) if one.products >= other.products else (other, one)
    call, threads = _driver(dtype), torch.get_num_threads() if has_thread_pool() else 1
    words = (
        *sizes, a.address, a.free, a.k, b.address, b.k, b.free, c.address, c.row, c.column,
        inner.products, inner.a, inner.b, inner.c,
    )  # fmt: skip
    args = array(WORD, words + UNUSED)
    args[g.ALPHA] = args[g.BETA] = g.ONE
    if c.source:
        args[g.SOURCE], args[g.S_RS], args[g.S_BS] = c.source, c.source_row, inner.source
    for word, described in (
        (g.A_PATCHES, a.patches),
        (g.B_PATCHES, b.patches),
        (g.C_RUNS, c.columns),
        (g.C_ROWS, c.rows),
    ):
        if described is not None:
            args[word] = described.buffer_info()[0]
    address = args.buffer_info()[0]
    for item in range(outer.products):
        if item:
            for word, step in ((g.A, outer.a), (g.B, outer.b), (g.C, outer.c), (g.SOURCE, outer.source)):
                args[word] += step * dtype.itemsize
        if call(address, 1, threads):
            raise MemoryError("matmul_grad: the packing buffers cannot be allocated")


@functools.cache
def _driver(dtype: torch.dtype) -> Any:
    return direct.CALL(driver.patches_address(_config(dtype)))


def _config(dtype: torch.dtype) -> BlockConfig:
    return driver.config(str(dtype).removeprefix("torch."))


def _empty(like: Tensor, size: Sizes) -> Tensor:
    """A new result in the memory format of ``like``."""
    if not like.is_contiguous():
        last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(like.dim())
        if last is not None and like.is_contiguous(memory_format=last):
            return torch.empty(tuple(size), dtype=like.dtype, memory_format=last)
    return like.new_empty(tuple(size))
