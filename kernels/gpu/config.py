"""Problem, GPU and tile as plain data, and which tile is valid for which problem; without torch or triton."""

from __future__ import annotations

from dataclasses import dataclass

ITEM_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8, "float8_e4m3fn": 1, "float8_e5m2": 1}
SHORT_NAMES = {
    "float16": "fp16",
    "bfloat16": "bf16",
    "float32": "fp32",
    "float64": "fp64",
    "float8_e4m3fn": "fp8e4nv",
    "float8_e5m2": "fp8e5",
}
PRECISIONS = ("ieee", "tf32", "tf32x3")

# A vector load is 16 bytes, and Triton proves that one is legal only from divisibility by 16 elements.
ALIGNMENT = 16

# TMA reads rows of whole 16 bytes: so many elements of 16 bits.
PADDING = 8

# CUDA's limit of the first dimension of a grid, the only one that is used.
MAX_PROGRAMS = 2**31 - 1

# Room for the barriers that the compiler puts beside the operand tiles.
BARRIER_BYTES = 2048

# What they take in the compiled kernels of path "tma", and what CUDA reserves for each block.
MEASURED_BARRIER_BYTES, RESERVED_BYTES = 128, 1024
# Registers of a thread besides its accumulators in those kernels.
OTHER_REGISTERS = 64

# More accumulators than this leave no registers for operands and addresses (255 is the hardware's limit); before
# sm_90 the operands of the matrix instruction are in registers too.
MAX_ACCUMULATOR_REGISTERS = 128
MAX_ACCUMULATOR_REGISTERS_BEFORE_90 = 64

# At most so many bytes of partial results where k is split: they stay in the L2 cache.
WORKSPACE_BYTES = 32 << 20
# A split of k has at least so many steps of block_k; shorter ones end before the pipeline is full.
MIN_STEPS_PER_SPLIT = 4


@dataclass(frozen=True)
class Problem:
    """What the choice of a tile depends on: C = A . B, (m, k) . (k, n), with dtype, precision and layouts.

    dtype: a name of ITEM_BYTES, of a, b and c; `result` is c's where it is another one: of 8-bit operands, and float32
    of 16-bit ones. precision: "ieee", or for float32 "tf32" (rounded to 10 mantissa bits) or "tf32x3" (the sum of two
    such numbers). a, b: "N" (columns adjacent), "T" (rows adjacent) or "S" (neither). aligned: 16-byte loads are legal
    along the adjacent dimension of both operands. tma: TMA can read both. batch: the number of matrices. invariant: a
    row of C has the same bits for any m.
    """

    m: int
    n: int
    k: int
    dtype: str
    a: str = "N"
    b: str = "N"
    precision: str = "ieee"
    aligned: bool = True
    tma: bool = False
    batch: int = 1
    invariant: bool = False
    result: str = ""


@dataclass(frozen=True)
class Target:
    """A GPU: compute capability as major * 10 + minor, multiprocessors, shared bytes a block."""

    arch: int
    sms: int
    shared_bytes: int


@dataclass(frozen=True)
class TileConfig:
    """One compiled shape of a kernel: a block_m x block_n tile of C, block_k deep, by `warps` warps.

    path: the kernel: "pointers" (gemm.py), "tma" (tma.py) or "vector" (vector.py: block_m rows of the matrix, and
    block_n is 1). stages: operand tiles in flight. group_m: rows of tiles visited together, so that tiles of B are
    reused from the L2 cache. split_k: number of splits of k. subtiles: parts in which "tma" stores a tile.
    """

    block_m: int
    block_n: int
    block_k: int
    stages: int
    warps: int
    group_m: int = 8
    split_k: int = 1
    path: str = "pointers"
    subtiles: int = 1


def layout(row_stride: int, col_stride: int) -> str:
    """The layout of a matrix: "N" if its columns are adjacent in memory, "T" if its rows are, "S" if neither.

    >>> layout(5, 1), layout(1, 5), layout(10, 2), layout(0, 1)
    ('N', 'T', 'S', 'N')
    """
    return "N" if col_stride == 1 else "T" if row_stride == 1 else "S"


