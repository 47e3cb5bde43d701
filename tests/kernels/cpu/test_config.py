"""The choices of kernels/cpu/config.py for many CPUs: pure functions, so none of them has to be here."""

from __future__ import annotations

import itertools

import pytest

from matmul_grad.kernels.cpu.config import (
    CHAIN,
    KC,
    SIZES,
    TILES,
    Cpu,
    choose,
    compiled_for,
    k_block,
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


THREADS = (1, 2, 3, 4, 6, 8, 16, 32, 64)


def slowest(row_tiles: int, panels: int, threads: int) -> int:
    """Tiles that the busiest thread computes, when each takes the next block as soon as it is free."""
    rows, columns = split_c(row_tiles, panels, threads)
    assert rows * columns >= 1
    begins = [
        [total * block // blocks for block in range(blocks + 1)]
        for total, blocks in ((row_tiles, rows), (panels, columns))
    ]
    tall, wide = ([end - begin for begin, end in itertools.pairwise(cuts)] for cuts in begins)
    busy = [0] * threads
    for height, width in itertools.product(tall, wide):
        busy[busy.index(min(busy))] += height * width
    assert sum(busy) == row_tiles * panels
    return max(busy)


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("size", [1024, 1536, 2048, 4096, 8192])
def test_threads_share_large_products_within_ten_percent(size: int, threads: int) -> None:
    row_tiles, panels = round_up(size, 6) // 6, round_up(size, 64) // 64
    assert slowest(row_tiles, panels, threads) * threads <= 1.1 * row_tiles * panels


@pytest.mark.parametrize("threads", THREADS)
def test_few_rows_split_columns_among_threads(threads: int) -> None:
    assert slowest(1, 64, threads) == -(-64 // threads)
    assert split_c(1, 1, threads) == (1, 1)


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize(("m", "n"), [(8, 4096), (32, 4096), (128, 3072), (4096, 64), (3000, 48)])
def test_skinny_products_keep_all_threads_busy(m: int, n: int, threads: int) -> None:
    row_tiles, panels = round_up(m, 6) // 6, round_up(n, 64) // 64
    assert slowest(row_tiles, panels, threads) <= 1.25 * -(-row_tiles * panels // threads) + 1


def test_small_products_stay_on_one_thread() -> None:
    assert useful_threads(8.0**3, 64) == 1
    assert useful_threads(4096.0**3, 64) == 64
    assert useful_threads(2.0**60, 2) == 2


@pytest.mark.parametrize(("dtype", "isa"), list(itertools.product(SIZES, TILES)))
def test_sizes_of_caches_are_read_when_the_code_runs(dtype: str, isa: str) -> None:
    """CPUs with other caches share compiled code."""
    blocks = [choose(dtype, Cpu(isa, *caches)) for caches in CACHES]
    assert len({compiled_for(block) for block in blocks}) == 1
    assert len({tuple(config_words(block)) for block in blocks}) > 1
