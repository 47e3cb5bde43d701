"""Grouped products under Triton's interpreter: exact bits, canaries, bits of a group beside others; no GPU needed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from case_process import CaseProcess, assert_no_complaint
from gpu_cases import DTYPES, at_arch, rows_alike, serve_cases, tile, tma
from grouped_cases import (
    ENDS,
    FORMS,
    LAYOUTS,
    SIZES,
    TMA_SIZES,
    check_exact,
    embed,
    expected,
    integers,
    shapes,
)
from products import assert_exact
from torch import Tensor

import matmul_grad
from matmul_grad.testing import assert_same_bits


def check_layouts(form: str, number: int) -> None:
    """In tiles of 16, of which several programs have several each; the layouts of a and b by `number`."""
    first, second = divmod(number, 3)
    layouts = LAYOUTS[first] + LAYOUTS[second] + LAYOUTS[(first + second) % 3]
    names = [("skewed", "none"), ("empty",), ("balanced", "one"), ("many",)][(number + FORMS.index(form)) % 4]
    with at_arch(80):
        check_exact(form, [*DTYPES][number % 4], layouts, names, config=tile())


def check_chosen(form: str, dtype: str) -> None:
    """In the tiles that are chosen."""
    check_exact(form, dtype, "NTN", ("skewed", "empty"))


def check_tma(form: str, dtype: str, layouts: str) -> None:
    """Blocks that reach into the next group, results by rows; columns are stored by pointers."""
    with at_arch(90):
        check_exact(form, dtype, layouts + "N", ("skewed", "empty"), config=tma(), sizes=TMA_SIZES)


def check_tma_is_chosen_where_it_can_read() -> None:
    from matmul_grad.kernels.gpu import grouped

    for form, layouts, whether in (
        ("rows", "NNN", True),
        ("rows", "NTN", True),
        ("rows", "TNN", False),
        ("steps", "TNN", True),
        ("steps", "NNN", False),
        ("steps", "TTN", False),
        ("rows", "NNT", False),
        ("rows", "SNN", False),
        ("columns", "NTT", True),
        ("columns", "NNT", False),
        ("columns", "NNN", False),
    ):
        made = [torch.zeros(shape, dtype=torch.float16) for shape in shapes(form, 4, TMA_SIZES)]
        a, b, out = (embed(x, letter, True) for x, letter in zip(made, layouts, strict=True))
        assert grouped.describe(a, b, torch.zeros(4), out, "ieee").tma == whether, (form, layouts)


def check_tma_tail() -> None:
    """NaN and Inf of the next group do not reach the sums of one that ends inside of a block of steps."""
    from matmul_grad.kernels.gpu import grouped

    a, b, out = (integers(shape, torch.float16, seed) for seed, shape in enumerate(shapes("steps", 2, TMA_SIZES)))
    a[:, 37:], b[37:] = math.nan, math.inf
    offs = torch.tensor([37, 40], dtype=torch.int32)
    with at_arch(90), np.errstate(invalid="ignore"):
        grouped.product(embed(a, "T", True), embed(b, "N", True), offs, out, config=tma())
    assert_exact(out[0], (a[:, :37].double() @ b[:37].double()).half())
    assert bool(out[1].isnan().all())


def check_wide(form: str) -> None:
    """64-bit offsets inside a tile give the bits that 32-bit ones give."""
    from matmul_grad.kernels.gpu import grouped_plan

    with pytest.MonkeyPatch.context() as patch, at_arch(80):
        patch.setattr(grouped_plan, "is_wide", lambda extents: True)
        check_exact(form, "fp32", "NTN", ("skewed",), config=tile())


def draw(form: str, ends: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    a, b = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes(form, len(ends))[:2])
    return a, b, torch.empty(shapes(form, len(ends))[2], dtype=dtype)


def group(form: str, x: Tensor, which: str, ends: tuple[int, ...], number: int) -> Tensor:
    """What of an operand or a result belongs to one group."""
    part = slice((0, *ends)[number], ends[number])
    if x.dim() == 3:
        return x[number]
    along_columns = (which, form) in (("a", "steps"), ("b", "columns"), ("out", "columns"))
    return x[:, part] if along_columns else x[part]


def check_same_bits(form: str, dtype: str) -> None:
    """A group has the bits that it has alone, wherever it begins; NaN and Inf of one stay in it."""
    from matmul_grad.kernels.gpu import grouped

    ends = ENDS["skewed"]
    a, b, out = draw(form, ends, DTYPES[dtype])
    offs = torch.tensor(ends, dtype=torch.int32)
    with at_arch(80), rows_alike():
        grouped.product(a, b, offs, out, config=tile())
        for number in range(len(ends)):
            parts = [group(form, x, name, ends, number) for name, x in (("a", a), ("b", b), ("out", out))]
            one, other, got = (x.contiguous() for x in parts)
            cut = {"rows": (one, other[None]), "columns": (one[None], other), "steps": (one, other)}[form]
            alone = torch.empty((1, *got.shape) if form == "steps" else got.shape, dtype=a.dtype)
            size = ends[number] - (0, *ends)[number]
            grouped.product(*cut, torch.tensor([size], dtype=torch.int32), alone, config=tile())
            assert_same_bits(alone[0] if form == "steps" else alone, got)
        before = out.clone()
        for name, x in (("a", a), ("b", b)):
            group(form, x, name, ends, 1).fill_(math.nan)
        grouped.product(a, b, offs, out, config=tile())
    assert bool(group(form, out, "out", ends, 1).isnan().all())
    group(form, out, "out", ends, 1).copy_(group(form, before, "out", ends, 1))
    assert_same_bits(out, before)


def check_wrong_ends(form: str) -> None:
    """Ends that descend, are negative or exceed the size: nothing outside of the tensors is touched."""
    from matmul_grad.kernels.gpu import grouped

    for wrong in ((5, 2, 40), (-(2**31), 2**31 - 1, -3)):
        a, b, out = (integers(shape, torch.float32, seed) for seed, shape in enumerate(shapes(form, 3)))
        buffer = torch.full((out.numel() + 64,), math.nan)
        out = buffer[32:-32].view(out.shape)
        with at_arch(80):
            grouped.product(a, b, torch.tensor(wrong, dtype=torch.int32), out, config=tile())
        out.fill_(math.nan)
        assert bool(buffer.isnan().all()), "written outside of the result"


def check_sizes() -> None:
    """No row, no column, no step, no group; offs that are not adjacent; ends that begin a tile everywhere."""
    from matmul_grad.kernels.gpu import grouped

    none = torch.empty(0, dtype=torch.int32)
    for a, b, offs, size in (
        ((4, 2), (0, 2, 3), none, (4, 3)),
        ((4, 0), (2, 0, 3), torch.tensor([1, 4], dtype=torch.int32), (4, 3)),
        ((0, 2), (2, 2, 3), torch.tensor([0, 0], dtype=torch.int32), (0, 3)),
        ((2, 4, 2), (2, 0), torch.tensor([0, 0], dtype=torch.int32), (4, 0)),
        ((4, 0), (0, 3), torch.tensor([0, 0], dtype=torch.int32), (2, 4, 3)),
    ):
        out = torch.full(size, math.nan)
        grouped.product(torch.ones(a), torch.ones(b), offs, out)
        assert_exact(out, torch.zeros(size))
    a, b, out = (integers(shape, torch.float32, seed) for seed, shape in enumerate(shapes("rows", 2)))
    apart = torch.tensor([20, 0, 48, 0], dtype=torch.int32)[::2]
    want = expected("rows", (20, 48), a, b).float()
    assert_exact(grouped.product(a, b, apart, out), want)


def check_operator(form: str) -> None:
    """Forward and both gradients as on a GPU, by `grouped_mm` itself: one launch each, offs not read by the host."""
    from matmul_grad import grouped as operator
    from matmul_grad.kernels.gpu import grouped

    ends, launches = ENDS["skewed"], []
    offs = torch.tensor(ends, dtype=torch.int32)
    a, b = (integers(shape, torch.float32, seed).requires_grad_() for seed, shape in enumerate(shapes(form, 4)[:2]))
    grad = integers(shapes(form, 4)[2], torch.float32, 5)
    want = expected(form, ends, a, b)
    wanted = torch.autograd.grad(want, (a, b), grad.double())
    run = grouped.run_kernels
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(operator, "is_on_gpu", lambda tensor: True)
        patch.setattr(operator, "_fill_from_host", lambda *_: launches.append("host"))
        patch.setattr(grouped, "run_kernels", lambda *of: launches.append("device") or run(*of))
        got = matmul_grad.grouped_mm(a, b, offs=offs)
        assert_exact(got.detach(), want.detach().float())
        for one, other in zip(torch.autograd.grad(got, (a, b), grad), wanted, strict=True):
            assert_exact(one, other)
    assert launches == ["device"] * 3


def check_precision() -> None:
    """float32 follows torch's setting for products."""
    from matmul_grad.kernels.gpu import grouped

    setting: Any = torch.backends.cuda.matmul
    before = setting.fp32_precision
    x, one, offs = torch.full((3, 1), 1 + 2**-11), torch.ones(1, 1, 1), torch.tensor([3], dtype=torch.int32)
    try:
        for precision, want in (("ieee", x), ("tf32", torch.full_like(x, 1 + 2**-10))):
            setting.fp32_precision = precision
            assert_exact(grouped.product(x, one, offs, torch.empty(3, 1)), want)
    finally:
        setting.fp32_precision = before


