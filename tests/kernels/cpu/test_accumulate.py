"""C += A · B where the sums are stored, float32 of 16-bit operands: the driver itself, on every instruction set.

Exact integers between NaN and against a page that cannot be read; and bits that do not tell where k was cut.
"""

from __future__ import annotations

import itertools

import blocks
import pytest
import torch
from guards import with_guard
from torch import Tensor

from matmul_grad import testing
from matmul_grad.kernels.cpu.config import BlockConfig
from matmul_grad.kernels.native import direct

every_block = pytest.mark.parametrize("block", blocks.parameters())
SHAPES = [
    (1, 1, 1),
    (7, 65, 9),
    (12, 33, 31),
    (1, 70, 20),
    (1, 600, 40),
    (9, 1, 300),
    (70, 3, 3),
    (40, 700, 2),
    (3, 5, 0),
]
ORDERS = ("rows", "columns", "apart")


def add(block: BlockConfig, a: Tensor, b: Tensor, out: Tensor, threads: int = 2) -> None:
    direct.multiply(block, a, b, out, threads, direct.Epilogue(source=out), accumulate=True)


def laid_out(values: Tensor, order: str) -> Tensor:
    return testing.lay_out(values.clone(), {"rows": "narrow", "columns": "column", "apart": "sliced"}[order])


def operands(block: BlockConfig, m: int, n: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """A, B and C of small integers; C of what the sums have."""
    dtype = getattr(torch, block.dtype)
    a, b = testing.integers(m, k, dtype, 1), testing.integers(k, n, dtype, 2)
    return a, b, testing.integers(m, n, getattr(torch, block.accumulator), 3)


@every_block
@pytest.mark.parametrize("threads", [1, 3])
def test_sums_in_every_layout_are_exact(block: BlockConfig, threads: int) -> None:
    orders = itertools.cycle(itertools.product(ORDERS, ORDERS, ORDERS))
    for m, n, k in [*SHAPES, (8, 7, 4 * block.chain + 6), (20, 70, 2 * block.chain)]:
        a, b, c = operands(block, m, n, k)
        for _ in range(5):
            one, other, third = next(orders)
            out = laid_out(c, third)
            whole = out if out._base is None else out._base
            for times in (1, 2):
                add(block, laid_out(a, one), laid_out(b, other), out, threads)
                exact = times * (a.double() @ b.double()) + c.double()
                testing.assert_same_bits(out + 0.0, exact.to(c.dtype) + 0.0, f"{m}x{n}x{k} {one} {other} {third}")
            if third != "columns":
                assert int((~whole.isnan()).sum()) == c.numel(), "written beside C"


@every_block
def test_reads_and_writes_nothing_beyond_the_operands(block: BlockConfig) -> None:
    for m, n, k in SHAPES[:-1]:
        a, b, c = operands(block, m, n, k)
        for transposed in (False, True):
            guarded = [with_guard(x.t().contiguous().t() if transposed else x) for x in (a, b, c)]
            (one, _), (other, _), (out, whole) = guarded
            add(block, one, other, out)
            exact = (a.double() @ b.double() + c.double()).to(c.dtype)
            testing.assert_same_bits(out.contiguous() + 0.0, exact + 0.0, f"{m}x{n}x{k}")
            assert int((~whole.isnan()).sum()) == c.numel()


@every_block
@pytest.mark.parametrize("order", ["rows", "columns"])
def test_bits_do_not_tell_where_k_was_cut(block: BlockConfig, order: str) -> None:
    """Cuts after whole chains; the sums are those of one product, whose chains are added in order."""
    dtype, chain = getattr(torch, block.dtype), max(block.chain, 256)
    k = min(6 * chain, block.chunk)
    a, b = testing.normal(13, k, dtype, 1), testing.normal(k, 40, dtype, 2)
    out = torch.full((13, 40), float("nan"), dtype=getattr(torch, block.accumulator))
    expected = direct.multiply(block, a, b, out, 1)
    cuts = [chain] * (k // chain), [2 * chain, k - 2 * chain], [k - chain, chain]
    for parts in [cut for cut in cuts if min(cut) > 0]:
        out = laid_out(torch.zeros_like(expected), order)
        for x, y in zip(a.split(parts, 1), b.split(parts), strict=True):
            add(block, x, y, out)
        testing.assert_same_bits(out.contiguous() + 0.0, expected + 0.0, str(parts))


@every_block
def test_other_results_have_the_bits_of_the_epilogue(block: BlockConfig) -> None:
    """A C in 16 bits, one whose strides have no 1, and more steps of k than a chunk: the product is added to C."""
    dtype, wide = getattr(torch, block.dtype), getattr(torch, block.accumulator)
    cases = [(block.chain + 5, dtype, "apart"), (block.chain + 5, wide, "apart")]
    if dtype != wide:
        cases.append((2 * block.chain, dtype, "rows"))
    if block.chunk < 8192:
        cases.append((block.chunk + block.chain, wide, "rows"))
    for k, kind, order in cases:
        a, b, c = testing.normal(9, k, dtype, 1), testing.normal(k, 40, dtype, 2), testing.normal(9, 40, kind, 3)
        out, expected = laid_out(c, order), torch.empty_like(c)
        direct.multiply(block, a, b, expected, 1, direct.Epilogue(source=c))
        add(block, a, b, out)
        testing.assert_same_bits(out.contiguous(), expected, f"{k} {kind} {order}")
