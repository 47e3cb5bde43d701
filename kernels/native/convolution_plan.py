"""Convolutions as calls of the driver of the GEMM: arithmetic on sizes and strides alone, remembered for the last ones.

    C[co, (b, pixel)]      = Σ_{ci, tap} W[co, (ci, tap)] · X[b, ci, pixel · stride + tap · dilation - padding]
    dX[ci, (b, pixel)]     = Σ_{co, tap} W[co, ci, tap] · dY[b, co, (pixel + padding - tap · dilation) / stride]
    dW[co, (ci, tap)]      = Σ_{b, pixel} dY[b, co, pixel] · X[b, ci, pixel · stride + tap · dilation - padding]

dX is gathered: pixels whose coordinates have one remainder of division by the stride are reached by the same taps, so
each of those phases is one product. Groups are a batch of products, and so are the samples of large images.

A plan holds a few hundred numbers, no tensor and nothing compiled. The last REMEMBERED of them are kept, of all shapes.
"""

from __future__ import annotations

import functools
import itertools
import math
from array import array
from typing import Any, NamedTuple

from ..cpu import gemm_args as g
from ..cpu import patches_args as p
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

MANY_PIXELS = 1024  # of an image, from which on a sample is a product of its own: below, panels would be cut too often
SHORTEST_RUN = 4  # taps in a row, from which on they are stored as a run of their own
REMEMBERED = 256  # plans of each of the three
WIDE_BYTES = 4  # of an element of a result that is wider than the operands
UNUSED = (0,) * (g.GEMM_ARGS - g.SOURCE)  # arguments that most products leave as they are


class Layout(NamedTuple):
    """Sizes and strides of a tensor."""

    sizes: Sizes
    strides: Sizes


class Arguments(NamedTuple):
    """What three plans share: one number of each dimension, and the bytes of an element."""

    stride: Sizes
    padding: Sizes
    dilation: Sizes
    groups: int
    item: int


class Call(NamedTuple):
    """The words of a call of the driver, followed by the descriptions of its operands.

    Addresses in them are relative to those of the tensors: that of A is added to word ``a``, that of B to word ``b``.
    ``pointers`` are words, and the descriptions, in bytes, that they point at. The call is made ``times``; from one to
    the next ``steps`` are added to words.
    """

    words: array[int]
    a: int
    b: int
    pointers: tuple[tuple[int, int], ...]
    times: int
    steps: tuple[tuple[int, int], ...]


class Plan(NamedTuple):
    """The calls for a result of this layout. swapped: A is the image, not the filter.

    unreached: parts of the result that no tap reaches.
    """

    result: Layout
    calls: tuple[Call, ...]
    swapped: bool = False
    unreached: tuple[Any, ...] = ()


@functools.lru_cache(maxsize=REMEMBERED)
def forward_plan(image: Layout, filters: Layout, bias: int | None, arguments: Arguments) -> Plan:
    """Of a convolution; ``bias`` is the stride of one."""
    stride, padding, dilation, groups, item = arguments
    x, w = view_of(*image, item), view_of(*filters, item)
    kernel = w.sizes[2:]
    pixels = [
        (size + 2 * pad - by * (taps - 1) - 1) // step + 1
        for size, pad, by, taps, step in zip(x.sizes[2:], padding, dilation, kernel, stride)
    ]
    result = _like(image, (x.sizes[0], w.sizes[0], *pixels))
    window = Window(x, stride, kernel, dilation, [-pad for pad in padding])
    return Plan(result, (_convolve(filter_of(w, 0, groups), window, view_of(*result, item), groups, bias),))


