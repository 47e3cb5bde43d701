"""Which tile and which blocks: pure functions of the CPU, the dtype and the problem. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

SIZES = {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2}  # bytes of an element in memory
ACCUMULATOR = {"float32": "float32", "float64": "float64", "bfloat16": "float32", "float16": "float32"}
PREFIX = {"float32": "s", "float64": "d", "bfloat16": "b", "float16": "h"}
ISAS = ("avx512", "avx2", "neon", "generic")

# The k-order is part of the numerical contract, fixed by k and the dtype alone, so no cache size enters here. An
# element of C is a sum of chunks of CHUNK steps, each a sum of chains of CHAIN fused multiply-adds (of pairs of steps
# where ``bf16_dot``). Different numbers give different bits. A chain costs an addition to a tile of C that is in L1: on
# Zen 4 chains of 32 run at 0.96-0.97 of the speed of 128, and 128 at that of 384. Up to SHORT_K steps a float32 or
# float64 sum needs the short ones to stay within 2 × torch's error; 16-bit results are rounded too coarsely for that.
CHAIN = {"float32": 128, "float64": 128, "bfloat16": 384, "float16": 384}
SHORT_CHAIN = {"float32": 32, "float64": 32, "bfloat16": 384, "float16": 384}
SHORT_K = 128
CHUNK = 8192  # what threads may share along k: enough to hide the addition, little enough that 64 threads find work

# Steps of k (or pairs) in a packed panel, whole chains. On Zen 4 float32 and float64 cubes from 512 on run at 1.00-1.01
# of the speed with 384, and 768 is slower; 16-bit sums are kept in a buffer of their own.
KC = {"float32": 512, "float64": 512, "bfloat16": 384, "float16": 384}

# Register tiles (mr, vectors a row, bytes a vector). 6 × 4 zmm: 24 accumulators, 4 columns of B and one
# broadcast fill 29 of 32 registers; on Zen 4 it beat 12 × 2, 14 × 2 and 8 × 3 by 2-5 % as a whole GEMM.
TILES = {"avx512": (6, 4, 64), "avx2": (6, 2, 32), "neon": (6, 4, 16), "generic": (3, 2, 16)}

A_SHARE = 0.42  # of L2, for a packed block of A: the rest is for the panel of B that it meets, and for C
B_SHARE = 0.3  # of a core's part of L3, for its packed panel of B
L2_USED, L3_USED = 2 << 20, 16 << 20  # more would not make a product faster, and each thread holds its blocks
PARTIAL_BYTES = 5 << 19  # a thread's buffer for sums that are not stored to C yet; it has two
SPLIT_BYTES = 8 << 20  # the partial results of a product whose chunks of k are shared among threads
WORKSPACE_SLOTS = 16  # sets of buffers that are kept: calls at a time that need no allocation
PARTIAL_COLUMNS = 2048  # columns of C at a time whose 16-bit sums are kept: wide enough to repay packing A
L1_WAYS, L1_WAY = 8, 4 << 10  # of 32 KiB; a larger L1 has more ways
SUMS_BYTES = L1_WAYS * L1_WAY // 2  # of sums that are kept while one row of C is computed
PAD = 16  # elements that keep the packed rows of A off one common cache set

# A with its steps of k together is read in place, always. Up to these limits the other layouts are too: each element is
# used too rarely to repay a copy. `python -m bench cpu-paths` measures both ways around them. B by columns is read in
# place by one row tile alone: where there are more, the first one leaves it packed for the others.
DIRECT_ROWS = 16  # row tiles of C that share an element of B, where its columns lie together
ALIASED_ROWS = 2  # the same where rows of B lie a multiple of ALIASED bytes apart: a panel of them has few cache sets
ALIASED = L1_WAY // 2
DIRECT_PANELS = 2  # column panels of C that share an element of A
# One row of C reads B in the order of memory where a row of B has so many bytes (Zen 3, from memory: 0.9 of the speed
# of register tiles at 2048, 1.1 to 1.4 at 3072, 1.5 to 1.8 at 12288), and always where elements are converted.
SEQUENTIAL_BYTES = 2560
# Products of few lanes along k store C row by row, where a row has so many bytes (Zen 3, from memory: 1.2 to 2.8 times
# the speed of register tiles, which store pieces of rows; 0.7 at 512 bytes).
OUTER_STEPS, OUTER_BYTES = 2, 1024
OUTER_LANES = 1 << 16  # of sums that are kept there until they are stored
TRANSPOSED_C_VECTORS = 0.75  # C is computed as its transpose where that has at most so many times the vectors

# Multiply-adds of one more thread that repay waking it (about 2 µs, Zen 4).
THREAD_GRAIN = 1 << 18
MAX_BLOCKS = 8  # of one product that a thread computes
SQUAREST = 19.6  # 2·√(3·32): times √tiles, what packing costs a block of the best height and width, in `split_c`


@dataclass(frozen=True)
class Cpu:
    """What ``choose`` must know of a CPU: instruction set, bytes of L2 and of L3 that a core has.

    fused: multiply-add with one rounding. bf16_dot: vdpbf16ps. has_fp16_convert: float16 to float32 and back.
    """

    isa: str
    l2: int = 1 << 20
    l3: int = 4 << 20
    fused: bool = True
    bf16_dot: bool = False
    has_fp16_convert: bool = True


@dataclass(frozen=True)
class BlockConfig:
    """One compiled GEMM: lanes, register tile mr × nr, blocks mc, kc, nc, chunk of k, partial sums, what to pack."""

    dtype: str
    isa: str
    fused: bool
    bf16_dot: bool
    lanes: int
    mr: int
    nr: int
    mc: int
    kc: int
    nc: int
    chunk: int = CHUNK
    partial_lanes: int = PARTIAL_BYTES // 4
    direct_rows: int = DIRECT_ROWS
    aliased_rows: int = ALIASED_ROWS
    sequential_bytes: int = SEQUENTIAL_BYTES
    transposed_rows: int = 6
    direct_panels: int = DIRECT_PANELS

    @property
    def name(self) -> str:
        """What a profiler shows: ``sgemm_avx512_6x64``."""
        return f"{PREFIX[self.dtype]}gemm_{self.isa}{'_bf16' * self.bf16_dot}_{self.mr}x{self.nr}"

    @property
    def accumulator(self) -> str:
        return ACCUMULATOR[self.dtype]

    @property
    def accumulates_wider(self) -> bool:
        """Whether sums are wider than the elements of C, and kept in a buffer until their only rounding."""
        return self.accumulator != self.dtype

    @property
    def vectors(self) -> int:
        """Vectors in a row of the register tile."""
        return self.nr // self.lanes

    @property
    def chain(self) -> int:
        """Steps of k in one chain of a long sum: panels hold whole ones."""
        return CHAIN[self.dtype] * self.k_per_lane

    @property
    def k_per_lane(self) -> int:
        """Steps of k in a lane."""
        return 2 if self.bf16_dot else 1

    @property
    def k_lanes(self) -> int:
        """Lanes that one row or column of a block takes along k: a lane holds one step, or a pair."""
        return round_up(self.kc // self.k_per_lane, self.lanes)

    @property
    def lane_bytes(self) -> int:
        return SIZES[self.accumulator]

    @property
    def a_bytes(self) -> int:
        """The packed block of A, in either order of packing."""
        by_rows, by_columns = self.mc * (self.k_lanes + PAD), self.k_lanes * (round_up(self.mc, self.lanes) + PAD)
        return max(by_rows, by_columns) * self.lane_bytes

    @property
    def b_bytes(self) -> int:
        """The packed panel of B."""
        return self.k_lanes * self.nc * self.lane_bytes

    @property
    def thread_bytes(self) -> int:
        """A thread's packing buffers, and two buffers of partial sums: of a chunk of k, and of those before."""
        return round_up(self.a_bytes, 64) + round_up(self.b_bytes, 64) + 2 * self.partial_lanes * self.lane_bytes


