"""Which tile and which blocks: pure functions of the CPU, the dtype and the problem. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass

SIZES = {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2}  # bytes of an element in memory
ACCUMULATOR = {"float32": "float32", "float64": "float64", "bfloat16": "float32", "float16": "float32"}
PREFIX = {"float32": "s", "float64": "d", "bfloat16": "b", "float16": "h"}
ISAS = ("avx512", "avx2", "neon", "generic")

# The k-order is part of the numerical contract: an element of C is the sum, in order, of one chain of fused
# multiply-adds for every CHAIN steps of k (pairs, for bfloat16 in pairs). A different CHAIN gives different bits, so no
# cache size enters here. A short chain costs additions to a tile of C that is in L1: on Zen 4, 32 runs at 0.96-0.97 of
# the speed of 128. It is what keeps float32 and float64 within 2 × torch's error for small k too; the results of 16-bit
# operands are rounded so coarsely that one chain a panel serves.
CHAIN = {"float32": 32, "float64": 32, "bfloat16": 384, "float16": 384}

# Steps of k (pairs) in a packed panel, whole chains. On Zen 4 384 is as fast as 768 once C is prefetched.
KC = 384

# Register tiles (mr, vectors a row, bytes a vector). 6 × 4 zmm: 24 accumulators, 4 columns of B and one
# broadcast fill 29 of 32 registers; on Zen 4 it beat 12 × 2, 14 × 2 and 8 × 3 by 2-5 % as a whole GEMM.
TILES = {"avx512": (6, 4, 64), "avx2": (6, 2, 32), "neon": (6, 4, 16), "generic": (3, 2, 16)}

A_SHARE = 0.3  # of L2, for a packed block of A: the rest is for the panel of B that it meets, and for C
B_SHARE = 0.3  # of L3, for a packed panel of B; half of it at most, by contract
THREAD_BYTES = 6 << 20  # packed A, and the sums of a 16-bit product
WORKSPACE_SLOTS = 16  # calls at a time that find a kept set of buffers
SUM_COLUMNS = 2048  # columns of C at a time whose 16-bit sums are kept: wide enough to repay packing A
PAD = 16  # elements that keep the packed rows of A off one common cache set

# Below these, an operand is read in place: each element is used too rarely to repay a copy.
DIRECT_ROWS = 4  # row tiles of C that share an element of B
TRANSPOSED_ROWS = 12  # rows of C below which B is transposed in registers rather than packed
DIRECT_PANELS = 2  # column panels of C that share an element of A

# Multiply-adds that one more thread must find to repay waking it (about 2 µs, Zen 4).
THREAD_GRAIN = 1 << 18


@dataclass(frozen=True)
class Cpu:
    """What ``choose`` must know of a CPU: instruction set, bytes of L2 (one core) and L3 (all), and what it can do.

    fused: multiply-add with one rounding. bf16_pairs: vdpbf16ps. halves: float16 to float32 and back.
    """

    isa: str
    l2: int = 1 << 20
    l3: int = 32 << 20
    fused: bool = True
    bf16_pairs: bool = False
    halves: bool = True


@dataclass(frozen=True)
class BlockConfig:
    """One compiled GEMM: lanes, register tile mr × nr, and the blocks mc, kc, nc (elements)."""

    dtype: str
    isa: str
    fused: bool
    pairs: bool
    lanes: int
    mr: int
    nr: int
    mc: int
    kc: int
    nc: int

    @property
    def name(self) -> str:
        """What a profiler shows: ``sgemm_avx512_6x64``."""
        return f"{PREFIX[self.dtype]}gemm_{self.isa}{'_bf16' * self.pairs}_{self.mr}x{self.nr}"

    @property
    def accumulator(self) -> str:
        return ACCUMULATOR[self.dtype]

    @property
    def vectors(self) -> int:
        """Vectors in a row of the register tile."""
        return self.nr // self.lanes

    @property
    def chain(self) -> int:
        """Steps of k in one chain of multiply-adds."""
        return CHAIN[self.dtype] * (2 if self.pairs else 1)

    @property
    def k_lanes(self) -> int:
        """Lanes that one row or column of a block takes along k: a lane holds one step, or a pair."""
        return up(self.kc // (2 if self.pairs else 1), self.lanes)

    @property
    def lane_bytes(self) -> int:
        return SIZES[self.accumulator]

    @property
    def a_bytes(self) -> int:
        """The packed block of A, of which each thread has one, in either order of packing."""
        by_rows, by_columns = self.mc * (self.k_lanes + PAD), self.k_lanes * (up(self.mc, self.lanes) + PAD)
        return max(by_rows, by_columns) * self.lane_bytes

    @property
    def b_bytes(self) -> int:
        """The packed panel of B, shared by all threads."""
        return self.k_lanes * self.nc * self.lane_bytes

    @property
    def c_bytes(self) -> int:
        """A thread's share of the sums of a 16-bit product, which stay in float32 until their only rounding."""
        return THREAD_BYTES - self.a_bytes if self.lane_bytes > SIZES[self.dtype] else 0


