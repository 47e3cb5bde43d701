"""Batches, C = alpha · (A · B) + beta · source, and any strides of C: the driver itself, on every instruction set.

Exact integers between NaN, as in test_gemm.py, which tries the plain product.
"""

from __future__ import annotations

import ctypes
import itertools
import struct

import blocks
import pytest
import torch
from torch import Tensor

from matmul_grad import testing
from matmul_grad.kernels.cpu import driver
from matmul_grad.kernels.cpu.config import BlockConfig, prefer_transposed_c, threads_per_product
from matmul_grad.kernels.cpu.gemm_args import GEMM_ARGS
from matmul_grad.kernels.native import direct  # noqa: F401  # gives the driver torch's threads

every_block = pytest.mark.parametrize("block", blocks.parameters())


def bits(number: float) -> int:
    return struct.unpack("<q", struct.pack("<d", number))[0]


def run(
    block: BlockConfig, a: Tensor, b: Tensor, out: Tensor, threads: int,
    source: Tensor | None = None, alpha: float = 1, beta: float = 1,
) -> None:  # fmt: skip
    """The driver on a batch: a (batch, m, k), b (batch, k, n), out and source (batch, m, n), every stride as it is."""

    def strides(x: Tensor) -> tuple[int, int]:
        return x.stride(1), x.stride(2)

    (batch, m, k), n = a.shape, b.shape[2]
    operands = a.data_ptr(), *strides(a), b.data_ptr(), *strides(b), out.data_ptr(), *strides(out)
    apart = batch, a.stride(0), b.stride(0), out.stride(0)
    added = (source.data_ptr(), *strides(source), source.stride(0)) if source is not None else (0, 0, 0, 0)
    args = (ctypes.c_int64 * GEMM_ARGS)(m, n, k, *operands, *apart, *added, bits(alpha), bits(beta))
    multiply = ctypes.CFUNCTYPE(ctypes.c_int64, *[ctypes.c_int64] * 3)(driver.gemm_address(block))
    assert multiply(ctypes.addressof(args), 1, threads) == 0


def integers(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed * 1009 + sum(shape))
    return torch.randint(-4, 5, shape, generator=generator).to(dtype)


ORDERS = {"rows": (0, 1, 2), "columns": (0, 2, 1), "batch-within": (1, 0, 2), "batch-last": (1, 2, 0)}


def between_nan(values: Tensor, order: tuple[int, ...], every: int) -> tuple[Tensor, Tensor]:
    """The same batch with its dimensions in that order of memory, each ``every``-th element, NaN around; the buffer."""
    sizes = [values.shape[dim] for dim in order]
    whole = values.new_full([every * size + 3 for size in sizes], float("nan"))
    view = whole[tuple(slice(1, 1 + every * size, every) for size in sizes)]
    view = view.permute([order.index(dim) for dim in range(3)])
    view.copy_(values)
    return view, whole


def assert_only_written(whole: Tensor, view: Tensor, what: str) -> None:
    count = int((~whole.isnan()).sum())
    assert count == view.numel(), f"{what}: {count} elements written for {view.numel()}"


SHAPES = [(1, 1, 1, 1), (1, 40, 3, 9), (3, 7, 65, 9), (2, 12, 33, 31), (5, 1, 70, 20), (4, 9, 1, 300), (7, 3, 3, 3)]


@every_block
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_batches_of_every_layout_are_exact(block: BlockConfig, threads: int) -> None:
    dtype = getattr(torch, block.dtype)
    layouts = itertools.cycle(itertools.product(ORDERS, ORDERS, ORDERS, (1, 2)))
    for index, (batch, m, n, k) in enumerate([*SHAPES, (3, 8, 7, 4 * block.chain + 6)]):
        for _ in range(6):
            for _ in range(5):  # a stride through the products of all layouts
                one, other, third, every = next(layouts)
            a = between_nan(integers(batch, m, k, dtype=dtype, seed=index), ORDERS[one], every)[0]
            b = between_nan(integers(batch, k, n, dtype=dtype, seed=index + 50), ORDERS[other], 1)[0]
            out, whole = between_nan(torch.zeros(batch, m, n, dtype=dtype), ORDERS[third], every)
            run(block, a, b, out, threads)
            what = f"{batch}x{m}x{n}x{k} {one} {other} {third} {every}"
            testing.assert_same_bits(out, (a.long() @ b.long()).to(dtype), what)
            assert_only_written(whole, out, what)


