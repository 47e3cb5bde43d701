"""From a grouped product to its plan: tile, number of programs, arguments. Pure, without torch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from .arguments import Operands, PointerArg, Strides
from .choose import TILES, TMA_TILES, predicted_seconds, representative
from .config import Problem, Target, TileConfig, cdiv, fitting_blocks, is_valid, kernel_name, kind
from .groups import gemm_groups
from .groups_tma import gemm_groups_tma
from .plan import Plan, blocks, descriptor_arg, is_wide, matrix_arg, options

# A program holds the ends of all groups in registers: so many are at most eight of a thread.
MAX_GROUPS = 1023
# Sizes, and numbers of tiles, that 32 bits count, with room for a tile that ends behind them.
MAX_SIZE = 2**31 - 2**16

# Beside `choose.TILES`, some of which spill in the walk, which keeps more in registers. These do not for sm_80, sm_90,
# sm_100 and sm_120; none has been timed yet.
GROUP_TILES = TILES | {
    ("half", True): (
        TileConfig(128, 256, 64, stages=3, warps=8),
        TileConfig(128, 128, 64, stages=4, warps=8),
        TileConfig(128, 128, 64, stages=3, warps=8),
        TileConfig(64, 128, 64, stages=4, warps=8),
        TileConfig(64, 64, 64, stages=4, warps=4),
    ),
    ("half", False): (TileConfig(64, 64, 64, stages=3, warps=8),),
    ("tf32", True): (
        TileConfig(128, 64, 32, stages=3, warps=8),
        TileConfig(64, 128, 32, stages=3, warps=8),
        TileConfig(64, 64, 32, stages=3, warps=4),
    ),
    ("tf32", False): (TileConfig(64, 64, 32, stages=3, warps=8),),
    ("tf32x3", True): (TileConfig(64, 32, 32, stages=3, warps=8),),
    ("tf32x3", False): (TileConfig(64, 32, 32, stages=3, warps=8),),
    ("fp32", True): (
        TileConfig(128, 64, 16, stages=3, warps=8),
        TileConfig(64, 64, 16, stages=3, warps=8),
    ),
    ("fp32", False): (TileConfig(64, 32, 16, stages=3, warps=8),),
    ("fp64", True): (
        TileConfig(64, 32, 16, stages=3, warps=8),
        TileConfig(32, 32, 16, stages=3, warps=4),
    ),
    ("fp64", False): (TileConfig(32, 32, 16, stages=3, warps=8),),
}


@dataclass(frozen=True)
class GroupedProduct:
    """A (m, k) and B of `groups` matrices (k, n), the rows of A cut; or A (m, k), B (k, n), both cut by steps of k.

    m, n, k: whole sizes. a, b: layouts as of `Problem`. aligned: 16-byte loads are legal, which they are along no
    dimension that is cut, nor is TMA used there. tma: it can read a and b, and the columns of the result are adjacent.
    """

    m: int
    n: int
    k: int
    groups: int
    by_steps: bool
    dtype: str
    a: str = "N"
    b: str = "N"
    precision: str = "ieee"
    aligned: bool = True
    tma: bool = False

    @property
    def problem(self) -> Problem:
        """The batch of products that it is where all groups have one size, which is not known: a tile's problem."""
        m, k = (self.m, cdiv(self.k, self.groups)) if self.by_steps else (cdiv(self.m, self.groups), self.k)
        layouts = self.a, self.b, self.precision, self.aligned, self.tma
        return Problem(max(m, 1), self.n, max(k, 1), self.dtype, *layouts, batch=self.groups, invariant=True)


def most_tiles(product: GroupedProduct, config: TileConfig) -> int:
    """At least as many tiles as there are, whatever the groups: each may begin one, and so may what is behind them."""
    rows = cdiv(product.m, config.block_m)
    rows = product.groups * rows if product.by_steps else rows + product.groups
    return rows * cdiv(product.n, config.block_n)


