"""Convolutions on CPU: the driver of the GEMM, with an operand that is patches of an image (patches_args.py).

    C[co, (b, pixel)]      = Σ_{ci, tap} W[co, (ci, tap)] · X[b, ci, pixel · stride + tap · dilation - padding]
    dX[ci, (b, pixel)]     = Σ_{co, tap} W[co, ci, tap] · dY[b, co, (pixel + padding - tap · dilation) / stride]
    dW[co, (ci, tap)]      = Σ_{b, pixel} dY[b, co, pixel] · X[b, ci, pixel · stride + tap · dilation - padding]

Sums run in the order in which their indices stand here, so an element of C depends on its window and its filter, and
one of dX on the gradients that reach it: not on the batch, the size of the image, the layout or the number of threads.
dX is gathered: pixels whose coordinates have one remainder of division by the stride are reached by the same taps, so
each of those phases is one product. Nothing is allocated but the result.
"""

from __future__ import annotations

import ctypes
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..cpu import driver
from ..cpu import gemm_args as g
from ..cpu import patches_args as p
from . import direct
from .torch_layout import const_data_ptr, has_thread_pool

Sizes = Sequence[int]
MOST_PIXELS = 1 << 27  # of a batch: an index of them and a step of k share the 64 bits of an address, see FREE_STRIDE
MANY_PIXELS = 1024  # of an image, from which on a sample is a product of its own: below, panels would be cut too often


def supports(input: Tensor, weight: Tensor) -> bool:
    """Whether these kernels compute convolutions of two dense tensors with 1 to 3 spatial dimensions.

    Batches of more than MOST_PIXELS are torch's, and bfloat16 where the CPU multiplies pairs of it.
    """
    if input.device.type != "cpu" or weight.device.type != "cpu" or input.dtype != weight.dtype:
        return False
    if input.layout != torch.strided or weight.layout != torch.strided or not 3 <= input.dim() <= 5:
        return False
    if any(x.shape[0] * math.prod(x.shape[2:]) > MOST_PIXELS for x in (input, weight)):
        return False
    return direct.supports(input.dtype) and not _block(input).bf16_dot


def forward(
    input: Tensor, weight: Tensor, bias: Tensor | None, stride: Sizes, padding: Sizes, dilation: Sizes, groups: int
) -> Tensor:
    """The convolution of a batch, in the memory format of ``input``; no size is 0.

    input (n, ci, …), weight (co, ci / groups, …), bias (co) or None; stride, padding and dilation of each dimension.
    """
    image, kernel = input.shape[2:], weight.shape[2:]
    pixels = [
        (size + 2 * pad - by * (taps - 1) - 1) // step + 1
        for size, pad, by, taps, step in zip(image, padding, dilation, kernel, stride, strict=True)
    ]
    out = _empty(input, (input.shape[0], weight.shape[0], *pixels))
    start = [-pad for pad in padding]
    for x, w, c, added in zip(*_grouped(groups, (input, 1), (weight, 0), (out, 1)), _parts(bias, groups), strict=True):
        free, k = Side(x.stride(0), pixels, stride), Side(x.stride(1), kernel, dilation)
        _multiply(_filter(w, 0, w.shape[2:]), Patches(x, free, k, start, image, x.stride()[2:]), c, added)
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
    out = _empty(grad, input_size)
    phases = itertools.product(*(
        list(_phases(*of_dimension))
        for of_dimension in zip(input_size[2:], weight.shape[2:], stride, padding, dilation, strict=True)
    ))  # fmt: skip
    image = grad.shape[2:]
    for phase in phases:
        pixels = tuple(slice(x.first, None, x.step) for x in phase)
        part = out[(slice(None), slice(None), *pixels)]
        if not all(x.count for x in phase):
            part.copy_(torch.zeros((), dtype=out.dtype) if bias is None else bias.view(-1, *[1] * len(phase)))
            continue
        taps, start, by = [x.count for x in phase], [x.start for x in phase], [x.by for x in phase]
        tensors = _grouped(groups, (grad, 1), (weight, 0), (part, 1))
        for dy, w, c, added in zip(*tensors, _parts(bias, groups), strict=True):
            free, k = Side(dy.stride(0), part.shape[2:], [1] * len(by)), Side(dy.stride(1), taps, by)
            rows = _filter(w, 1, taps, [x.every for x in phase], [x.tap for x in phase])
            _multiply(rows, Patches(dy, free, k, start, image, dy.stride()[2:]), c, added)
    return out


