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


class Axis(NamedTuple):
    """One spatial dimension of a product over patches: where row digit i and k digit p meet an operand and the result.

    i < rows, p < steps. The coordinate in A is i * row_step + p * k_step + origin, and A is 0 where that is not in
    [0, size). a, b, c: elements between neighbours along it: coordinates of A, digits p of B, digits i of C; start_b
    and start_c are those of p = 0 and of i = 0.
    """

    rows: Any = 1
    steps: Any = 1
    row_step: Any = 1
    k_step: Any = 1
    origin: Any = 1
    size: Any = 1
    a: Any = 1
    b: Any = 1
    c: Any = 1
    start_b: Any = 1
    start_c: Any = 1


class Phase(NamedTuple):
    """One spatial dimension of a strided input gradient, from which the kernel makes the `Axis` of each phase.

    size: of the input. taps, dilation: of the filter. divisor: gcd of stride and dilation. every: stride / divisor, the
    distance of taps that reach one pixel. inverse: of dilation / divisor, modulo `every`.
    """

    stride: Any = 1
    padding: Any = 1
    size: Any = 1
    taps: Any = 1
    dilation: Any = 1
    divisor: Any = 1
    every: Any = 1
    inverse: Any = 1


class Spatial(NamedTuple):
    """A value of each spatial dimension, the last one of the tensors first; those beyond their number are unused."""

    x: Any
    y: Any
    z: Any


class Outer(NamedTuple):
    """The digit of a row and of k that has no coordinate (sample or channel), and the columns: numbers and strides.

    rows, steps: values of the digits. rows_a, k_a: strides of A along them; k_b, cols_b of B; rows_c, cols_c of C.
    """

    rows: int
    steps: int
    rows_a: int
    k_a: int
    k_b: int
    cols_b: int
    rows_c: int
    cols_c: int


class Groups(NamedTuple):
    """The groups of a convolution: their number, and the elements between two of them in A, B and C.

    part: elements between two splits of k in C.
    """

    number: int
    a: int
    b: int
    c: int
    part: int = 0


def is_group(value: Any) -> bool:
    """Whether an argument is a tuple of arguments; an address, a number and a descriptor are one argument each.

    >>> is_group(Operands(PointerArg("a"), PointerArg("b"), PointerArg("c"))), is_group(PointerArg("a")), is_group(3)
    (True, False, False)
    """
    return isinstance(value, tuple) and not isinstance(value, PointerArg | ScalarArg | DescriptorArg)
