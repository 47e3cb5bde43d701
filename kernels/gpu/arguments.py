"""The arguments of a plan: what stands for a tensor, a number or a descriptor of a call, and tuples of them."""

from __future__ import annotations

from typing import Any, NamedTuple


class PointerArg(NamedTuple):
    """An argument that is the address of a tensor, by the tensor's name."""

    name: str


class ScalarArg(NamedTuple):
    """An argument that is a 32-bit integer of each call, by its name."""

    name: str


class DescriptorArg(NamedTuple):
    """An argument that is a TMA descriptor of a tensor: shape and strides in memory order, and the block it loads."""

    name: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    block: tuple[int, ...]


class Strides(NamedTuple):
    """The strides of a matrix in elements; batch is 0 where there is one product."""

    row: int
    col: int
    batch: int = 0


class Matrix(NamedTuple):
    """A matrix, or a batch of them, as a kernel takes it: address and strides in elements; all None for no matrix."""

    ptr: Any = None
    row: Any = None
    col: Any = None
    batch: Any = None


class Vector(NamedTuple):
    """A vector as a kernel takes it: address and stride in elements; None for no vector."""

    ptr: Any = None
    step: Any = None


class Operands(NamedTuple):
    """One thing of each of A, B and C: their addresses, or their strides."""

    a: Any
    b: Any
    c: Any


class MatvecStrides(NamedTuple):
    """Strides of matrix times vector: of A's rows and columns, of x, of y, and of the partial results of y."""

    row: int
    col: int
    x: int
    y: int
    split: int


class ScalePtrs(NamedTuple):
    """Addresses of the two scales of 8-bit operands; None for others."""

    a: Any = None
    b: Any = None


def is_group(value: Any) -> bool:
    """Whether an argument is a tuple of arguments; an address, a number and a descriptor are one argument each.

    >>> is_group(Operands(PointerArg("a"), PointerArg("b"), PointerArg("c"))), is_group(PointerArg("a")), is_group(3)
    (True, False, False)
    """
    return isinstance(value, tuple) and not isinstance(value, PointerArg | ScalarArg | DescriptorArg)