def up(value: int, step: int) -> int:
    """``value`` rounded up to a multiple of ``step``."""
    return -(-value // step) * step


def choose(dtype: str, cpu: Cpu) -> BlockConfig:
    """The configuration for ``dtype`` on ``cpu``: pure, so that it can be asked about any CPU anywhere.

    >>> choose("float32", Cpu("avx512", l2=1 << 20, l3=32 << 20)).name
    'sgemm_avx512_6x64'
    """
    if dtype not in SIZES:
        raise ValueError(f"dtype must be one of {', '.join(SIZES)}, got {dtype}")
    if cpu.isa not in TILES:
        raise ValueError(f"isa must be one of {', '.join(ISAS)}, got {cpu.isa}")
    if dtype == "float16" and not cpu.halves:
        raise ValueError("float16 needs a CPU that converts it")
    pairs = dtype == "bfloat16" and cpu.bf16_pairs
    size, kc = SIZES[ACCUMULATOR[dtype]], 2 * KC if pairs else KC
    mr, vectors, width = TILES[cpu.isa]
    lanes = width // size
    nr = vectors * lanes
    mc = max(mr, int(min(A_SHARE * cpu.l2, THREAD_BYTES / 2) / (KC * size)) // mr * mr)
    nc = max(nr, int(min(B_SHARE, 0.5) * cpu.l3 / (KC * size)) // nr * nr)
    return BlockConfig(dtype, cpu.isa, cpu.fused, pairs, lanes, mr, nr, mc, kc, nc)


def steps(most: int) -> tuple[int, ...]:
    """Tile sizes that cover any number of rows, or of vectors: ``most``, then powers of two down to 1.

    >>> steps(6), steps(4), steps(1)
    ((6, 4, 2, 1), (4, 2, 1), (1,))
    """
    powers = (1 << bit for bit in range(most.bit_length(), -1, -1))
    return (most, *(power for power in powers if power < most))


def k_block(k: int, kc: int, chain: int) -> int:
    """Steps of k in a panel: the fewest panels of at most kc, whole chains, as equal as that allows.

    >>> k_block(1024, 384, 128), k_block(400, 384, 128), k_block(100, 384, 32), k_block(0, 384, 32)
    (384, 256, 128, 32)
    """
    chains = max(1, (k + chain - 1) // chain)
    panels = (chains * chain + kc - 1) // kc
    return (chains + panels - 1) // panels * chain


def split_threads(row_tiles: int, panels: int, threads: int) -> tuple[int, int]:
    """How many parts to cut the rows and the columns of C into, so that the slowest thread has least to do.

    k is never cut. Of equal plans the one with more row parts wins, since its threads share packed B.

    >>> split_threads(row_tiles=171, panels=16, threads=2), split_threads(1, 16, 4)
    ((1, 2), (1, 4))
    """
    best_rows, best_columns, best = 1, 1, row_tiles * panels
    for rows in range(threads, 0, -1):
        columns = threads // rows
        work = ((row_tiles + rows - 1) // rows) * ((panels + columns - 1) // columns)
        if work < best:
            best_rows, best_columns, best = rows, columns, work
    return best_rows, best_columns


def useful_threads(m: int, n: int, k: int, threads: int) -> int:
    """Threads that m·n·k multiply-adds can occupy, at most ``threads``."""
    return max(1, min(threads, m * n * k // THREAD_GRAIN))
