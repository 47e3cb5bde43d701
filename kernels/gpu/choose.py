"""Which tile is used for a problem on a GPU: candidate tiles, a model of the time, tuned configurations."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from . import tuned_configs
from .config import (
    ITEM_BYTES,
    Problem,
    Target,
    TileConfig,
    cdiv,
    is_valid,
    k_steps,
    kind,
    resident_blocks,
    work_items,
    workspace_bytes,
)

# Largest first. BLOCK_K is one number a kind, so the order of the sum over k depends on k alone.
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
    ("tf32x3", True): (
        TileConfig(128, 64, 32, stages=3, warps=8),
        TileConfig(64, 64, 32, stages=3, warps=8),
    ),
    ("tf32x3", False): (TileConfig(64, 64, 32, stages=3, warps=8),),
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
    ("fp8", True): (
        TileConfig(128, 128, 128, stages=3, warps=8),
        TileConfig(64, 64, 128, stages=3, warps=4),
    ),
    ("fp64", False): (TileConfig(32, 32, 16, stages=3, warps=4),),
}

# The H100 tiles of public tables (DeepGEMM's, Triton's tutorials), of 16-bit operands alone. The first two fill a
# multiprocessor; of the others it holds two or three, the last ones for a few rows.
TMA_TILES = (
    TileConfig(128, 256, 64, stages=4, warps=8, path="tma", subtiles=2),
    TileConfig(256, 128, 64, stages=3, warps=8, path="tma", subtiles=2),
    TileConfig(128, 128, 64, stages=3, warps=8, path="tma", subtiles=2),
    TileConfig(128, 64, 64, stages=4, warps=8, path="tma"),
    TileConfig(64, 128, 64, stages=3, warps=4, path="tma"),
    TileConfig(64, 64, 64, stages=4, warps=4, path="tma"),
    TileConfig(64, 32, 64, stages=8, warps=4, path="tma"),
)

# Twice as deep: as many bytes as in 16 bits.
FP8_TMA_TILES = (
    TileConfig(128, 256, 128, stages=3, warps=8, path="tma", subtiles=2),
    TileConfig(128, 128, 128, stages=4, warps=8, path="tma", subtiles=2),
    TileConfig(64, 128, 128, stages=5, warps=4, path="tma"),
    TileConfig(64, 64, 128, stages=6, warps=4, path="tma"),
)

# By the layout of the matrix: a program's threads lie along the dimension that is adjacent in memory.
VECTOR_TILES = {
    "N": TileConfig(16, 1, 256, stages=3, warps=4, path="vector"),
    "T": TileConfig(128, 1, 32, stages=3, warps=4, path="vector"),
    "S": TileConfig(64, 1, 64, stages=3, warps=4, path="vector"),
}
# Rows of tiles that are visited together: so many that the tiles of one wave are nearly a square of C. On 132
# multiprocessors that is 16 for tiles of 128 x 256 and 8 for 256 x 128. Which one matters where there are more rows.
GROUPS = (8, 16)
SPLITS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64, 128)


@dataclass(frozen=True)
class Rates:
    """Of one multiprocessor: FLOP/s by kind, bytes/s from L2. Of the GPU: bytes/s from memory, bytes of L2."""

    half: float
    tf32: float
    fp32: float
    fp64: float
    cache: float
    memory: float
    l2: float

    def of(self, kind: str) -> float:
        derived = {"tf32x3": self.tf32 / 3, "fp8": 2 * self.half}
        return derived[kind] if kind in derived else getattr(self, kind)


# Peak rates by the vendor's data sheets (A100, RTX 3090, RTX 4090, H100 SXM, B200, RTX 5090) over the multiprocessors
# of each; 64 bytes a clock from the L2 cache.
RATES = {
    80: Rates(2.89e12, 1.44e12, 0.18e12, 0.18e12, 90e9, 2.0e12, 40e6),
    86: Rates(0.85e12, 0.42e12, 0.42e12, 0.007e12, 108e9, 0.94e12, 6e6),
    89: Rates(1.29e12, 0.65e12, 0.65e12, 0.010e12, 160e9, 1.0e12, 72e6),
    90: Rates(7.49e12, 3.75e12, 0.51e12, 0.51e12, 112e9, 3.35e12, 50e6),
    100: Rates(15.2e12, 7.6e12, 0.54e12, 0.27e12, 118e9, 8.0e12, 126e6),
    120: Rates(1.23e12, 0.62e12, 0.62e12, 0.010e12, 154e9, 1.8e12, 96e6),
}
# The part of the peak that a tile of so many elements reaches in the matrix units, which read the operands of smaller
# ones from shared memory more often. Estimates, as all below; to be fitted to the first report of a GPU.
EFFICIENCY = {128 * 256: 0.85, 128 * 128: 0.75, 64 * 128: 0.6, 64 * 64: 0.4, 64 * 32: 0.25}
SUSTAINED = 0.8  # clocks under load, of those of the data sheets
CACHE_SHARE = 0.6  # what the L2 cache gives to all multiprocessors at once, of what it gives to one
FILL = 1.0e-6  # seconds until the first operands of a tile have arrived
LAUNCH = 2.5e-6  # seconds of a second kernel launch
OVERLAP = 0.1  # the part of the shorter of computing and reading that the longer one does not hide
PADDED_FROM = 2**28  # multiplications: below, no operand is copied
LAUNCHES_OF_A_COPY = 2  # its elements, and the zeros that pad it
STRIDED = 4  # times as many transactions where loads are narrow
TOKENS = 64  # sizes that tell tokens are rounded up to a multiple of this: block_k of 16-bit tiles
FUSED_GAIN = 0.95  # of the time of two launches: above it, what the model does not know may be more than what it saves
FUSED_WAVES = 2  # of tiles of both gradients: beyond, two persistent launches lose less than the shared one saves


def rates(target: Target) -> Rates:
    """The rates of the newest known architecture that is not newer than the target."""
    return RATES[max(arch for arch in RATES if arch <= max(target.arch, 80))]


def candidates(problem: Problem, target: Target) -> list[TileConfig]:
    """Every tile that `choose` compares and `tune` times, with every number of splits of k and every order of tiles."""
    tiles = list(TILES.get((kind(problem), problem.aligned), ()))
    if problem.tma:
        tiles = [*(FP8_TMA_TILES if kind(problem) == "fp8" else TMA_TILES), *tiles]
    if 1 in (problem.m, problem.n):
        letter = problem.a if problem.n == 1 else {"N": "T", "T": "N"}.get(problem.b, "S")
        tiles.append(VECTOR_TILES[letter])
    return [
        variant
        for tile in tiles
        for variant in variants(tile, cdiv(problem.m, tile.block_m) > GROUPS[0])
        if is_valid(variant, problem, target)
    ]


@lru_cache(maxsize=256)
def variants(tile: TileConfig, several: bool) -> tuple[TileConfig, ...]:
    """A tile with every number of splits of k, and where k is whole with every order of tiles.

    several: whether the orders differ, which they do where there are more rows of tiles than in the first one's group.
    """
    orders = {1: GROUPS} if several and tile.path == "tma" else {}
    return tuple(
        replace(tile, split_k=splits, group_m=group) for splits in SPLITS for group in orders.get(splits, GROUPS[:1])
    )


def predicted_seconds(config: TileConfig, problem: Problem, target: Target) -> float:
    """The model: each multiprocessor computes its tiles, bound by arithmetic or L2 reads; the whole bound by memory.

    Where several blocks are on a multiprocessor, one multiplies while another waits for its first operands or stores;
    the loads of a persistent program's next tile are under way while it stores.
    """
    rate, item = rates(target), ITEM_BYTES[problem.dtype]
    m, n, batch = problem.m, problem.n, problem.batch
    tiles = cdiv(work_items(problem, config), target.sms)
    steps = cdiv(k_steps(problem, config), config.split_k)
    narrow = 1 if problem.aligned or config.path == "tma" else STRIDED
    compute = (
        2 * config.block_m * config.block_n * config.block_k / (rate.of(kind(problem)) * efficiency(config, problem))
    )
    reads = (config.block_m + config.block_n) * config.block_k * item * narrow / (rate.cache * CACHE_SHARE)
    stores = config.block_m * config.block_n * item / (rate.cache * CACHE_SHARE)
    workspace = workspace_bytes(problem, config)
    memory = (operand_bytes(config, problem, target) + batch * m * n * item + 2 * workspace) / rate.memory
    overlapped = resident_blocks(config, problem, target) > 1
    fills = 1 if config.path == "tma" and (overlapped or config.split_k == 1) else tiles
    run = fills * FILL + tiles * steps * max(compute, reads) + (1 if overlapped else tiles) * stores
    return max(run, memory) + OVERLAP * min(run, memory) + (LAUNCH if config.split_k > 1 else 0)


def operand_bytes(config: TileConfig, problem: Problem, target: Target) -> float:
    """Bytes of A and B that are read from memory: once where they fit into the L2 cache, else once a wave of tiles.

    A wave is group_m rows of tiles, by as many columns as there are programs for.
    """
    m, n, k, item = problem.m, problem.n, problem.k, ITEM_BYTES[problem.dtype]
    once = problem.batch * (m + n) * k * item
    if once <= rates(target).l2 or config.path == "vector" or config.split_k > 1:
        return once
    wave = target.sms * resident_blocks(config, problem, target)
    rows = min(cdiv(m, config.block_m), config.group_m)
    cols = min(cdiv(n, config.block_n), wave / rows)
    waves = work_items(problem, config) / wave
    return max(once, waves * (rows * config.block_m + cols * config.block_n) * k * item)


def efficiency(config: TileConfig, problem: Problem) -> float:
    """The part of the data sheet's rate that a tile reaches; vector units wait for no operands in shared memory."""
    if config.path == "vector" or kind(problem) in ("fp32", "fp64"):
        return SUSTAINED
    size = max((known for known in EFFICIENCY if known <= config.block_m * config.block_n), default=min(EFFICIENCY))
    return SUSTAINED * EFFICIENCY[size]