@functools.lru_cache(maxsize=REMEMBERED)
def input_gradient_plan(
    grad: Layout, filters: Layout, input_size: Sizes, bias: int | None, arguments: Arguments
) -> Plan:
    """Of the gradient of a convolution's input."""
    stride, padding, dilation, groups, item = arguments
    result, dy, w = _like(grad, input_size), view_of(*grad, item), view_of(*filters, item)
    whole, ones, calls, unreached = view_of(*result, item), (1,) * len(stride), [], []
    if _is_tiled(dy, w, whole, stride, padding, dilation):
        covers = all(size == taps * count for size, taps, count in zip(input_size[2:], w.sizes[2:], dy.sizes[2:]))
        return Plan(result, (_convolve_tiles(dy, w, whole, groups, bias),), True, () if covers else (slice(None),))
    if max(stride) == 1:
        window = Window(dy, ones, w.sizes[2:], [-by for by in dilation], padding)
        return Plan(result, (_convolve(filter_of(w, 1, groups), window, whole, groups, bias),))
    dimensions = zip(input_size[2:], w.sizes[2:], stride, padding, dilation)
    for phase in itertools.product(*[phases(*of_dimension) for of_dimension in dimensions]):
        if not all([x.taps for x in phase]):
            unreached.append((slice(None), slice(None), *[slice(x.first, None, x.step) for x in phase]))
            continue
        window = Window(dy, ones, [x.taps for x in phase], [x.by for x in phase], [x.start for x in phase])
        calls.append(_convolve(filter_of(w, 1, groups, phase), window, part_of(whole, phase), groups, bias))
    return Plan(result, tuple(calls), False, tuple(unreached))


@functools.lru_cache(maxsize=REMEMBERED)
def weight_gradient_plan(grad: Layout, image: Layout, weight_size: Sizes, is_wide: bool, arguments: Arguments) -> Plan:
    """Of the gradient of a convolution's filter; is_wide: in float32, of 16-bit operands."""
    stride, padding, dilation, groups, item = arguments
    dy, x = view_of(*grad, item), view_of(*image, item)
    co, ci, *kernel = weight_size
    pixels, n, rows = dy.sizes[2:], ci * math.prod(kernel), co // groups
    if dy.sizes[0] == 1 and dy.dense is not None:
        a = Operand(dy.address, dy.strides[1], dy.dense, rows * dy.strides[1])
    else:
        a = rows_of_pixels(dy, 1, rows * p.FREE_STRIDE)
    free, k = Side(x.strides[1], kernel, dilation), Side(x.strides[0], pixels, stride)
    b = patches_of(x, free, k, [-pad for pad in padding], n * p.FREE_STRIDE)
    by_group, sizes = Batch(groups, a.group, b.group, rows * n), (rows, n, dy.sizes[0] * math.prod(pixels))
    call = _call(item, sizes, a, b, Result(0, n, 1, is_wide=is_wide), (by_group, Batch()))
    return Plan(Layout(weight_size, _strides(weight_size)), (call,))


# --- products -------------------------------------------------------------------------------------------------


def _convolve(a: Operand, window: Window, c: View, groups: int, bias: int | None) -> Call:
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
    s_rs = bias or 0
    by_group, by_sample = Batch(groups, a.group, b.group, m * c_rs, m * s_rs), Batch()
    if apart:
        by_sample = Batch(samples, 0, step, c.strides[0])
    else:
        n *= samples
    column = 0 if dense is None or columns is not None else dense
    result = Result(c.address, c_rs, column, bias is not None, s_rs, columns)
    return _call(image.item, (m, n, k), a, b, result, (by_group, by_sample))


def _is_tiled(dy: View, w: View, c: View, stride: Sizes, padding: Sizes, dilation: Sizes) -> bool:
    """Whether a pixel of dX is reached by one pixel and one tap, and taps of a row are adjacent, in the filter too."""
    kernel = w.sizes[2:]
    if kernel[-1] < SHORTEST_RUN or c.strides[-1] != 1 or tuple(kernel) != tuple(stride) or any(padding):
        return False
    for size, taps, by, count in zip(c.sizes[2:], kernel, dilation, dy.sizes[2:]):
        if size < taps * count or (by > 1 and taps > 1):
            return False
    return dy.dense is not None and w.dense == 1 and w.strides[1] == math.prod(kernel)