@every_block
def test_operand_expanded_over_the_batch(block: BlockConfig) -> None:
    dtype = getattr(torch, block.dtype)
    a, b = integers(1, 13, 40, dtype=dtype, seed=1).expand(4, 13, 40), integers(4, 40, 70, dtype=dtype, seed=2)
    for one, other in ((a, b), (b.mT, a.mT)):
        out = torch.full((4, one.shape[1], other.shape[2]), float("nan"), dtype=dtype)
        run(block, one, other, out, 2)
        testing.assert_same_bits(out, (one.long() @ other.long()).to(dtype))


SCALES = [(1, 1), (2, 1), (1, -3), (0.5, 2), (-1, 0.25)]


@every_block
@pytest.mark.parametrize("alpha,beta", SCALES)
def test_epilogue_with_any_strides_of_source(block: BlockConfig, alpha: float, beta: float) -> None:
    """The source is whole, or expanded from a row, a column or an element, or the result itself."""
    dtype = getattr(torch, block.dtype)
    for batch, m, n, k in [*SHAPES, (3, 8, 7, 4 * block.chain + 6)]:
        a, b = integers(batch, m, k, dtype=dtype, seed=1), integers(batch, k, n, dtype=dtype, seed=2)
        shared = ((1, 1, n), (batch, m, 1), (1, 1, 1), (1, m, n))
        sources = {str(shape): integers(*shape, dtype=dtype, seed=3) for shape in shared}
        whole = integers(batch, m, n, dtype=dtype, seed=4)
        sources |= {name: between_nan(whole, order, 2)[0] for name, order in ORDERS.items()}
        for (name, source), order in zip(sources.items(), itertools.cycle(ORDERS.values())):
            out, whole = between_nan(torch.zeros(batch, m, n, dtype=dtype), order, 1)
            source = source.expand(batch, m, n)
            expected = (alpha * (a.double() @ b.double()) + beta * source.double()).to(dtype)
            run(block, a, b, out, 2, source, alpha, beta)
            what = f"{batch}x{m}x{n}x{k} + {name}"
            testing.assert_same_bits(out + 0.0, expected + 0.0, what)  # 0 and -0 are one
            assert_only_written(whole, out, what)
            out.copy_(source)
            run(block, a, b, out, 2, out, alpha, beta)
            testing.assert_same_bits(out + 0.0, expected + 0.0, f"{what}, in place")


def test_batch_items_split_over_k_keep_their_bits() -> None:
    """Few small products over a long k, whose chunks of k threads share: the bits do not depend on threads or batch."""
    block = driver.config("float32")
    a, b = (testing.normal(3 * 5, 20000, torch.float32, seed=seed).view(3, 5, 20000) for seed in (1, 2))
    source = testing.normal(5, 5, torch.float32, seed=3).expand(3, 5, 5)
    outs = {}
    for threads in (1, 2, 8):
        outs[threads] = torch.full((3, 5, 5), float("nan"))
        run(block, a, b.mT, outs[threads], threads, source, 0.7, 0.3)
        testing.assert_same_bits(outs[threads], outs[1], str(threads))
    alone = torch.full((1, 5, 5), float("nan"))
    run(block, a[1:2], b.mT[1:2], alone, 4, source[:1], 0.7, 0.3)
    testing.assert_same_bits(alone, outs[1][1:2])
    torch.testing.assert_close(outs[1], 0.7 * (a @ b.mT) + 0.3 * source, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("threads", [1, 2, 3, 8, 64, 97, 128])
def test_threads_per_product_keep_all_busy(threads: int) -> None:
    for batch in range(1, 300):
        blocks = batch * threads_per_product(batch, threads)
        rounds = -(-blocks // threads)
        assert rounds <= 1.1 * blocks / threads, f"{batch} products, {blocks} blocks"


def test_transposed_c_is_preferred_where_it_has_fewer_vectors() -> None:
    assert prefer_transposed_c(40, 3, 3, 1, 16)
    assert not prefer_transposed_c(3, 40, 40, 1, 16)
    assert prefer_transposed_c(40, 40, 1, 40, 16), "columns of C together"
    assert not prefer_transposed_c(3, 40, 1, 3, 16), "its transpose would have few columns"
    assert prefer_transposed_c(40, 3, 1, 40, 16)