def kind(problem: Problem) -> str:
    """Which unit multiplies: "fp8", "half", "tf32", "tf32x3", "fp32" or "fp64"."""
    if problem.dtype not in ITEM_BYTES:
        raise ValueError(f"no GPU kernel for dtype {problem.dtype}")
    if ITEM_BYTES[problem.dtype] <= 2:
        return "half" if ITEM_BYTES[problem.dtype] == 2 else "fp8"
    return SHORT_NAMES[problem.dtype] if problem.precision == "ieee" else problem.precision


def dtype_name(problem: Problem) -> str:
    """The short name of dtype and precision.

    >>> dtype_name(Problem(1, 1, 1, "bfloat16")), dtype_name(Problem(1, 1, 1, "float32", precision="tf32"))
    ('bf16', 'tf32')
    """
    return SHORT_NAMES[problem.dtype] if problem.precision == "ieee" else problem.precision


def kernel_name(problem: Problem, config: TileConfig) -> str:
    """The name that a profiler shows.

    >>> kernel_name(Problem(1, 1, 1, "bfloat16", "N", "T"), TileConfig(128, 256, 64, stages=3, warps=8))
    'gemm_nt_bf16_128x256x64_s3_w8'
    >>> kernel_name(Problem(1, 1, 1, "float32"), TileConfig(64, 64, 16, 3, 8, split_k=4))
    'gemm_nn_fp32_64x64x16_s3_w8_k4'
    """
    stem = {"pointers": "gemm", "tma": "gemm_tma", "vector": "matvec"}[config.path]
    tile = f"{config.block_m}x{config.block_n}x{config.block_k}"
    split = f"_k{config.split_k}" if config.split_k > 1 else ""
    group = f"_g{config.group_m}" if config.group_m != TileConfig.group_m else ""
    letters = (problem.a + problem.b).lower()
    return f"{stem}_{letters}_{dtype_name(problem)}_{tile}_s{config.stages}_w{config.warps}{group}{split}"


