"""From a gated product to its plan: tile, number of programs, arguments. Pure, without torch."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

from .arguments import Matrix, PointerArg, Strides
from .choose import LAUNCH, TILES, TMA_TILES, choose, choose_padded, predicted_seconds, rates, representative
from .config import ITEM_BYTES, Problem, Target, TileConfig, is_valid, kernel_name, kind, work_items
from .gates import gemm_gated
from .gates_tma import gemm_gated_tma
from .plan import Plan, blocks, descriptor_arg, is_wide, matrix_arg, options, programs

MIN_BLOCK_N = 16
# The columns of both products together. Beside `choose.TILES`, some of which spill with two tiles of sums; these do not
# for sm_80, sm_90, sm_100 and sm_120. None has been timed yet.
GATED_TILES = TILES | {
    ("half", True): (
        TileConfig(128, 256, 64, stages=3, warps=8),
        TileConfig(128, 128, 64, stages=4, warps=8),
        TileConfig(128, 128, 64, stages=3, warps=8),
        TileConfig(64, 128, 64, stages=4, warps=8),
        TileConfig(64, 64, 64, stages=4, warps=4),
    ),
    ("tf32", True): (
        TileConfig(128, 128, 32, stages=3, warps=8),
        TileConfig(64, 128, 32, stages=3, warps=8),
        TileConfig(64, 64, 32, stages=3, warps=4),
    ),
    ("half", False): (TileConfig(64, 64, 64, stages=3, warps=8),),
    ("fp32", True): (
        TileConfig(64, 128, 16, stages=3, warps=8),
        TileConfig(64, 64, 16, stages=3, warps=4),
    ),
}


def paired(problem: Problem) -> Problem:
    """Both products as one, of the columns of both: what it costs, and what its tiles take."""
    return replace(problem, n=2 * problem.n)


def doubled(tile: TileConfig) -> TileConfig:
    """The tile of `paired` that takes what a tile of both products takes."""
    return replace(tile, block_n=2 * tile.block_n)


def is_valid_gated(tile: TileConfig, problem: Problem, target: Target) -> bool:
    """Whether a tile of C may be launched; block_n is that of each product. k is not split."""
    whole = tile.split_k == 1 and tile.block_n >= MIN_BLOCK_N and tile.path in ("pointers", "tma")
    return whole and is_valid(doubled(tile), paired(problem), target)


def candidates(problem: Problem, target: Target) -> list[TileConfig]:
    """The tiles of GATED_TILES and of TMA, with half of their columns for each of both."""
    tiles = [*(TMA_TILES if problem.tma else ()), *GATED_TILES.get((kind(problem), problem.aligned), ())]
    halved = [replace(tile, block_n=tile.block_n // 2) for tile in tiles]
    return [tile for tile in halved if is_valid_gated(tile, problem, target)]


def choose_gated(problem: Problem, target: Target, unread: tuple[bool, bool]) -> TileConfig | None:
    """The fastest tile for a gated product, as predicted; None where two products and a pass are faster.

    problem: of one of the products, tma where it can read all operands. unread: whether it cannot read A, and the
    others. Pure: nothing is timed. BLOCK_K depends on dtype and precision alone, so the bits do not depend on the tile.
    """
    if choose_padded(problem, target, unread) is not None:
        return None
    return fastest_predicted(representative(problem), target)


@lru_cache(maxsize=4096)
def fastest_predicted(problem: Problem, target: Target) -> TileConfig | None:
    tiles = candidates(problem, target)
    if not tiles:
        return None
    best = min(tiles, key=lambda tile: seconds(tile, problem, target))
    if problem.invariant:  # which way is faster depends on m
        return best
    apart = 2 * predicted_seconds(choose(problem, target), problem, target) + LAUNCH
    read_and_written = 3 * problem.m * problem.n * ITEM_BYTES[problem.dtype]
    apart += LAUNCH + read_and_written / rates(target).memory
    return best if seconds(best, problem, target) <= apart else None


def seconds(tile: TileConfig, problem: Problem, target: Target) -> float:
    return predicted_seconds(doubled(tile), paired(problem), target)


def gated_plan(
    problem: Problem,
    tile: TileConfig,
    target: Target,
    strides: dict[str, Strides],
    activation: str,
    *,
    keep: bool,
    upcast: bool = False,
) -> Plan:
    """The plan on the tensors "a", "b", "gate", "c", with `keep` "pre" and "value", "source", "gate_source".

    strides: of each by its name; of what is added expanded to C, and left out where nothing is.
    """
    m, n, k = problem.m, problem.n, problem.k
    c, added = strides["c"], [_added(name, strides) for name in ("source", "gate_source")]
    kept = (PointerArg("pre"), PointerArg("value")) if keep else (None, None)
    name = kernel_name(problem, tile).replace("gemm", "gated", 1)
    constants = {**blocks(tile), "UPCAST": upcast, "ACTIVATION": activation, "NAME": f"{name}_{activation}"}
    rest = (matrix_arg("c", c), *kept, *added, m, n, k)
    bm, bn, bk = tile.block_m, tile.block_n, tile.block_k
    items = work_items(problem, tile)
    if tile.path == "tma":
        shapes = {"a": (m, k, 1), "b": (k, n, 1), "gate": (k, n, 1)}
        loaded = {"a": (bm, bk), "b": (bk, bn), "gate": (bk, bn)}
        described = [descriptor_arg(x, shapes[x], strides[x], loaded[x]) for x in shapes]
        constants["TRANSPOSED"] = tuple(strides[x].col != 1 for x in shapes)
        count = programs(items, paired(problem), doubled(tile), target)
        return Plan(gemm_gated_tma, count, (*described, *rest), constants, options(tile))
    a, b, gate = (strides[x] for x in ("a", "b", "gate"))
    extents = [(bm, a.row), (bk, a.col)], *([(bk, x.row), (bn, x.col)] for x in (b, gate)), [(bm, c.row), (bn, c.col)]
    constants |= {"PRECISION": problem.precision, "WIDE": any(map(is_wide, extents))}
    operands = [matrix_arg(x, strides[x]) for x in ("a", "b", "gate")]
    return Plan(gemm_gated, items, (*operands, *rest), constants, options(tile))


def _added(name: str, strides: dict[str, Strides]) -> Matrix:
    """What is added, where anything is; one row or column for all has no stride along the other dimension."""
    if name not in strides:
        return Matrix()
    matrix = matrix_arg(name, strides[name])
    return matrix._replace(row=matrix.row or None, col=matrix.col or None)