def fits(product: GroupedProduct) -> bool:
    """Whether the kernel counts it: sizes and groups, and in the smallest tile that there is.

    Rows of tiles also where wrong ends give each group all rows.
    """
    smallest = TileConfig(32, 32, 16, 1, 4)
    sizes = max(product.m, product.n, product.k) <= MAX_SIZE and product.groups <= MAX_GROUPS
    rows = (product.groups + 1) * cdiv(product.m, smallest.block_m)
    return sizes and max(rows, most_tiles(product, smallest)) <= MAX_SIZE


def choose_grouped(product: GroupedProduct, target: Target) -> TileConfig:
    """The tile that the model predicts to be fastest for groups of one size, of equals the largest.

    Pure: nothing is timed, and the sizes of the groups are not asked for. k is whole and BLOCK_K depends on dtype and
    precision alone, so the bits of a group do not depend on the tile. Raises ValueError where no tile is valid.
    """
    return fastest_predicted(representative(product.problem), target)


@lru_cache(maxsize=4096)
def fastest_predicted(problem: Problem, target: Target) -> TileConfig:
    tiles = [*(TMA_TILES if problem.tma else ()), *GROUP_TILES.get((kind(problem), problem.aligned), ())]
    valid = [tile for tile in tiles if is_valid(tile, problem, target)]
    if not valid:
        raise ValueError(f"no tile for {problem} on {target}")
    return min(valid, key=lambda tile: predicted_seconds(tile, problem, target))


def programs(product: GroupedProduct, config: TileConfig, target: Target) -> int:
    """As many as the multiprocessors hold at once, whatever the groups; no more than there can be tiles."""
    return min(most_tiles(product, config), target.sms * fitting_blocks(config, product.problem, target))


def grouped_plan(
    product: GroupedProduct,
    config: TileConfig,
    target: Target,
    strides: tuple[Strides, Strides, Strides],
    *,
    upcast: bool = False,
) -> Plan:
    """The plan of a grouped product on the tensors "a", "b", "c" and "offs", int32. strides: of a, b, c."""
    form = "steps" if product.by_steps else "rows"
    constants = {
        **blocks(config),
        "BY_STEPS": product.by_steps,
        "NUMBERS": 1 << product.groups.bit_length(),
        "UPCAST": upcast,
        "NAME": kernel_name(product.problem, config).replace("gemm", f"grouped_{form}", 1),
    }
    offs_and_sizes = PointerArg("offs"), product.groups, product.m, product.n, product.k
    tma = config.path == "tma"
    arguments, more = (_by_tma if tma else _by_pointers)(product, config, strides, offs_and_sizes)
    kernel = gemm_groups_tma if tma else gemm_groups
    return Plan(kernel, programs(product, config, target), arguments, constants | more, options(config))


Parts = tuple[tuple[Any, ...], dict[str, Any]]


def _by_pointers(
    product: GroupedProduct, config: TileConfig, strides: tuple[Strides, Strides, Strides], sizes: tuple[Any, ...]
) -> Parts:
    a, b, c = strides
    bm, bn, bk = config.block_m, config.block_n, config.block_k
    extents = [(bm, a.row), (bk, a.col)], [(bk, b.row), (bn, b.col)], [(bm, c.row), (product.n + bn, c.col)]
    pointers = Operands(PointerArg("a"), PointerArg("b"), PointerArg("c"))
    return (pointers, *sizes, Operands(*strides)), {
        "PRECISION": product.precision,
        "WIDE": any(map(is_wide, extents)),
    }


def _by_tma(
    product: GroupedProduct, config: TileConfig, strides: tuple[Strides, Strides, Strides], sizes: tuple[Any, ...]
) -> Parts:
    a, b, c = strides
    m, n, k, batch = product.m, product.n, product.k, 1 if product.by_steps else product.groups
    bm, bn, bk = config.block_m, config.block_n, config.block_k
    a_arg, b_arg = descriptor_arg("a", (m, k, 1), a, (bm, bk)), descriptor_arg("b", (k, n, batch), b, (bk, bn))
    return (a_arg, b_arg, matrix_arg("c", c), *sizes), {
        "A_TRANSPOSED": a.col != 1,
        "B_TRANSPOSED": b.col != 1,
        "BATCHED": batch > 1,
    }
