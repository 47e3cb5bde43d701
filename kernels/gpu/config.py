"""Which tile multiplies which problem on which GPU: pure data and arithmetic, without torch or triton."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

ITEM_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
SHORT_NAMES = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32", "float64": "fp64"}

# A vector load is 16 bytes, and Triton proves that one is legal only from divisibility by 16 elements.
ALIGNMENT = 16

# Room for the barriers that the compiler puts beside the operand tiles.
BARRIER_BYTES = 1024

# More accumulators than this leave no registers for operands and addresses (255 is the hardware's limit); before
# sm_90 the operands of the matrix instruction are in registers too.
MAX_ACCUMULATOR_REGISTERS = 128
MAX_ACCUMULATOR_REGISTERS_BEFORE_90 = 64


@dataclass(frozen=True)
class Problem:
    """C = A . B as the tile choice sees it: (m, k) . (k, n), dtype, how each operand lies in memory.

    dtype: "float16", "bfloat16", "float32" or "float64", of a, b and c. precision: "ieee", or "tf32" for
    float32 operands rounded to 10 mantissa bits. a, b: "N" (columns adjacent), "T" (rows adjacent) or
    "S" (neither). aligned: 16-byte loads are legal along the adjacent dimension of both operands.
    """

    m: int
    n: int
    k: int
    dtype: str
    a: str = "N"
    b: str = "N"
    precision: str = "ieee"
    aligned: bool = True


@dataclass(frozen=True)
class Target:
    """A GPU: compute capability as major * 10 + minor, multiprocessors, shared bytes a block."""

    arch: int
    sms: int
    shared_bytes: int


@dataclass(frozen=True)
class TileConfig:
    """One compiled shape of the kernel: a block_m x block_n tile of C, block_k deep, by `warps` warps.

    stages: operand tiles in flight. group_m: rows of tiles walked together, so that B's tiles are met again
    in the L2 cache. split_k: parts that k is cut into.
    """

    block_m: int
    block_n: int
    block_k: int
    stages: int
    warps: int
    group_m: int = 8
    split_k: int = 1


# Largest first. BLOCK_K is one number a kind, so the order in which k is summed depends on nothing but k.
# 16-bit tiles are those of Triton's and DeepGEMM's H100 tables; all are cut to compile without spills for
# sm_80, sm_90 and sm_100. None has been timed yet.
TILES = {
    ("half", True): (
        TileConfig(128, 256, 64, stages=3, warps=8),
        TileConfig(128, 128, 64, stages=4, warps=8),
        TileConfig(128, 128, 64, stages=3, warps=8),
        TileConfig(64, 128, 64, stages=4, warps=4),
        TileConfig(64, 64, 64, stages=4, warps=4),
    ),
    ("half", False): (
        TileConfig(64, 128, 64, stages=3, warps=8),
        TileConfig(64, 64, 64, stages=3, warps=8),
    ),
    ("tf32", True): (
        TileConfig(128, 128, 32, stages=3, warps=8),
        TileConfig(64, 128, 32, stages=3, warps=4),
        TileConfig(64, 64, 32, stages=3, warps=4),
    ),
    ("tf32", False): (
        TileConfig(64, 128, 32, stages=3, warps=8),
        TileConfig(64, 64, 32, stages=3, warps=4),
    ),
    ("fp32", True): (
        TileConfig(128, 128, 16, stages=3, warps=8),
        TileConfig(128, 64, 16, stages=3, warps=8),
        TileConfig(64, 64, 16, stages=3, warps=8),
    ),
    ("fp32", False): (TileConfig(64, 64, 16, stages=3, warps=8),),
    ("fp64", True): (
        TileConfig(64, 64, 16, stages=3, warps=8),
        TileConfig(32, 32, 16, stages=3, warps=4),
    ),
    ("fp64", False): (TileConfig(32, 32, 16, stages=3, warps=4),),
}


def layout(row_stride: int, col_stride: int) -> str:
    """How a matrix lies in memory: "N" if its columns are adjacent, "T" if its rows are, "S" if neither.

    >>> layout(5, 1), layout(1, 5), layout(10, 2), layout(0, 1)
    ('N', 'T', 'S', 'N')
    """
    return "N" if col_stride == 1 else "T" if row_stride == 1 else "S"


def kind(problem: Problem) -> str:
    """The row of TILES that serves a problem: "half", "tf32", "fp32" or "fp64"."""
    if problem.dtype not in ITEM_BYTES:
        raise ValueError(f"no GPU kernel for dtype {problem.dtype}")
    if ITEM_BYTES[problem.dtype] == 2:
        return "half"
    return "tf32" if problem.precision == "tf32" else SHORT_NAMES[problem.dtype]


def kernel_name(problem: Problem, config: TileConfig) -> str:
    """The name that a profiler shows.

    >>> kernel_name(Problem(1, 1, 1, "bfloat16", "N", "T"), TileConfig(128, 256, 64, stages=3, warps=8))
    'gemm_nt_bf16_128x256x64_s3_w8'
    """
    tile = f"{config.block_m}x{config.block_n}x{config.block_k}"
    letters = (problem.a + problem.b).lower()
    number = "tf32" if problem.precision == "tf32" else SHORT_NAMES[problem.dtype]
    return f"gemm_{letters}_{number}_{tile}_s{config.stages}_w{config.warps}"


def shared_bytes(config: TileConfig, problem: Problem, target: Target) -> int:
    """An upper bound on the shared memory of one block: the operand tiles in flight, or the tile of C.

    The rounded TF32 copy of B is a tile more where the matrix unit reads its operands from shared memory.
    """
    item = ITEM_BYTES[problem.dtype]
    operands = config.stages * (config.block_m + config.block_n) * config.block_k * item
    if problem.precision == "tf32" and target.arch >= 90:
        operands += (config.block_m + config.block_n) * config.block_k * item
    return max(operands, config.block_m * config.block_n * item) + BARRIER_BYTES


def is_valid(config: TileConfig, problem: Problem, target: Target) -> bool:
    """Whether a tile may be launched for a problem on a GPU: every constraint of the kernel is here."""
    blocks = (config.block_m, config.block_n, config.block_k, config.warps)
    if any(size < 1 or size & (size - 1) for size in blocks):
        return False
    if problem.dtype not in ITEM_BYTES or target.arch < 80:
        return False
    if problem.precision != "ieee" and (problem.precision, problem.dtype) != ("tf32", "float32"):
        return False
    # 64-row matrix instructions (wgmma, tcgen05) sum k in another order than 16-row ones (mma.sync): with
    # one family an architecture, a row's bits do not depend on m.
    rows = 64 if kind(problem) in ("half", "tf32") and 90 <= target.arch < 120 else 16
    words = 2 if problem.dtype == "float64" else 1
    most = MAX_ACCUMULATOR_REGISTERS if target.arch >= 90 else MAX_ACCUMULATOR_REGISTERS_BEFORE_90
    accumulators = config.block_m * config.block_n * words // (32 * config.warps)
    return (
        config.block_m >= rows
        and min(config.block_n, config.block_k) >= 16
        and config.warps in ((4, 8) if rows == 64 else (1, 2, 4, 8, 16))
        and 1 <= config.stages <= 8
        and config.group_m >= 1
        and config.split_k == 1
        and accumulators <= most
        and shared_bytes(config, problem, target) <= target.shared_bytes
    )


def cost(config: TileConfig, problem: Problem, target: Target) -> int:
    """Waves of tiles over the multiprocessors, each as long as its products and its operand reads.

    A read is counted as 64 products: the ratio at which a 64 x 64 tile is as much reading as multiplying.
    """
    tiles = -(-problem.m // config.block_m) * -(-problem.n // config.block_n)
    waves = -(-tiles // target.sms)
    return waves * (config.block_m * config.block_n + 64 * (config.block_m + config.block_n))


@lru_cache(maxsize=4096)
def choose(problem: Problem, target: Target) -> TileConfig:
    """The tile for a problem on a GPU: the cheapest valid one by `cost`, the largest of equals.

    Pure: no timing, no state, so every run gives the same bits. block_k is set by dtype and precision alone.
    Raises ValueError where no tile is valid (an unknown dtype, a GPU before sm_80).
    """
    tiles = [tile for tile in TILES[kind(problem), problem.aligned] if is_valid(tile, problem, target)]
    if not tiles:
        raise ValueError(f"no tile for {problem} on {target}")
    return min(tiles, key=lambda tile: cost(tile, problem, target))