def cdiv(size: int, block: int) -> int:
    return -(-size // block)


def k_steps(problem: Problem, config: TileConfig) -> int:
    return cdiv(problem.k, config.block_k)


def work_items(problem: Problem, config: TileConfig) -> int:
    """Tiles of all products and all splits of k: the programs of a launch, unless one computes several."""
    rows, cols = (problem.m * problem.n, 1) if config.path == "vector" else (problem.m, problem.n)
    return cdiv(rows, config.block_m) * cdiv(cols, config.block_n) * config.split_k * problem.batch


def workspace_bytes(problem: Problem, config: TileConfig) -> int:
    """Bytes of the partial results where k is split, else 0."""
    if config.split_k == 1:
        return 0
    return problem.batch * config.split_k * problem.m * problem.n * max(4, ITEM_BYTES[problem.dtype])


def shared_bytes(config: TileConfig, problem: Problem, target: Target) -> int:
    """An upper bound on the shared memory of one block: the operand tiles in flight, and the tile of C.

    The copies of TF32 operands that were rounded are a tile more where the matrix unit reads from shared memory.
    The tile of C that TMA stores lies beside the operands, others in their place.
    """
    item = ITEM_BYTES[problem.dtype]
    result = config.block_m * config.block_n * ITEM_BYTES[problem.result or problem.dtype]
    operands = config.stages * (config.block_m + config.block_n) * config.block_k * item
    if problem.precision != "ieee" and target.arch >= 90:
        operands += (config.block_m + config.block_n) * config.block_k * item
    if config.path == "vector":
        ahead = (config.stages - 1) * (config.block_m + 1) * config.block_k * item
        return ahead + 4 * max(4, item) * config.block_m * config.warps + BARRIER_BYTES
    if config.path == "tma":
        return operands + result // config.subtiles + BARRIER_BYTES
    return max(operands, result) + BARRIER_BYTES


def resident_blocks(config: TileConfig, problem: Problem, target: Target) -> int:
    """Blocks of path "tma" that a multiprocessor holds at once, at least 1; other paths are taken to have 1."""
    return fitting_blocks(config, problem, target) if config.path == "tma" else 1


def fitting_blocks(config: TileConfig, problem: Problem, target: Target) -> int:
    """Blocks that a multiprocessor holds at once by an estimate of what one takes, at least 1.

    By shared memory, of which CUDA reserves 1 KiB for each block, and by registers: those of the accumulators and what
    the compiled kernels of path "tma" need besides (`tests/kernels/gpu/test_flatten.py` holds the estimate against
    them).
    """
    shared = shared_bytes(config, problem, target) - BARRIER_BYTES + MEASURED_BARRIER_BYTES + RESERVED_BYTES
    threads = 32 * config.warps
    registers = config.block_m * config.block_n // threads + OTHER_REGISTERS
    return max(1, min((target.shared_bytes + RESERVED_BYTES) // shared, (1 << 16) // (threads * registers)))


def is_valid(config: TileConfig, problem: Problem, target: Target) -> bool:
    """Whether a tile may be launched for a problem on a GPU. Every constraint of the kernels is here."""
    blocks = (config.block_m, config.block_n, config.block_k, config.warps)
    if any(size < 1 or size & (size - 1) for size in blocks):
        return False
    if problem.dtype not in ITEM_BYTES or target.arch < 80 or not _is_valid_split(config, problem):
        return False
    if problem.precision not in PRECISIONS or (problem.precision != "ieee" and problem.dtype != "float32"):
        return False
    if kind(problem) == "fp8" and not _is_valid_fp8(problem, target):
        return False
    on_path = {"pointers": _is_valid_gemm, "tma": _is_valid_tma, "vector": _is_valid_vector}.get(config.path)
    return (
        on_path is not None
        and on_path(config, problem, target)
        and 1 <= config.stages <= 8
        and config.group_m >= 1
        and work_items(problem, config) <= MAX_PROGRAMS
        and shared_bytes(config, problem, target) <= target.shared_bytes
    )


def _is_valid_split(config: TileConfig, problem: Problem) -> bool:
    if config.split_k == 1:
        return True
    enough = 1 < config.split_k <= k_steps(problem, config) // MIN_STEPS_PER_SPLIT
    return enough and not problem.invariant and workspace_bytes(problem, config) <= WORKSPACE_BYTES


def _is_valid_fp8(problem: Problem, target: Target) -> bool:
    # The matrix units read 8 bits along k alone.
    wide = problem.result in ITEM_BYTES and ITEM_BYTES[problem.result] in (2, 4)
    return wide and target.arch >= 89 and problem.a + problem.b == "NT" and problem.aligned and problem.batch == 1


def _is_valid_gemm(config: TileConfig, problem: Problem, target: Target) -> bool:
    return config.subtiles == 1 and _fits_matrix_unit(config, problem, target)


def _fits_matrix_unit(config: TileConfig, problem: Problem, target: Target) -> bool:
    # 64-row matrix instructions (wgmma, tcgen05) sum k in another order than 16-row ones (mma.sync): with
    # one family an architecture, a row's bits do not depend on m.
    rows = 64 if kind(problem) in ("fp8", "half", "tf32", "tf32x3") and 90 <= target.arch < 120 else 16
    # Before sm_100, 8-bit products are added in registers of their own before the float32 accumulators.
    registers = 2 if problem.dtype == "float64" or (kind(problem) == "fp8" and target.arch < 100) else 1
    most = MAX_ACCUMULATOR_REGISTERS if target.arch >= 90 else MAX_ACCUMULATOR_REGISTERS_BEFORE_90
    if kind(problem) == "half" and problem.result == "float32" and target.arch >= 100:
        most = MAX_ACCUMULATOR_REGISTERS // 2  # a float32 source takes registers beside those that leave tensor memory
    accumulators = config.block_m * config.block_n * registers // (32 * config.warps)
    return (
        config.block_m >= rows
        and min(config.block_n, config.block_k) >= 16
        and config.warps in ((4, 8) if rows == 64 else (1, 2, 4, 8, 16))
        and accumulators <= most
    )


def _is_valid_tma(config: TileConfig, problem: Problem, target: Target) -> bool:
    # sm_120 has TMA too, but no matrix instruction that reads operands from shared memory.
    return (
        problem.tma
        and ITEM_BYTES[problem.dtype] <= 2
        and 90 <= target.arch < 120
        and max(config.block_m, config.block_n, config.block_k) <= 256
        and config.subtiles in (1, 2)
        and _fits_matrix_unit(config, problem, target)
    )


def _is_valid_vector(config: TileConfig, problem: Problem, target: Target) -> bool:
    return (
        1 in (problem.m, problem.n)
        and problem.batch == 1
        and problem.precision == "ieee"
        and kind(problem) != "fp8"
        and not problem.invariant
        and config.block_n == config.subtiles == 1
        and 16 <= config.block_m * config.block_k // (32 * config.warps) <= 64
        and config.warps in (1, 2, 4, 8)
    )
