"""Convolutions of float64 integers for the cases of the tutorial: settings to try, and sums over an image."""

import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from .tools import integers


class Setting(NamedTuple):
    """Of one direction: length, taps, stride, padding, dilation."""

    length: int
    taps: int
    stride: int = 1
    padding: int = 0
    dilation: int = 1

    @property
    def windows(self) -> int:
        return (self.length + 2 * self.padding - self.dilation * (self.taps - 1) - 1) // self.stride + 1

    def place(self, output: int, tap: int) -> int:
        """The element that an output meets under a tap."""
        return self.stride * output + self.dilation * tap - self.padding


# Rows and columns: no setting is alike in both directions, so that none can be taken for the other.
PAIRS = (
    (Setting(3, 2), Setting(4, 3)),
    (Setting(7, 3, 2, 1), Setting(6, 2, 3, 0)),
    (Setting(8, 3, 2, 1), Setting(5, 3, 1, 2)),
    (Setting(9, 3, 1, 2, 2), Setting(8, 2, 2, 1, 3)),
    (Setting(6, 2, 4, 0, 2), Setting(4, 4, 2, 3, 1)),
    (Setting(2, 3, 2, 2, 1), Setting(1, 1, 2, 1, 1)),
)
LINES = tuple(dict.fromkeys(itertools.chain(*PAIRS)))


class Case(NamedTuple):
    """A convolution in general: a batch of two, three channels, two filters, and the direction that comes down."""

    rows: Setting
    columns: Setting
    x: Tensor
    w: Tensor
    bias: Tensor
    g: Tensor

    def forward(self, x: Tensor, w: Tensor, bias: Tensor | None = None, groups: int = 1) -> Tensor:
        pairs = zip(self.rows, self.columns, strict=True)
        _, _, stride, padding, dilation = map(tuple, pairs)
        return functional.conv2d(x, w, bias, stride, padding, dilation, groups)

    def gradients(self, groups: int = 1) -> tuple[Tensor, Tensor, Tensor]:
        """Of the image, the filter and the bias, by torch."""
        leaves = [leaf.clone().requires_grad_() for leaf in (self.x, self.w, self.bias)]
        grads = torch.autograd.grad(self.forward(*leaves, groups), leaves, self.g)
        return grads[0], grads[1], grads[2]


def general(groups: int = 1) -> Iterator[Case]:
    channels, filters = 3 * groups, 2 * groups
    for rows, columns in PAIRS:
        x = integers(2, channels, rows.length, columns.length)
        w = integers(filters, channels // groups, rows.taps, columns.taps, seed=1)
        g = integers(2, filters, rows.windows, columns.windows, seed=3)
        yield Case(rows, columns, x, w, integers(filters, seed=2), g)


def at(x: Tensor, *place: int) -> Tensor:
    """An element; zero outside of the array."""
    inside = all(0 <= index < size for index, size in zip(place, x.shape, strict=True))
    return x[place] if inside else x.new_zeros(())


def every(*sizes: int) -> Iterator[tuple[int, ...]]:
    return itertools.product(*map(range, sizes))


def filled(shape: tuple[int, ...], element: Callable[..., Iterator[Tensor]]) -> Tensor:
    """The array whose elements a formula gives, each a sum of the terms that it yields."""
    result = torch.zeros(shape, dtype=torch.float64)
    for place in every(*shape):
        result[place] = sum(element(*place), start=torch.zeros((), dtype=torch.float64))
    return result