def representative(problem: Problem) -> Problem:
    """The problem that stands for all of nearly as many tokens, so that a new number of them costs no new choice.

    Where m is tokens, as in a forward product, and where k is, as in the gradient of a weight. k has as many steps as
    before: a tile that is valid for this problem is valid for those that it stands for.
    """
    m = problem.m if problem.m <= 1 else cdiv(problem.m, TOKENS) * TOKENS
    whole = ITEM_BYTES.get(problem.dtype) == 2 and 1 not in (problem.m, problem.n)
    return replace(problem, m=m, k=cdiv(problem.k, TOKENS) * TOKENS if whole else problem.k)


def choose(problem: Problem, target: Target) -> TileConfig:
    """The tile for a problem on a GPU: the tuned one if there is one and it is valid, else the fastest predicted.

    Of equals the first of `candidates`. Pure: nothing is timed, and tuned configurations are read once a process, so
    every run gives the same bits. block_k depends on dtype and precision alone, but for "vector". Raises ValueError
    where no tile is valid (an unknown dtype, a GPU before sm_80).
    """
    tuned = tuned_configs.find(problem, target)
    if tuned is not None and is_valid(tuned, problem, target):
        return tuned
    return fastest_predicted(representative(problem), target)


@lru_cache(maxsize=4096)
def fastest_predicted(problem: Problem, target: Target) -> TileConfig:
    tiles = candidates(problem, target)
    if not tiles:
        raise ValueError(f"no tile for {problem} on {target}")
    return min(tiles, key=lambda tile: predicted_seconds(tile, problem, target))


