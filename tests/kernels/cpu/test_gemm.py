"""The compiled GEMM itself, on every instruction set of this machine and with blocks small enough to run all loops.

Exact integers: the expected result is bitwise. Operands lie between NaN, or against a page that cannot be touched,
so that one element read or written outside is a failure or a crash.
"""

from __future__ import annotations

import ctypes
import dataclasses
import mmap

import blocks
import pytest
import torch
from torch import Tensor

from matmul_grad import testing
from matmul_grad.kernels.cpu import driver, host
from matmul_grad.kernels.cpu.config import BlockConfig, choose
from matmul_grad.kernels.cpu.gemm_args import Epilogue
from matmul_grad.kernels.native import direct

PAGE = mmap.PAGESIZE
# Of the 16-bit ones only what differs.
WITHOUT_DOT = choose("bfloat16", dataclasses.replace(host.cpu(), bf16_dot=False))
every_block = pytest.mark.parametrize("block", blocks.parameters(WITHOUT_DOT))


def dtype_of(block: BlockConfig) -> torch.dtype:
    return getattr(torch, block.dtype)


def shapes(block: BlockConfig) -> list[tuple[int, int, int]]:
    """The common shapes, and sizes around this tile and these blocks."""
    mr, nr = block.mr, block.nr
    around = [(mr + i, nr + j, 25) for i in (-1, 0, 1) for j in (-1, 0, 1)]
    return [
        *testing.SHAPES,
        *around,
        (3 * mr + 1, 2 * nr + 3, 49),
        (5 * mr, 5 * nr, 50),
        (mr + 2, nr + 3, 2 * block.chain + 9),
        (4 * mr + 3, 3 * nr + 1, 2 * block.lanes),  # packed behind the tiles that read first
        (mr - 1, 2 * nr, 2 * block.lanes - 1),  # the last pair along k is a half
        (2 * mr + 1, 2 * nr, 4 * block.lanes - 1),
        (1, 9 * nr + 2, 26),  # wide rows
        (1, 700, 29),  # B in the order of memory: one chain, with steps that remain
        (1, 4200, 2 * block.chain + 9),  # more columns than there is room for sums, more chains than one
        (1, 4 * nr, 3 * block.lanes - 1),  # groups of columns alternate
        (3 * mr + 1, 2 * nr + 1, 3 * block.lanes + 1),  # rows of A are packed from columns
        (5 * block.lanes, 3, 40),  # C computed as its transpose
        (2 * mr + 1, 601, 1),  # C row by row
        (mr + 2, 520, 2),
        (7, 5, 4 * block.chain + 6),  # in small blocks: chunks of k
    ]


def in_canary(values: Tensor) -> tuple[Tensor, Tensor]:
    """(the same matrix with NaN on every side, the whole buffer)."""
    m, n = values.shape
    whole = values.new_full((m + 4, n + 70), float("nan"))
    view = whole[2 : m + 2, 65 : n + 65]
    view.copy_(values)
    return view, whole


def assert_untouched(whole: Tensor, m: int, n: int, what: str) -> None:
    inside = torch.zeros_like(whole, dtype=torch.bool)
    inside[2 : m + 2, 65 : n + 65] = True
    assert whole[~inside].isnan().all(), f"{what}: written outside of C"


@every_block
def test_integers_are_exact_and_canaries_untouched(block: BlockConfig) -> None:
    dtype = dtype_of(block)
    for layout in testing.LAYOUTS:
        for m, n, k in shapes(block):
            what = f"{block.name} {layout} {m}x{n}x{k}"
            a = testing.integers(m, k, dtype, seed=1)
            b = testing.integers(k, n, dtype, seed=2)
            expected = testing.exact_product(a, b)
            a = in_canary(a.t())[0].t() if layout[0] == "T" else in_canary(a)[0]
            b = in_canary(b.t())[0].t() if layout[1] == "T" else in_canary(b)[0]
            out, whole = in_canary(torch.full((m, n), float("nan"), dtype=dtype))
            for threads in (1, 2, 3):
                out.fill_(float("nan"))
                direct.multiply(block, a, b, out, threads)
                testing.assert_same_bits(out, expected, f"{what} threads {threads}")
                assert_untouched(whole, m, n, what)