def compiled_for(config: BlockConfig) -> BlockConfig:
    """What compiled code depends on: ``config`` without what it reads when it runs (see config_words.py)."""
    tile = ("dtype", "isa", "fused", "bf16_dot", "lanes", "mr", "nr")
    words: dict[str, Any] = {field.name: 0 for field in fields(config) if field.name not in tile}
    return replace(config, **words)


def round_up(value: int, step: int) -> int:
    """``value`` rounded up to a multiple of ``step``."""
    return -(-value // step) * step


def choose(dtype: str, cpu: Cpu) -> BlockConfig:
    """The configuration for ``dtype`` on ``cpu``: a pure function, for any CPU.

    >>> choose("float32", Cpu("avx512", l2=1 << 20, l3=32 << 20)).name
    'sgemm_avx512_6x64'
    """
    if dtype not in SIZES:
        raise ValueError(f"dtype must be one of {', '.join(SIZES)}, got {dtype}")
    if cpu.isa not in TILES:
        raise ValueError(f"isa must be one of {', '.join(ISAS)}, got {cpu.isa}")
    if dtype == "float16" and not cpu.has_fp16_convert:
        raise ValueError("float16 needs a CPU that converts it")
    bf16_dot = dtype == "bfloat16" and cpu.bf16_dot
    size, depth = SIZES[ACCUMULATOR[dtype]], KC[dtype]
    mr, vectors, width = TILES[cpu.isa]
    lanes = width // size
    nr = vectors * lanes
    mc = max(mr, int(A_SHARE * min(cpu.l2, L2_USED) / (depth * size)) // mr * mr)
    nc = max(nr, int(B_SHARE * min(cpu.l3, L3_USED) / (depth * size)) // nr * nr)
    return BlockConfig(
        dtype, cpu.isa, cpu.fused, bf16_dot, lanes, mr, nr, mc, depth * (1 + bf16_dot), nc,
        partial_lanes=PARTIAL_BYTES // size, transposed_rows=mr,
    )  # fmt: skip


def tile_sizes(most: int) -> tuple[int, ...]:
    """Tile sizes that cover any number of rows, or of vectors: ``most``, then powers of two down to 1.

    >>> tile_sizes(6), tile_sizes(4), tile_sizes(1)
    ((6, 4, 2, 1), (4, 2, 1), (1,))
    """
    powers = (1 << bit for bit in range(most.bit_length(), -1, -1))
    return (most, *(power for power in powers if power < most))


def k_block(k: int, kc: int, chain: int) -> int:
    """Steps of k in a panel: the fewest panels of at most kc, whole chains, as equal as that allows.

    >>> k_block(1024, 384, 128), k_block(400, 384, 128), k_block(100, 384, 32), k_block(0, 384, 32)
    (384, 256, 128, 32)
    """
    if k <= chain:
        return chain
    chains = (k + chain - 1) // chain
    panels = (chains * chain + kc - 1) // kc
    return (chains + panels - 1) // panels * chain


def chain_lanes(k: int, short: int, long: int) -> int:
    """Lanes along k in one chain of multiply-adds.

    >>> chain_lanes(128, 32, 128), chain_lanes(129, 32, 128)
    (32, 128)
    """
    return short if k <= SHORT_K else long


def split_c(row_tiles: int, panels: int, threads: int, least: int) -> tuple[int, int]:
    """Into how many blocks to cut the rows and the columns of C, so that the slowest thread is done soonest.

    A block is a product of its own: it packs its own rows of A and columns of B, which counts as 1/8 of a tile a row
    tile and 4/3 a panel (Zen 4), so of cuts that share the tiles as well the squarest wins. None has less than
    ``least`` tiles, but where C itself has. Where one block a thread is more than a tenth slower than an equal share of
    the tiles, a thread may get up to MAX_BLOCKS.

    >>> split_c(row_tiles=171, panels=16, threads=2, least=1), split_c(1, 16, 4, 1), split_c(1, 16, 4, 8)
    ((1, 2), (1, 4), (1, 2))
    """
    if threads == 1:
        return 1, 1
    tiles = float(row_tiles * panels)
    best_rows, best_columns, best = 1, 1, 24 * row_tiles * panels + 3 * row_tiles + 32 * panels
    for each in range(1, MAX_BLOCKS + 1):
        share = -(-tiles / (each * threads) // 1)
        if each > 1 and best <= 1.1 * (24 * tiles / threads + SQUAREST * (tiles / threads) ** 0.5):
            break
        if best <= each * (24 * share + SQUAREST * share**0.5):
            continue
        for rows in range(1, min(each * threads, row_tiles) + 1):
            narrowest = (least + row_tiles // rows - 1) // (row_tiles // rows)
            columns = min(each * threads // rows, panels // narrowest)
            if columns == 0:
                break
            tall, wide = (row_tiles + rows - 1) // rows, (panels + columns - 1) // columns
            cost = (rows * columns + threads - 1) // threads * (24 * tall * wide + 3 * tall + 32 * wide)
            if cost < best:
                best_rows, best_columns, best = rows, columns, cost
    return best_rows, best_columns


def prefer_split_k(row_tiles: int, panels: int, chunks: int, batch: int, threads: int) -> bool:
    """Whether threads share the chunks of k of a product, each all of C: where that leaves the slowest less to do than
    sharing the tiles of C, at best. Two tiles a thread are few enough to repay the partial results.

    >>> prefer_split_k(1, 1, 4, 1, 2), prefer_split_k(1, 56, 3, 1, 64), prefer_split_k(2, 1, 4, 1, 2)
    (True, False, False)
    """
    tiles = row_tiles * panels
    if batch * tiles >= 2 * threads:
        return False
    return (batch * chunks + threads - 1) // threads * tiles < (batch * tiles + threads - 1) // threads * chunks


def useful_threads(work: float, threads: int) -> int:
    """Threads that so many multiply-adds can occupy, at most ``threads``.

    >>> useful_threads(8.0**3, 64), useful_threads(512.0**3, 64)
    (1, 64)
    """
    return max(1, min(threads, int(min(work / THREAD_GRAIN, 1024.0))))


def grain_tiles(work: float, tiles: int) -> int:
    """Tiles of C, of ``tiles`` that take ``work`` multiply-adds, which repay a thread.

    >>> grain_tiles(512.0**3, 2752), grain_tiles(1.0, 1) > 1
    (6, True)
    """
    return int(max(1.0, min(-(-THREAD_GRAIN * tiles / work // 1), 1e9)))


def threads_per_product(batch: int, threads: int) -> int:
    """Threads that share one product of a batch: as few as leave the slowest at most a tenth more than its share.

    >>> [threads_per_product(batch, 2) for batch in (1, 3, 4, 11)], threads_per_product(6, 4)
    ([2, 2, 1, 1], 2)
    """
    count = 1
    while 10 * threads * ((batch * count + threads - 1) // threads) > 11 * batch * count:
        count += 1
    return count


def prefer_transposed_c(m: int, n: int, c_rs: int, c_cs: int, lanes: int) -> bool:
    """Whether C is computed as its transpose: it has few columns, or adjacent rows and not few of them.

    >>> prefer_transposed_c(100, 3, 3, 1, 16), prefer_transposed_c(100, 64, 64, 1, 16)
    (True, False)
    >>> prefer_transposed_c(100, 64, 1, 100, 16)
    True
    """
    by_columns = c_rs == 1 and c_cs != 1
    if n >= lanes and not by_columns:
        return False
    wide, tall = (n + lanes - 1) // lanes, (m + lanes - 1) // lanes
    if n < lanes and n * tall <= TRANSPOSED_C_VECTORS * m * wide:
        return True
    few_rows = m < lanes and m * wide <= TRANSPOSED_C_VECTORS * n * tall
    return by_columns and not few_rows
