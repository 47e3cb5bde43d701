"""Grouped products that the tests of the interpreter and of a GPU share: exact integers, in NaN canaries."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from gpu_cases import DTYPES
from products import assert_exact
from torch import Tensor

FORMS = ("rows", "columns", "steps")
# In units of one tile of 16: balanced, skewed, empty ones at the start, between and at the end, rows behind the last
# group, none, one, more than a tile each and less.
ENDS = {
    "balanced": (16, 32, 48),
    "skewed": (3, 40, 41, 53),
    "empty": (0, 0, 7, 7, 37, 37),
    "none": (0, 0),
    "one": (53,),
    "many": tuple(range(1, 54, 8)),
}
LAYOUTS = ("N", "T", "S")


class Sizes(NamedTuple):
    """whole is cut at ENDS times `scale`; m, n and k are the others."""

    whole: int = 53
    m: int = 19
    n: int = 35
    k: int = 24
    scale: int = 1


SIZES, TMA_SIZES = Sizes(), Sizes(160, 72, 40, 24, scale=3)  # more than a tile of 64 a group, in whole 16 bytes


def shapes(form: str, groups: int, sizes: Sizes = SIZES) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Of a, b and the result."""
    whole, m, n, k, _ = sizes
    if form == "rows":
        return (whole, k), (groups, k, n), (whole, n)
    if form == "columns":
        return (groups, m, k), (k, whole), (m, whole)
    return (m, whole), (whole, n), (groups, m, n)


def integers(shape: Sequence[int], dtype: torch.dtype, seed: int) -> Tensor:
    """-1, 0 and 1: the sums of these cases are exact in every dtype."""
    return torch.randint(-1, 2, tuple(shape), generator=torch.Generator().manual_seed(seed)).to(dtype)


def embed(values: Tensor, layout: str, aligned: bool = False) -> Tensor:
    """The values as a view in the middle of a buffer of NaN; aligned: strides and address divide by 16 elements."""
    if layout == "T":
        return embed(values.mT, "N", aligned).mT
    *front, rows, cols = values.shape
    step = 2 if layout == "S" else 1
    width = (cols * step + 32 + 15) // 16 * 16 if aligned else cols * step + 10
    buffer = values.new_full((*(size + 2 for size in front), rows * step + 6, width), math.nan)
    inside = [slice(1, 1 + size) for size in front]
    first = 16 if aligned else 5
    view = buffer[(*inside, slice(3, 3 + rows * step, step), slice(first, first + cols * step, step))]
    view.copy_(values)
    return view


def expected(form: str, ends: Sequence[int], a: Tensor, b: Tensor, sizes: Sizes = SIZES) -> Tensor:
    """In float64, zero where there is no group."""
    out = torch.zeros(shapes(form, len(ends), sizes)[2], dtype=torch.float64)
    a, b = a.double(), b.double()
    for g, part in enumerate(slice(*pair) for pair in zip((0, *ends), ends)):
        if form == "rows":
            out[part] = a[part] @ b[g]
        elif form == "columns":
            out[:, part] = a[g] @ b[:, part]
        else:
            out[g] = a[:, part] @ b[part]
    return out


def check_exact(
    form: str,
    dtype: str,
    layouts: str,
    names: Sequence[str] = tuple(ENDS),
    device: torch.device | str = "cpu",
    *,
    config: Any = None,
    sizes: Sizes = SIZES,
) -> None:
    """Bits of the exact product, from operands in NaN canaries, into a result in NaN canaries. layouts: a, b, out.

    With TMA_SIZES all of them are where TMA can read them, but for layout "S".
    """
    from matmul_grad.kernels.gpu import grouped

    for name in names:
        ends = tuple(end * sizes.scale for end in ENDS[name])
        made = shapes(form, len(ends), sizes)
        a, b, out = (integers(shape, DTYPES[dtype], seed) for seed, shape in enumerate(made))
        want = expected(form, ends, a, b, sizes).to(out.dtype)
        tensors = zip((a, b, out), layouts, strict=True)
        a, b, out = (embed(x.to(device), letter, sizes == TMA_SIZES) for x, letter in tensors)
        offs = torch.tensor(ends, dtype=torch.int32, device=device)
        assert grouped.supports(a, b, offs, out)
        out.fill_(math.nan)
        assert grouped.product(a, b, offs, out, config=config) is out
        assert_exact(out.cpu(), want)
        assert out._base is not None
        out.fill_(math.nan)
        assert bool(out._base.isnan().all()), f"written outside of the result: {form} {dtype} {layouts} {name}"
