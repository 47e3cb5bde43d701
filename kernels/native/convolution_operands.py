"""The operands of a convolution as the driver reads and writes them: matrices, or patches of an image.

Arithmetic on sizes and strides. See kernels/cpu/patches_args.py.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from typing import NamedTuple

from ..cpu import patches_args as p

Sizes = Sequence[int]
WORD = "q"  # an array of int64, which is made in a sixth of the time that ctypes takes


class Phase(NamedTuple):
    """Pixels first, first + step, … of a dimension of dX, ``size`` of them.

    Pixel q sums over u < taps the products of tap tap + u · every and of dY at start + q + u · by.
    """

    first: int
    step: int
    size: int
    tap: int
    every: int
    taps: int
    start: int
    by: int


def phases(size: int, kernel: int, stride: int, padding: int, dilation: int) -> list[Phase]:
    """The phases of one dimension, those of no tap included.

    >>> [(x.first, x.tap, x.every, x.taps, x.start, x.by) for x in phases(5, 3, 2, 1, 1)]
    [(0, 1, 2, 1, 0, -1), (1, 0, 2, 2, 1, -1)]
    """
    common, found = math.gcd(stride, dilation), []
    every = stride // common  # taps of one phase are so far apart
    for first in range(min(stride, size)):
        reached = [tap for tap in range(min(every, kernel)) if (first + padding - tap * dilation) % stride == 0]
        tap = reached[0] if reached else kernel
        start, pixels = (first + padding - tap * dilation) // stride, (size - first - 1) // stride + 1
        count = len(range(tap, kernel, every))
        found.append(Phase(first, stride, pixels, tap, every, count, start, -(dilation // common)))
    return found


class View(NamedTuple):
    """Where the elements of a tensor, or of a part of one, are; ``item`` bytes each.

    dense: the distance of the pixels of a sample, where they have one.
    """

    address: int
    item: int
    sizes: Sizes
    strides: Sizes
    dense: int | None


class Side(NamedTuple):
    """One index of an operand: its outer stride, and of each dimension the extent and the step in the image."""

    outer: int
    extents: Sizes
    steps: Sizes


class Window(NamedTuple):
    """What a convolution reads of an image: pixel i and tap t at i · stride + t · dilation + start."""

    image: View
    stride: Sizes
    taps: Sizes
    dilation: Sizes
    start: Sizes

    def is_pixel(self, pixels: Sizes) -> bool:
        """Whether it is the pixel itself, and so the operand a matrix."""
        image = self.image.sizes[2:]
        return (
            max(self.taps) == 1
            and not any(self.start)
            and (max(self.stride) == 1 or max(image) == 1)
            and (tuple(image) == tuple(pixels))
        )


class Operand(NamedTuple):
    """As the driver reads it: strides of its free index and of k, the distance of groups; patches, or None."""

    address: int
    free: int
    k: int
    group: int
    patches: array[int] | None = None


def view_of(sizes: Sizes, strides: Sizes, item: int) -> View:
    """Of a whole tensor; addresses are relative to its own."""
    return View(0, item, sizes, strides, one_stride(sizes, strides))


def part_of(whole: View, phase: Sequence[Phase]) -> View:
    """The pixels of a phase."""
    _, item, (samples, channels, *_), (sample, channel, *distances), _ = whole
    offset = sum([x.first * distance for x, distance in zip(phase, distances)])
    strides = sample, channel, *[x.step * distance for x, distance in zip(phase, distances)]
    sizes = samples, channels, *[x.size for x in phase]
    return View(whole.address + offset * item, item, sizes, strides, one_stride(sizes, strides))


def patches_of(image: View, free: Side, k: Side, start: Sizes, group: int) -> Operand:
    """Patches of an image; ``start`` is the coordinate of pixel 0 and tap 0."""
    ones, zeros = (1,) * (p.DIMENSIONS - len(start)), (0,) * (p.DIMENSIONS - len(start))
    words = (
        image.address, free.outer, k.outer, *ones, *free.extents, *ones, *k.extents, *zeros, *free.steps,
        *zeros, *k.steps, *zeros, *start, *ones, *image.sizes[2:], *zeros, *image.strides[2:],
    )  # fmt: skip
    return Operand(0, p.FREE_STRIDE, p.K_STRIDE, group, array(WORD, words))


def filter_of(w: View, rows: int, groups: int, phase: Sequence[Phase] = ()) -> Operand:
    """Rows of a filter, of its output channels (0) or its input channels (1), by the other channel and the tap.

    Of a phase, by the taps of it. Groups are cut from the output channels.
    """
    kernel, channels, distances = w.sizes[2:], w.sizes[0] // groups, w.strides[2:]
    taps = [x.taps for x in phase] if phase else kernel
    count, along, across = math.prod(taps), w.strides[rows], w.strides[1 - rows]
    if count == 1 and (math.prod(kernel) == 1 or 1 in (along, across)):
        first = sum([x.tap * distance for x, distance in zip(phase, distances)])
        return Operand(w.address + first * w.item, along, across, channels * w.strides[0])
    whole, group = list(taps) == list(kernel), channels * (count * p.K_STRIDE if rows else p.FREE_STRIDE)
    if whole and w.dense is not None:
        if across == w.dense * count:
            return Operand(w.address, along, w.dense, channels * w.strides[0])
        return rows_of_pixels(w, rows, group)
    ones, zeros = (1,) * len(kernel), (0,) * len(kernel)
    every, first_taps = ([x.every for x in phase], [x.tap for x in phase]) if phase else (ones, zeros)
    return patches_of(w, Side(along, ones, zeros), Side(across, taps, every), first_taps, group)


def rows_of_pixels(image: View, rows: int, group: int) -> Operand:
    """Rows along dimension ``rows`` of an image's first two, by the other of them and all its pixels."""
    if image.dense is not None:
        sizes, strides = (*image.sizes[:2], math.prod(image.sizes[2:])), (*image.strides[:2], image.dense)
        image = image._replace(sizes=sizes, strides=strides)
    ones, zeros = (1,) * (len(image.sizes) - 2), (0,) * (len(image.sizes) - 2)
    free, k = Side(image.strides[rows], ones, zeros), Side(image.strides[1 - rows], image.sizes[2:], ones)
    return patches_of(image, free, k, zeros, group)