def check_refusals() -> None:
    """What the kernel does not count or multiply is left to the loop; a tile that is not valid is named."""
    from matmul_grad.kernels.gpu import grouped
    from matmul_grad.kernels.gpu.config import TileConfig

    a, b, out = (integers(shape, torch.float32, seed) for seed, shape in enumerate(shapes("rows", 1)))
    offs = torch.tensor([SIZES.whole], dtype=torch.int32)
    assert grouped.supports(a, b, offs, out)
    assert not grouped.supports(a, b.double(), offs, out)
    assert not grouped.supports(a.int(), b.int(), offs, out)
    assert not grouped.supports(a, b, offs.long(), out)
    assert not grouped.supports(a, b.expand(1024, -1, -1), offs.expand(1024), out)
    assert grouped.supports(a, b.expand(1023, -1, -1), offs.expand(1023), out)
    assert not grouped.supports(a[:1].expand(2**31, -1), b, offs, out)
    with pytest.raises(ValueError, match="is not valid for"):
        grouped.product(a, b, offs, out, config=TileConfig(8, 16, 16, 2, 4))


CASES: dict[str, Callable[[], None]] = {
    **{
        f"exact-{form}-{number}": partial(check_layouts, form, number)
        for form, number in itertools.product(FORMS, range(9))
        if form != "columns" or number in (0, 4, 8)  # rows of the transposes
    },
    **{
        f"chosen-{form}": partial(check_chosen, form, dtype)
        for form, dtype in zip(FORMS, ("bf16", "fp64", "fp32"), strict=True)
    },
    **{
        f"tma-{form}-{dtype}-{layouts}": partial(check_tma, form, dtype, layouts)
        for form, dtype, layouts in (("rows", "bf16", "NN"), ("rows", "fp16", "NT"), ("steps", "bf16", "TN"))
    },
    "tma-chosen": check_tma_is_chosen_where_it_can_read,
    "tma-tail": check_tma_tail,
    **{f"wide-{form}": partial(check_wide, form) for form in ("rows", "steps")},
    **{
        f"bits-{form}-{dtype}": partial(check_same_bits, form, dtype)
        for form, dtype in zip(FORMS, ("bf16", "fp32", "fp32"))
    },
    **{f"wrong-ends-{form}": partial(check_wrong_ends, form) for form in FORMS},
    **{f"operator-{form}": partial(check_operator, form) for form in FORMS},
    "sizes": check_sizes,
    "precision": check_precision,
    "refusals": check_refusals,
}


@pytest.mark.parametrize("case", CASES)
def test_interpreted(case: str, interpreter: CaseProcess) -> None:
    assert_no_complaint(interpreter.complaint(case))


if __name__ == "__main__":
    serve_cases(CASES)
