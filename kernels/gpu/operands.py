"""Checks of the tensors of a launch: whether they fit each other, and their layout in memory."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from . import settings
from .arguments import Strides
from .config import ALIGNMENT, ITEM_BYTES, PADDING, Problem, cdiv, layout
from .gemm import gemm

SUPPORTED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
NAMES = {dtype: str(dtype).removeprefix("torch.") for dtype in SUPPORTED}
NAMES_OF_8_BITS = {dtype: str(dtype).removeprefix("torch.") for dtype in (torch.float8_e4m3fn, torch.float8_e5m2)}
ALL_NAMES = NAMES | NAMES_OF_8_BITS

# Triton decides this once, when it decorates the kernel.
INTERPRETED = not isinstance(gemm, triton.JITFunction)


def checked_shape(a: Tensor, b: Tensor, out: Tensor | None) -> tuple[int, ...]:
    """Shape of the product, or a ValueError that names what does not fit."""
    if not a.dim() == b.dim() in (2, 3) or a.shape[-1] != b.shape[-2] or a.shape[:-2] != b.shape[:-2]:
        raise ValueError(f"cannot multiply shapes {tuple(a.shape)} and {tuple(b.shape)}")
    if a.dtype != b.dtype or a.dtype not in NAMES:
        pairs = ", ".join(NAMES.values())
        raise ValueError(f"cannot multiply {a.dtype} and {b.dtype}: supported are pairs of {pairs}")
    if a.device != b.device or not (a.is_cuda or INTERPRETED):
        raise ValueError(f"cannot multiply on {a.device} and {b.device}: both operands must be on one GPU")
    shape = (*a.shape[:-1], b.shape[-1])
    if out is not None and (
        tuple(out.shape) != shape or out.dtype not in results_of(a.dtype) or out.device != a.device
    ):
        kinds = " or ".join(map(str, results_of(a.dtype)))
        raise ValueError(f"out must be {shape}, {kinds}, on {a.device}")
    return shape


def results_of(dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    """The dtypes in which the product of two matrices can be stored: their own, and for 16 bits the sums themselves."""
    return (dtype, torch.float32) if dtype.itemsize == 2 else (dtype,)


def strides_of_source(source: Tensor, dtype: torch.dtype, device: torch.device, shape: tuple[int, ...]) -> Strides:
    """The strides of the source of an epilogue, expanded to the shape of the product; or a ValueError."""
    sizes = zip(reversed(source.shape), reversed(shape), strict=False)
    if source.dim() > len(shape) or any(size not in (1, whole) for size, whole in sizes):
        raise ValueError(f"cannot add {tuple(source.shape)} to {shape}")
    if source.dtype != dtype or source.device != device:
        raise ValueError(f"cannot add {source.dtype} on {source.device} to {dtype} on {device}")
    return strides_of(source.expand(shape))


def describe(a: Tensor, b: Tensor, c: Tensor, precision: str) -> Problem:
    """The problem that `choose` decides on: sizes, dtype, layouts, precision, alignment."""
    return Problem(
        m=a.shape[-2],
        n=b.shape[-1],
        k=a.shape[-1],
        dtype=ALL_NAMES[a.dtype],
        a=layout(*a.stride()[-2:]),
        b=layout(*b.stride()[-2:]),
        precision=precision if a.dtype == torch.float32 else "ieee",
        aligned=is_aligned(a) and is_aligned(b),
        tma=fits_tma(a) and fits_tma(b) and c.stride(-1) == 1,
        batch=a.shape[0] if a.dim() == 3 else 1,
        invariant=settings.invariant,
        result="" if c.dtype == a.dtype else NAMES[c.dtype],
    )


def strides_of(x: Tensor) -> Strides:
    batch = x.stride(0) if x.dim() == 3 and x.shape[0] > 1 else 0
    return Strides(x.stride(-2), x.stride(-1), batch)


def adjacent(x: Tensor) -> tuple[int, list[int]] | None:
    """Size of the dimension whose elements are adjacent, and the other strides that are used; None without one."""
    (rows, cols), (row_stride, col_stride) = x.shape[-2:], x.stride()[-2:]
    outer = [x.stride(0)] if x.dim() == 3 and x.shape[0] > 1 else []
    if col_stride == 1:
        return cols, [row_stride, *outer]
    return (rows, [col_stride, *outer]) if row_stride == 1 else None


def is_aligned(x: Tensor) -> bool:
    """Whether Triton can use 16-byte loads: a stride of 1, and size, other strides and address are divisible by 16."""
    found = adjacent(x)
    if found is None:
        return False
    return all(size % ALIGNMENT == 0 for size in (found[0], *found[1])) and x.data_ptr() % 16 == 0


def fits_tma(x: Tensor) -> bool:
    """Whether TMA can read and write a matrix: the one rule of alignment, for m, n and k alike.

    One stride of 1; address, rows and every other stride in whole 16 bytes (a store writes whole chunks); no stride
    of 0; sizes that 32 bits hold. A meta tensor stands for new memory, which is aligned.
    """
    found = adjacent(x)
    if found is None or x.dtype not in ALL_NAMES or max(x.shape) >= 2**31:
        return False
    item = ITEM_BYTES[ALL_NAMES[x.dtype]]
    extents = (found[0], *found[1])
    whole = all(size > 0 and size * item % 16 == 0 and size * item < 2**40 for size in extents)
    return whole and (x.is_meta or x.data_ptr() % 16 == 0)


def padded(x: Tensor) -> Tensor:
    """A copy of a 16-bit matrix, or of a batch, that TMA can read: its adjacent dimension ends in zeros.

    Layout "T" stays "T"; of the others rows are copied.
    """
    if layout(*x.stride()[-2:]) == "T":
        return padded(x.mT).mT
    cols = x.shape[-1]
    copy = x.new_empty((*x.shape[:-1], cdiv(cols, PADDING) * PADDING))
    copy[..., cols:].zero_()
    copy[..., :cols].copy_(x)
    return copy[..., :cols]