def choose_padded(problem: Problem, target: Target, copied: tuple[bool, bool]) -> TileConfig | None:
    """The tile for padded copies of the operands that TMA cannot read, or None where none is predicted to be faster.

    copied: which of A and B would be. In batch-invariant mode none is: which way is faster depends on m.
    """
    m, n, k, batch = problem.m, problem.n, problem.k, problem.batch
    if True not in copied or problem.invariant or ITEM_BYTES.get(problem.dtype) != 2 or batch * m * n * k < PADDED_FROM:
        return None
    tile = choose(padded_problem(problem), target)
    elements = batch * sum(size for size, copy in zip((m * k, k * n), copied, strict=True) if copy)
    copying = 2 * elements * ITEM_BYTES[problem.dtype] / rates(target).memory + LAUNCHES_OF_A_COPY * LAUNCH * sum(
        copied
    )
    with_copies = predicted_seconds(tile, padded_problem(problem), target) + copying
    direct = predicted_seconds(choose(problem, target), problem, target)
    return tile if tile.path == "tma" and with_copies < direct else None


def padded_problem(problem: Problem) -> Problem:
    """The problem of operands that TMA can read: a layout that has no adjacent dimension becomes "N"."""
    a, b = ("T" if letter == "T" else "N" for letter in (problem.a, problem.b))
    return replace(problem, a=a, b=b, aligned=True, tma=True)