def weight_gradient(
    grad: Tensor, input: Tensor, weight_size: Sizes, stride: Sizes, padding: Sizes, dilation: Sizes, groups: int
) -> Tensor:
    """The gradient of a convolution's filter; no size is 0."""
    out = grad.new_empty(weight_size)
    kernel, pixels = weight_size[2:], grad.shape[2:]
    start = [-pad for pad in padding]
    for dy, x, c in zip(*_grouped(groups, (grad, 1), (input, 1), (out, 0)), strict=True):
        rows = _dense_rows(dy, 1, pixels)
        free, k = Side(x.stride(1), kernel, dilation), Side(x.stride(0), pixels, stride)
        columns = Patches(x, free, k, start, input.shape[2:], x.stride()[2:])
        matrix = c.reshape(c.shape[0], -1)
        a = rows if (flat := _one_matrix(dy)) is None else flat
        shape = c.shape[0], matrix.shape[1], dy.shape[0] * math.prod(pixels)
        _Call(dy, shape, a, columns, matrix, matrix.stride()).run()
    return out


# --- phases ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Phase:
    """Pixels first, first + step, … of a dimension of dX.

    Pixel q sums over u < count the products of tap tap + u · every and of dY at start + q + u · by.
    """

    first: int
    step: int
    tap: int
    every: int
    count: int
    start: int
    by: int