def _convolve_tiles(dy: View, w: View, c: View, groups: int, bias: int | None) -> Call:
    """c[sample, (group, ci), (pixel, tap)] = Σ_co dY[sample, (group, co), pixel] · W[(group, co), ci, tap] + bias"""
    (samples, co, *pixels), (_, ci, *kernel), channel, s_cs = dy.sizes, w.sizes, c.strides[1], bias or 0
    a = Operand(dy.address, dy.dense or 0, dy.strides[1], co // groups * dy.strides[1])
    b = Operand(w.address, 1, w.strides[0], co // groups * w.strides[0])
    columns = runs(kernel, c.strides[2:], channel, s_cs)
    rows = runs(pixels, [taps * distance for taps, distance in zip(kernel, c.strides[2:])], 0)
    batches = Batch(groups, a.group, b.group, ci * channel, ci * s_cs), Batch(samples, dy.strides[0], 0, c.strides[0])
    sizes = math.prod(pixels), ci * math.prod(kernel), co // groups
    return _call(dy.item, sizes, a, b, Result(c.address, 0, 0, bias is not None, 0, columns, rows), batches)


def _call(
    item: int, sizes: tuple[int, int, int], a: Operand, b: Operand, c: Result, batches: tuple[Batch, Batch]
) -> Call:
    """All products of two batches: those of the longer one in one call of the driver."""
    one, other = batches
    inner, outer = (one, other) if one.products >= other.products else (other, one)
    words = array(
        WORD,
        (
            *sizes, a.address, a.free, a.k, b.address, b.k, b.free, c.address, c.row, c.column,
            inner.products, inner.a, inner.b, inner.c, *UNUSED,
        ),
    )  # fmt: skip
    words[g.ALPHA] = words[g.BETA] = g.ONE
    words[g.WIDE] = int(c.is_wide)
    if c.has_source:
        words[g.S_RS], words[g.S_BS] = c.source_row, inner.source
    c_item, pointers, places = WIDE_BYTES if c.is_wide else item, [], {g.A_PATCHES: g.A, g.B_PATCHES: g.B}
    described = (g.A_PATCHES, a.patches), (g.B_PATCHES, b.patches), (g.C_RUNS, c.columns), (g.C_ROWS, c.rows)
    for word, description in described:
        if description is not None:
            places[word] = len(words) + p.ADDRESS
            pointers.append((word, len(words) * words.itemsize))
            words.extend(description)
    steps = [(g.A, outer.a * item), (g.B, outer.b * item), (g.C, outer.c * c_item)]
    if c.has_source:
        steps.append((g.SOURCE, outer.source * item))
    return Call(words, places[g.A_PATCHES], places[g.B_PATCHES], tuple(pointers), outer.products, tuple(steps))


def _like(image: Layout, sizes: Sizes) -> Layout:
    """Of a new tensor in the memory format of an image."""
    is_last = _matches(image, _strides(image.sizes, True)) and not _matches(image, _strides(image.sizes))
    if is_last and len(sizes) > 3:
        return Layout(sizes, _strides(sizes, True))
    return Layout(sizes, _strides(sizes))


def _matches(layout: Layout, strides: Sizes) -> bool:
    """Whether its elements lie as with these strides."""
    return all(size == 1 or one == other for size, one, other in zip(*layout, strides))


def _strides(sizes: Sizes, channels_last: bool = False) -> tuple[int, ...]:
    """Of a tensor without gaps.

    >>> _strides((2, 3, 4, 5)), _strides((2, 3, 4, 5), channels_last=True)
    ((60, 20, 5, 1), (60, 1, 15, 3))
    """
    order = [*range(len(sizes))] if not channels_last else [0, *range(2, len(sizes)), 1]
    strides, step = [0] * len(sizes), 1
    for dimension in reversed(order):
        strides[dimension] = step
        step *= sizes[dimension]
    return tuple(strides)