def one_stride(sizes: Sizes, strides: Sizes) -> int | None:
    """The distance of the pixels of a sample, where they have one."""
    distance, extent = None, 1  # an expanded gradient has distance 0
    for size, stride in zip(reversed(sizes[2:]), reversed(strides[2:])):
        if size == 1:
            continue
        if distance is None:
            distance = stride
        elif stride != distance * extent:
            return None
        extent *= size
    return 1 if distance is None else distance


class Result(NamedTuple):
    """As the driver writes it: strides of rows and columns; whether something is added, by rows; runs of both, or None.

    is_wide: whether it has float32 of 16-bit operands.
    """

    address: int
    row: int
    column: int
    has_source: bool = False
    source_row: int = 0
    columns: array[int] | None = None
    rows: array[int] | None = None
    is_wide: bool = False


class Batch(NamedTuple):
    """Products, and the distances in A, B, C and what is added from one to the next."""

    products: int = 1
    a: int = 0
    b: int = 0
    c: int = 0
    source: int = 0


def columns_of_pixels(window: Window, pixels: Sizes, of_group: int, joined: bool) -> Operand | None:
    """Columns that are the pixels of a sample, or of all of them, where those have one distance and no taps."""
    image = window.image
    dense = image.dense if window.is_pixel(pixels) else None
    if dense is None or (joined and image.strides[0] != math.prod(pixels) * dense):
        return None
    return Operand(image.address, dense, image.strides[1], of_group * image.strides[1])


def runs(extents: Sizes, strides: Sizes, outer: int, source: int = 0) -> array[int]:
    """Rows or columns of C that count (outer, extents): where they are, and what is added to those of an outer one."""
    missing = p.DIMENSIONS - len(extents)
    return array(WORD, (*(1,) * missing, *extents, outer, *(0,) * missing, *strides, source))