@every_block
@pytest.mark.parametrize("a_striding", testing.STRIDINGS)
@pytest.mark.parametrize("b_striding", testing.STRIDINGS)
def test_integers_of_any_strides_are_exact(block: BlockConfig, a_striding: str, b_striding: str) -> None:
    dtype = dtype_of(block)
    for m, n, k in ((13, 70, 31), (1, 9, 50), (40, 1, 7), (5, 530, 2)):
        a = testing.lay_out(testing.integers(m, k, dtype, seed=1), a_striding)
        b = testing.lay_out(testing.integers(k, n, dtype, seed=2), b_striding)
        out = a.new_empty(m, n)
        direct.multiply(block, a, b, out, 2)
        testing.assert_same_bits(out, testing.exact_product(a, b), f"{a_striding} {b_striding} {m}x{n}x{k}")


def test_epilogue_scales_and_adds_an_expanded_source() -> None:
    a, b = testing.integers(13, 20, torch.float32, seed=1), testing.integers(20, 70, torch.float32, seed=2)
    for source in (testing.integers(1, 70, torch.float32, seed=3), testing.integers(13, 1, torch.float32, seed=3)):
        out = torch.full((13, 70), float("nan"))
        direct.multiply(driver.config("float32"), a, b, out, 1, Epilogue(alpha=2.0, beta=-3.0, source=source))
        testing.assert_same_bits(out + 0.0, 2 * testing.exact_product(a, b) - 3 * source + 0.0)  # 0 and -0 are one


def test_source_is_not_read_where_beta_is_zero() -> None:
    a, b, out = torch.ones(3, 2), torch.ones(2, 4), torch.zeros(3, 4)
    direct.multiply(driver.config("float32"), a, b, out, 1, Epilogue(beta=0.0, source=torch.full((4,), float("nan"))))
    assert out.tolist() == [[2.0] * 4] * 3


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_fused_instruction_sets_agree_in_bits(dtype: str) -> None:
    """The order of k is fixed by k and the dtype, so tiles of other shapes give the same bits."""
    sets = [choose(dtype, cpu) for isa in host.host_isas() if (cpu := host.cpu(isa)).fused]
    for m, n, k in ((7, 70, 1000), (61, 130, 257)):
        a, b = (testing.normal(*shape, getattr(torch, dtype)) for shape in ((m, k), (k, n)))
        first, *others = [direct.multiply(block, a, b, a.new_empty(m, n)) for block in sets]
        for other in others:
            testing.assert_same_bits(other, first)


@every_block
def test_outer_products_row_by_row_have_the_bits_of_tiles(block: BlockConfig) -> None:
    dtype = dtype_of(block)
    for k in (1, 2, 3, 4):  # the last two row by row where a lane holds a pair
        a, b = testing.normal(13, k, dtype), testing.normal(k, 1030, dtype)
        wide, narrow = a.new_empty(13, 1030), a.new_empty(13, 70)
        direct.multiply(block, a, b, wide)
        for start in (0, 500, 960):
            direct.multiply(block, a, b[:, start : start + 70], narrow)
            testing.assert_same_bits(narrow, wide[:, start : start + 70], f"{block.name} k {k} from {start}")


