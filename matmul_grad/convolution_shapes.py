"""Sizes of convolutions: which operands torch convolves, and the size of a result.

    pixels of a convolution               (size + 2 · padding - reach) // stride + 1
    pixels of a transposed convolution    (size - 1) · stride - 2 · padding + reach + 1 + output_padding

in each dimension, where reach = dilation · (taps - 1). The second is the size of an input whose convolution has
``size`` pixels; ``output_padding`` tells such inputs apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

Sizes = Sequence[int]


class Geometry(NamedTuple):
    """The arguments of a convolution that are no tensors, in the order of ``aten::convolution``."""

    stride: Sizes
    padding: Sizes
    dilation: Sizes
    transposed: bool
    output_padding: Sizes
    groups: int

    def plain(self) -> Geometry:
        """The convolution whose gradient of the input is this transposed one; of a convolution, itself."""
        return self._replace(transposed=False, output_padding=(0,) * len(self.stride))

    def gradient(self, grad: Sizes, weight: Sizes, input: Sizes) -> Geometry:
        """Of the convolution that takes a gradient of the result to one of the input; all three are sizes."""
        if self.transposed:
            return self.plain()
        stride, padding, dilation, _, _, groups = self
        least = [_pixels(*of_dimension, 0) for of_dimension in zip(grad[2:], weight[2:], stride, padding, dilation)]
        more = tuple([whole - size for whole, size in zip(input[2:], least)])
        return Geometry(stride, padding, dilation, True, more, groups)

    def with_groups(self, groups: int) -> Geometry:
        return self._replace(groups=groups)


def untransposed(stride: Sizes, padding: Sizes, dilation: Sizes, groups: int) -> Geometry:
    return Geometry(stride, padding, dilation, False, (0,) * len(stride), groups)


def pixels(input: Sizes, weight: Sizes, geometry: Geometry) -> tuple[int, ...]:
    """The spatial sizes of a result.

    >>> pixels((1, 3, 8), (5, 3, 3), Geometry((2,), (1,), (1,), False, (0,), 1))
    (4,)
    >>> pixels((1, 5, 4), (5, 3, 3), Geometry((2,), (1,), (1,), True, (1,), 1))
    (8,)
    """
    stride, padding, dilation, transposed, output_padding, _ = geometry
    each = zip(input[2:], weight[2:], stride, padding, dilation, output_padding)
    return tuple([_pixels(n, taps, s, p, by, more if transposed else None) for n, taps, s, p, by, more in each])


def _pixels(size: int, taps: int, stride: int, padding: int, dilation: int, more: int | None) -> int:
    """Of one dimension; ``more``: the output_padding of a transposed convolution, None for another."""
    reach = dilation * (taps - 1)
    if more is None:
        return (size - 1 + 2 * padding - reach) // stride + 1
    return (size - 1) * stride - 2 * padding + reach + 1 + more


def channels(weight: Sizes, geometry: Geometry) -> tuple[int, int]:
    """Of the input and of the result."""
    ends = weight[0], weight[1] * geometry.groups
    return ends if geometry.transposed else (ends[1], ends[0])


def fits(input: Sizes, weight: Sizes, bias: Sizes | None, geometry: Geometry) -> bool:
    """Whether torch takes operands of these sizes, of which only the batch may be 0."""
    stride, padding, dilation, transposed, output_padding, groups = geometry
    rank = len(input) - 2
    if rank not in (1, 2, 3) or len(weight) != rank + 2:
        return False
    if not len(stride) == len(padding) == len(dilation) == len(output_padding) == rank:
        return False
    takes, gives = channels(weight, geometry)
    if groups < 1 or weight[0] % groups or input[1] != takes or not (bias is None or tuple(bias) == (gives,)):
        return False
    if weight[0] <= 0 or weight[1] <= 0 or takes <= 0:
        return False
    # One comparison a size: the smaller one of two symbolic sizes would be a guard of compiled code.
    for size, taps, step, pad, by, more in zip(input[2:], weight[2:], stride, padding, dilation, output_padding):
        if step < 1 or pad < 0 or by < 1 or more < 0 or (transposed and more >= step and more >= by):
            return False
        if size <= 0 or taps <= 0 or _pixels(size, taps, step, pad, by, more if transposed else None) <= 0:
            return False
    return True


def fits_gradient(grad: Sizes, input: Sizes, weight: Sizes, geometry: Geometry) -> bool:
    """Whether a filter of this size has a gradient from these; ``geometry`` is that of the convolution of the input."""
    ranks = {len(grad), len(input), len(weight), *(len(x) + 2 for x in geometry[:3])}
    if len(ranks) != 1 or grad[0] != input[0]:
        return False
    back = geometry.gradient(grad, weight, input)
    return channels(weight, geometry)[0] == input[1] and fits(grad, weight, None, back)


def flops(input: Sizes, weight: Sizes, _: Any, *arguments: Any) -> int:
    """2 for each tap of each pixel of the side that has the filter's columns: a transposed one's input."""
    geometry = Geometry(*arguments)
    side = input[2:] if geometry.transposed else pixels(input, weight, geometry)
    return 2 * input[0] * math.prod(weight) * math.prod(side)


def flops_of_gradient(grad: Sizes, _: Any, weight_size: Sizes, *__: Any) -> int:
    return 2 * grad[0] * math.prod(weight_size) * math.prod(grad[2:])