def _phases(size: int, kernel: int, stride: int, padding: int, dilation: int) -> Iterator[Phase]:
    """The phases of one dimension, those of no tap included.

    >>> [(x.first, x.tap, x.every, x.count, x.start, x.by) for x in _phases(5, 3, 2, 1, 1)]
    [(0, 1, 2, 1, 0, -1), (1, 0, 2, 2, 1, -1)]
    """
    common = math.gcd(stride, dilation)
    every = stride // common  # taps of one phase are so far apart
    for first in range(min(stride, size)):
        reached = [tap for tap in range(min(every, kernel)) if (first + padding - tap * dilation) % stride == 0]
        tap = reached[0] if reached else kernel
        start = (first + padding - tap * dilation) // stride
        count = len(range(tap, kernel, every))
        yield Phase(first, stride, tap, every, count, start, -(dilation // common))


# --- products -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Side:
    """One index of an operand: its outer stride, and of each dimension the extent and the step in the image."""

    outer: int
    extents: Sizes
    steps: Sizes


@dataclass(frozen=True)
class Patches:
    """An operand that is patches of an image; ``start`` is the coordinate of pixel 0 and tap 0."""

    image: Tensor
    free: Side
    k: Side
    start: Sizes
    sizes: Sizes
    strides: Sizes

    def steps(self) -> int:
        """Of k; as many channels as the image has."""
        return self.image.shape[1] * math.prod(self.k.extents)

    def words(self) -> Any:
        rank = len(self.sizes)
        words: Any = (ctypes.c_int64 * p.PATCHES_ARGS)()
        words[: p.FREE_EXTENT] = const_data_ptr(self.image), self.free.outer, self.k.outer
        for at, values, default in (
            (p.FREE_EXTENT, self.free.extents, 1), (p.K_EXTENT, self.k.extents, 1), (p.FREE_STEP, self.free.steps, 0),
            (p.K_STEP, self.k.steps, 0), (p.START, self.start, 0), (p.SIZE, self.sizes, 1),
            (p.STRIDE, self.strides, 0),
        ):  # fmt: skip
            words[at : at + p.DIMENSIONS] = [default] * (p.DIMENSIONS - rank) + list(values)
        return words


@dataclass
class _Call:
    """One call of the driver: of like, a tensor of the dtype, sizes (m, n, k), A a matrix or patches, B patches."""

    like: Tensor
    sizes: tuple[int, int, int]
    a: Tensor | Patches
    b: Patches
    c: Tensor
    c_strides: Sizes
    bias: Tensor | None = None
    batch: tuple[int, int, int] = (1, 0, 0)  # samples, columns of a sample, elements of C from one to the next
    runs: Any = None
    kept: list[Any] = field(default_factory=list)

    def run(self) -> None:
        block = _block(self.like)
        call = direct.CALL(driver.patches_address(block))
        args = (ctypes.c_int64 * g.GEMM_ARGS)(*self.sizes)
        args[g.A_PATCHES] = self._set(args, g.A, g.A_RS, g.A_CS, self.a)
        args[g.B_PATCHES] = self._set(args, g.B, g.B_CS, g.B_RS, self.b)
        args[g.C], (args[g.C_RS], args[g.C_CS]) = self.c.data_ptr(), self.c_strides
        count, columns, c_bs = self.batch
        args[g.BATCH], args[g.B_BS], args[g.C_BS] = count, columns * p.FREE_STRIDE, c_bs
        args[g.ALPHA] = args[g.BETA] = g.ONE
        if self.bias is not None:
            args[g.SOURCE], args[g.S_RS] = const_data_ptr(self.bias), self.bias.stride(0)
        if self.runs is not None:
            args[g.C_RUNS] = ctypes.addressof(self.runs)
        threads = torch.get_num_threads() if has_thread_pool() else 1
        if call(ctypes.addressof(args), 1, threads):
            raise MemoryError("matmul_grad: the packing buffers cannot be allocated")

    def _set(self, args: Any, at: int, free: int, k: int, operand: Tensor | Patches) -> int:
        """Write an operand; the address of its description, or 0."""
        if isinstance(operand, Tensor):
            args[at], (args[free], args[k]) = const_data_ptr(operand), operand.stride()
            return 0
        self.kept.append(operand.words())
        args[free], args[k] = p.FREE_STRIDE, p.K_STRIDE
        return ctypes.addressof(self.kept[-1])


def _multiply(a: Tensor | Patches, b: Patches, c: Tensor, bias: Tensor | None) -> None:
    """c[sample, i, pixel] = Σ_p a[i, p] · b[p, (sample, pixel)] + bias[i]"""
    samples, pixels = c.shape[0], math.prod(c.shape[2:])
    dense = _one_stride(c)
    m, k = c.shape[1], b.steps()
    if dense is not None and (samples == 1 or pixels >= MANY_PIXELS):
        strides, batch = (c.stride(1), dense), (samples, pixels, c.stride(0))
        _Call(c, (m, pixels, k), a, b, c, strides, bias, batch).run()
        return
    if dense is not None and c.stride(0) == pixels * dense:
        _Call(c, (m, samples * pixels, k), a, b, c, (c.stride(1), dense), bias).run()
        return
    runs = (ctypes.c_int64 * p.RUNS_ARGS)(1, 1, 1, c.stride(0), 0, 0, 0)
    if dense is not None:
        runs[p.RUN_EXTENT + 2], runs[p.RUN_STRIDE + 2] = pixels, dense
    else:
        rank = c.dim() - 2
        for d in range(rank):
            at = p.DIMENSIONS - rank + d
            runs[p.RUN_EXTENT + at], runs[p.RUN_STRIDE + at] = c.shape[2 + d], c.stride(2 + d)
    _Call(c, (m, samples * pixels, k), a, b, c, (c.stride(1), 0), bias, runs=runs).run()


def _one_stride(c: Tensor) -> int | None:
    """The distance of the pixels of a sample, where they have one."""
    distance, extent = None, 1  # an expanded gradient has distance 0
    for size, stride in zip(reversed(c.shape[2:]), reversed(c.stride()[2:])):
        if size == 1:
            continue
        if distance is None:
            distance = stride
        elif stride != distance * extent:
            return None
        extent *= size
    return 1 if distance is None else distance


def _one_matrix(grad: Tensor) -> Tensor | None:
    """(co, pixels) of a single sample, where that is a view."""
    dense = _one_stride(grad)
    if grad.shape[0] != 1 or dense is None:
        return None
    return grad.as_strided((grad.shape[1], math.prod(grad.shape[2:])), (grad.stride(1), dense))


def _filter(
    weight: Tensor, rows: int, taps: Sizes, every: Sizes | None = None, first: Sizes | None = None
) -> Tensor | Patches:
    """Rows of a filter, of its output channels (0) or its input channels (1), by the other channel and the tap."""
    kernel, rank = weight.shape[2:], len(taps)
    if math.prod(taps) == 1:
        matrix = weight
        for tap in first or [0] * rank:
            matrix = matrix.select(2, tap)
        return matrix if rows == 0 else matrix.t()
    if list(taps) == list(kernel):
        dense, count = _one_stride(weight), math.prod(kernel)
        if dense is not None and weight.stride(1 - rows) == dense * count:
            return weight.as_strided((weight.shape[rows], weight.shape[1 - rows] * count), (weight.stride(rows), dense))
        return _dense_rows(weight, rows, kernel)
    k = Side(weight.stride(1 - rows), taps, every or [1] * rank)
    free = Side(weight.stride(rows), [1] * rank, [0] * rank)
    return Patches(weight, free, k, first or [0] * rank, kernel, weight.stride()[2:])


def _dense_rows(image: Tensor, rows: int, extents: Sizes) -> Patches:
    """Rows along dimension ``rows`` of an image's first two, by the other of them and all its pixels."""
    strides, dense = image.stride()[2:], _one_stride(image)
    if dense is not None:
        extents, strides = [math.prod(extents)], (dense,)
    ones, zeros = [1] * len(extents), [0] * len(extents)
    free, k = Side(image.stride(rows), ones, zeros), Side(image.stride(1 - rows), extents, ones)
    return Patches(image, free, k, zeros, extents, strides)


def _grouped(groups: int, *tensors: tuple[Tensor, int]) -> Iterator[tuple[Tensor, ...]]:
    """The parts of tensors, each with the dimension of its channels, for every group."""
    return iter([x.chunk(groups, dim) for x, dim in tensors])


def _parts(bias: Tensor | None, groups: int) -> Sequence[Tensor | None]:
    return [None] * groups if bias is None else bias.chunk(groups)


def _empty(like: Tensor, size: Sizes) -> Tensor:
    """A new result in the memory format of ``like``."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    last = formats.get(like.dim())
    if last is not None and like.is_contiguous(memory_format=last) and not like.is_contiguous():
        return torch.empty(tuple(size), dtype=like.dtype, memory_format=last)
    return like.new_empty(tuple(size))


def _block(tensor: Tensor) -> Any:
    return driver.config(str(tensor.dtype).removeprefix("torch."))