class Guarded:
    """``rows × columns`` elements that end where an unreadable page begins, or begin where one ends."""

    def __init__(self, rows: int, columns: int, dtype: torch.dtype, at_end: bool) -> None:
        size = rows * columns * dtype.itemsize
        pages = -(-max(size, 1) // PAGE)
        self.memory = mmap.mmap(-1, (pages + 2) * PAGE)
        self.base = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        self.protect(0)
        offset = PAGE + pages * PAGE - size if at_end else PAGE
        flat = torch.frombuffer(self.memory, dtype=dtype, count=rows * columns, offset=offset)
        self.matrix = flat.view(rows, columns)
        self.pages = pages

    def protect(self, rights: int) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        last = self.base + len(self.memory) - PAGE
        for page in (self.base, last):
            assert libc.mprotect(ctypes.c_void_p(page), ctypes.c_size_t(PAGE), rights) == 0


@every_block
@pytest.mark.parametrize("at_end", [True, False], ids=["page-after", "page-before"])
@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_no_access_beyond_operands(block: BlockConfig, layout: str, at_end: bool) -> None:
    dtype = dtype_of(block)
    mr, nr, lanes = block.mr, block.nr, block.lanes
    for m, n, k in (
        (mr, nr, 24),
        (mr + 1, nr + 1, 25),
        (1, 1, 1),
        (2 * mr - 1, nr + lanes - 1, 9),
        (1, nr + 5, 31),
        (4 * mr + 3, 2 * nr, 2 * lanes),
        (1, 4 * nr, 9),
        (1, 701, 3),
        (3, 601, 1),
        (3, 520, 2),
        (1, 2 * nr + lanes, 2 * lanes + 1),
        (mr + 1, 3 * nr, lanes + 1),
        (3 * lanes, 2, 18),
        (mr, nr, 2 * lanes),
        (mr - 1, nr, 2 * lanes - 1),
        (2 * mr, 2 * nr, 2 * lanes - 1),
    ):
        stored_a = Guarded(*((k, m) if layout[0] == "T" else (m, k)), dtype, at_end)
        stored_b = Guarded(*((n, k) if layout[1] == "T" else (k, n)), dtype, at_end)
        stored_c = Guarded(m, n, dtype, at_end)
        a = stored_a.matrix.t() if layout[0] == "T" else stored_a.matrix
        b = stored_b.matrix.t() if layout[1] == "T" else stored_b.matrix
        a.copy_(testing.integers(m, k, dtype, seed=1))
        b.copy_(testing.integers(k, n, dtype, seed=2))
        direct.multiply(block, a, b, stored_c.matrix)
        testing.assert_same_bits(stored_c.matrix, testing.exact_product(a, b), f"{layout} {m}x{n}x{k}")


def test_forced_isa_is_used_or_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    for isa in host.host_isas():
        monkeypatch.setenv("MATMUL_GRAD_ISA", isa)
        assert host.cpu().isa == isa
    monkeypatch.setenv("MATMUL_GRAD_ISA", "avx9")
    with pytest.raises(ValueError, match="must be one of avx512, avx2, neon, generic"):
        host.cpu()
    absent = next(isa for isa in ("neon", "avx512", "avx2") if isa not in host.host_isas())
    monkeypatch.setenv("MATMUL_GRAD_ISA", absent)
    with pytest.raises(RuntimeError, match=f"{absent} was asked for, but this CPU has only"):
        host.cpu()


@pytest.mark.parametrize("block", [x for x in blocks.parameters(WITHOUT_DOT) if x.values[0].accumulates_wider])
def test_results_of_16_bit_operands_in_float32(block: BlockConfig) -> None:
    """The sums as they are, which otherwise are rounded; added to what is there; nothing is written beside them."""
    dtype = dtype_of(block)
    for m, n, k in ((13, 70, 31), (1, 33, 50), (40, 1, 7), (7, 5, 2 * block.chain + 9)):
        a, b = testing.normal(m, k, dtype), testing.normal(k, n, dtype)
        source = testing.normal(m, n, torch.float32)
        first = torch.empty(m, n)
        direct.multiply(block, a, b, first)
        testing.assert_same_bits(first.to(dtype), direct.multiply(block, a, b, a.new_empty(m, n)))
        assert (first.double() - a.double() @ b.double()).abs().max() <= 4e-6 * k**0.5
        for threads, by_columns in ((1, False), (3, False), (2, True)):
            shape = (n, m) if by_columns else (m, n)
            out, whole = in_canary(torch.full(shape, float("nan")))
            direct.multiply(block, a, b, out.t() if by_columns else out, threads)
            testing.assert_same_bits(out.t() if by_columns else out, first)
            assert_untouched(whole, *shape, f"{m}x{n}x{k}")
        out = source.clone()
        direct.multiply(block, a, b, out, 2, Epilogue(source=out))
        testing.assert_same_bits(out, source + first)
