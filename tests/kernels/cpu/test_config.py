"""The choices of kernels/cpu/config.py for many CPUs: pure functions, so none of them has to be here."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import pytest

from matmul_grad.bench import shapes
from matmul_grad.kernels.cpu.config import (
    CHAIN,
    KC,
    MAX_BLOCKS,
    SIZES,
    SQUAREST,
    TILES,
    Cpu,
    choose,
    compiled_for,
    grain_tiles,
    k_block,
    prefer_split_k,
    prefer_transposed_c,
    round_up,
    split_c,
    useful_threads,
)
from matmul_grad.kernels.cpu.config_words import config_words

REGISTERS = {"avx512": 32, "avx2": 16, "neon": 32, "generic": 16}
CACHES = [
    (256 << 10, 2 << 20),
    (512 << 10, 8 << 20),
    (1 << 20, 32 << 20),
    (2 << 20, 105 << 20),
    (64 << 10, 0),
]
CASES = list(itertools.product(SIZES, TILES, CACHES))


@pytest.mark.parametrize(("dtype", "isa", "caches"), CASES)
def test_chosen_blocks_fit_registers_and_caches(dtype: str, isa: str, caches: tuple[int, int]) -> None:
    l2, l3 = caches
    block = choose(dtype, Cpu(isa, l2, l3, bf16_dot=isa == "avx512"))
    accumulators = block.mr * block.vectors
    assert accumulators + block.vectors + 1 <= REGISTERS[isa]
    assert block.nr == block.vectors * block.lanes
    assert block.mc % block.mr == 0 and block.nc % block.nr == 0 and min(block.mc, block.nc) > 0
    assert block.b_bytes <= max(l3 // 2, block.k_lanes * block.nr * block.lane_bytes)
    assert block.thread_bytes <= 16 << 20 and block.thread_bytes % 64 == 0
    assert block.partial_lanes >= block.mr * block.nr
    assert block.mc * block.k_lanes * block.lane_bytes <= max(l2 // 2, block.mr * block.k_lanes * block.lane_bytes)
    assert block.accumulates_wider == (SIZES[dtype] == 2)


@pytest.mark.parametrize("dtype", SIZES)
def test_chains_are_the_same_on_every_cpu(dtype: str) -> None:
    chains = {choose(dtype, Cpu(isa, *caches)).chain for _, isa, caches in CASES}
    assert chains == {CHAIN[dtype]}
    paired = choose(dtype, Cpu("avx512", bf16_dot=True))
    assert paired.chain == CHAIN[dtype] * (2 if dtype == "bfloat16" else 1)
    assert paired.kc % paired.chain == 0


def test_unknown_dtype_or_isa_raises_valueerror() -> None:
    with pytest.raises(ValueError, match="dtype must be one of"):
        choose("int8", Cpu("avx2"))
    with pytest.raises(ValueError, match="isa must be one of"):
        choose("float32", Cpu("mmx"))


@pytest.mark.parametrize("k", [0, 1, 7, 127, 128, 129, 383, 384, 385, 768, 769, 1000, 4096, 30_000_000])
def test_panels_hold_whole_chains_and_are_fewest(k: int) -> None:
    for kc in set(KC.values()):
        step = k_block(k, kc, 32)
        assert step % 32 == 0 and 0 < step <= kc
        assert -(-k // step) == -(-k // kc)


THREADS = range(1, 129)
FEW = (1, 2, 3, 4, 6, 8, 16, 31, 64, 96, 127, 128)
SHAPES = tuple(dict.fromkeys([*shapes.CUBES, *shapes.LAYERS, *shapes.DEEPSEEK, *shapes.ODD, *shapes.SKINNY]))


def cuts(total: int, count: int) -> list[int]:
    """The sizes of ``count`` nearly equal ranges, as `schedule.split_range` makes them."""
    return [total * (index + 1) // count - total * index // count for index in range(count)]


def slowest(row_tiles: int, panels: int, threads: int) -> int:
    """Tiles that the busiest thread computes, when each takes the next block as soon as it is free."""
    rows, columns = split_c(row_tiles, panels, threads, 1)
    busy = [0] * threads
    for height, width in itertools.product(cuts(row_tiles, rows), cuts(panels, columns)):
        assert height * width > 0
        busy[busy.index(min(busy))] += height * width
    assert sum(busy) == row_tiles * panels
    return max(busy)


@pytest.mark.parametrize("threads", [1, 2, 3, 4, 6, 8, 16, 32, 64])
@pytest.mark.parametrize("size", [1024, 1536, 2048, 4096, 8192])
def test_threads_share_large_products_within_ten_percent(size: int, threads: int) -> None:
    row_tiles, panels = round_up(size, 6) // 6, round_up(size, 64) // 64
    assert slowest(row_tiles, panels, threads) * threads <= 1.1 * row_tiles * panels


@functools.cache
def problems(isa: str, dtype: str) -> dict[tuple[int, int, int, int], str]:
    """Every product of the table of shapes, forward and gradients, on 1 to 128 threads, as `split_c` is asked for it:
    row tiles, panels, threads and least tiles of a block → one of the products."""
    block, found = choose(dtype, Cpu(isa)), {}
    for shape, order in itertools.product(SHAPES, ((0, 1, 2), (0, 2, 1), (2, 1, 0))):
        m, n, k = (shape[i] for i in order)
        if prefer_transposed_c(m, n, n, 1, block.lanes):
            m, n = n, m
        row_tiles, panels, work = -(-m // block.mr), -(-n // block.nr), float(m) * n * k
        for threads in {useful_threads(work, threads) for threads in THREADS}:
            if not prefer_split_k(row_tiles, panels, -(-k // block.chunk), 1, threads):
                least = grain_tiles(work, row_tiles * panels)
                found[row_tiles, panels, threads, least] = f"{m}x{n}x{k} on {threads}"
    return found


def best_cost(row_tiles: int, panels: int, threads: int, least: int) -> float:
    """The least cost of the slowest thread over every cut of C into rows × columns of blocks with ``least`` tiles, of
    which each thread computes up to MAX_BLOCKS. A block's cost is that of `split_c`."""
    most = np.arange(1, MAX_BLOCKS + 1)[:, None] * threads
    rows = np.arange(1, min(row_tiles, MAX_BLOCKS * threads) + 1)[None, :]
    narrowest = -(-least // (row_tiles // rows))
    columns = np.minimum(np.maximum(most // rows, 1), panels // narrowest)
    possible = (columns > 0) & (rows <= most)
    columns = np.maximum(columns, 1)
    tall, wide = -(-row_tiles // rows), -(-panels // columns)
    cost = (24 * tall * wide + 3 * tall + 32 * wide) * -(-(rows * columns) // threads)
    whole = 24 * row_tiles * panels + 3 * row_tiles + 32 * panels
    return min(float(np.where(possible, cost, np.inf).min()), whole)


@pytest.mark.parametrize(("isa", "dtype"), [("avx512", "float32"), ("avx2", "float32"), ("avx2", "float64")])
def test_threads_are_balanced_within_ten_percent_of_the_best_cut(isa: str, dtype: str) -> None:
    for (row_tiles, panels, threads, least), name in problems(isa, dtype).items():
        rows, columns = split_c(row_tiles, panels, threads, least)
        assert 1 <= rows <= row_tiles and 1 <= columns <= panels, name
        tall, wide = -(-row_tiles // rows), -(-panels // columns)
        cost = -(-rows * columns // threads) * (24 * tall * wide + 3 * tall + 32 * wide)
        share = row_tiles * panels / threads  # a cost that no cut is below, to leave out the search for the best
        if cost > 1.1 * (24 * share + SQUAREST * share**0.5):
            assert cost <= 1.1 * best_cost(row_tiles, panels, threads, least), name


@pytest.mark.parametrize(("isa", "dtype"), [("avx512", "float32"), ("avx2", "float32"), ("avx2", "float64")])
def test_no_block_is_below_the_grain(isa: str, dtype: str) -> None:
    for (row_tiles, panels, threads, least), name in problems(isa, dtype).items():
        rows, columns = split_c(row_tiles, panels, threads, least)
        smallest = (row_tiles // rows) * (panels // columns)
        assert smallest >= min(least, row_tiles * panels), f"{name}: {smallest} tiles of {least}"


@pytest.mark.parametrize("threads", FEW)
def test_few_rows_split_columns_among_threads(threads: int) -> None:
    assert slowest(1, 64, threads) == -(-64 // threads)
    assert split_c(1, 1, threads, 1) == (1, 1)


@pytest.mark.parametrize("threads", FEW)
@pytest.mark.parametrize(("m", "n"), [(8, 4096), (32, 4096), (128, 3072), (4096, 64), (3000, 48)])
def test_skinny_products_keep_all_threads_busy(m: int, n: int, threads: int) -> None:
    row_tiles, panels = round_up(m, 6) // 6, round_up(n, 64) // 64
    assert slowest(row_tiles, panels, threads) <= 1.25 * -(-row_tiles * panels // threads) + 1


def test_chunks_of_k_are_shared_where_c_has_too_few_tiles() -> None:
    """Of a row of Qwen2.5-7B's layers, 64 threads share 56 panels and not three chunks of k."""
    assert not prefer_split_k(1, 56, 3, 1, 64)
    assert prefer_split_k(1, 1, 3663, 1, 64) and prefer_split_k(3, 1, 4, 1, 2)
    for tiles, chunks, batch, threads in itertools.product((1, 2, 3, 7, 40), (2, 3, 4, 64), (1, 3), FEW):
        tiles_left = -(-batch * tiles // threads)
        share = -(-batch * chunks // threads) * tiles / chunks
        slower = share if prefer_split_k(tiles, 1, chunks, batch, threads) else tiles_left
        assert slower <= 1.1 * min(share, tiles_left) or batch * tiles >= 2 * threads


def test_small_products_stay_on_one_thread() -> None:
    assert useful_threads(8.0**3, 64) == 1
    assert useful_threads(4096.0**3, 64) == 64
    assert useful_threads(2.0**60, 2) == 2
    assert grain_tiles(2.0**19, 44) == 22, "exactly half of it repays a thread"
    assert grain_tiles(1e-300, 7) == 10**9 and grain_tiles(1e300, 7) == 1


@pytest.mark.parametrize(("dtype", "isa"), list(itertools.product(SIZES, TILES)))
def test_sizes_of_caches_are_read_when_the_code_runs(dtype: str, isa: str) -> None:
    """CPUs with other caches share compiled code."""
    blocks = [choose(dtype, Cpu(isa, *caches)) for caches in CACHES]
    assert len({compiled_for(block) for block in blocks}) == 1
    assert len({tuple(config_words(block)) for block in blocks}) > 1