def is_valid_backward(tile: TileConfig, problem: Problem, grad: str, target: Target) -> bool:
    """Whether one launch may compute both gradients in tiles of this shape. grad: the layout of dC, "N" or "T"."""
    # Where the loads of both products look alike to the compiler, it keeps the operands of both in shared memory: where
    # the left operands are transposed alike, and the right ones too; blocks of one shape on the right do anyway.
    left, right = (problem.a == "N") == (grad == "T"), (problem.b == "N") == (grad == "T")
    alike = left and (right or tile.block_n == tile.block_k)
    return not alike and all(is_valid(tile, product, target) for product in gradients(problem))


def choose_backward(problem: Problem, grad: str, target: Target) -> TileConfig | None:
    """The tile for both gradients in one launch, or None where two launches are faster or no tile is valid.

    problem: of the forward product. grad: the layout of dC, "N" or "T", which TMA can read.
    """
    return fastest_fused(representative(problem), grad, target)


@lru_cache(maxsize=4096)
def fastest_fused(problem: Problem, grad: str, target: Target) -> TileConfig | None:
    grads = gradients(problem)
    tiles = [
        tile
        for tile in TMA_TILES
        if is_valid_backward(tile, problem, grad, target)
        and sum(work_items(product, tile) for product in grads) <= FUSED_WAVES * target.sms
    ]
    if not tiles:
        return None
    best = min(tiles, key=lambda tile: fused_time(tile, grads, target))
    separate_time = sum(predicted_seconds(choose(product, target), product, target) for product in grads) + LAUNCH
    return best if fused_time(best, grads, target) <= FUSED_GAIN * separate_time else None


def gradients(problem: Problem) -> tuple[Problem, Problem]:
    """dA = dC . Bt and dB = At . dC as problems, with dC row by row."""
    transposed = {"N": "T", "T": "N", "S": "S"}
    m, n, k = problem.m, problem.n, problem.k
    return (
        replace(problem, n=k, k=n, a="N", b=transposed[problem.b]),
        replace(problem, m=k, k=m, a=transposed[problem.a], b="N"),
    )


def fused_time(tile: TileConfig, grads: tuple[Problem, Problem], target: Target) -> float:
    """Predicted seconds of one grid over the tiles of both gradients, whose last waves overlap."""
    alone = [predicted_seconds(tile, product, target) for product in grads]
    tiles = [work_items(product, tile) for product in grads]
    waves = [cdiv(count, target.sms) for count in tiles]
    saved = sum(waves) - cdiv(sum(tiles), target.sms)
    return sum(alone) - saved * min(time / max(wave, 1) for time, wave in zip(alone, waves, strict=True))
