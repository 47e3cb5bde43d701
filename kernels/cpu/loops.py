"""The five loops around the microkernel, which one thread runs for a block; they pack as they go.

    for jc in n by NC            a panel of B for this core's part of L3
      for pc in k by KC
        for ic in m by MC          a block of A for L2
          for jr in nc by NR         one column panel
            for ir in mc by MR         one register tile

Operands are packed as late as possible, so that they are still in a near cache when they are read: a panel of B with
the first block of A that it is multiplied by, rows of A with the first panel of B.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from numba.core import types

from .config import ALIASED, PAD, BlockConfig, tile_sizes
from .config_words import A_LANES, B_OFFSET, KC, MC, NC
from .gemm_args import A_CS, A_RS, B_CS, B_RS, C_RS, A, B, C, K, M, N
from .memory import compiled_config, get, jit
from .microkernel import ARGUMENTS, TRANSPOSED_ARGUMENTS, WIDE, tiles
from .operand import operand_of
from .pack import PACK_ROWS_SIGNATURE, PACK_STEPS_SIGNATURE, make_lanes_along_k
from .row import make_multiply_row
from .schedule import BY_COLUMNS, BY_ROWS, CHAIN, PACKED, ceil_div, largest, plan_k, smallest


class Position(NamedTuple):
    """Where a panel of B and a block of A begin, and how many steps of k they have."""

    j: int
    pc: int
    kc: int
    ic: int


class ARows(NamedTuple):
    """A block of A as the microkernel reads it; strides count lanes."""

    address: int
    row_stride: int
    k_stride: int


class BPanel(NamedTuple):
    """A column panel of B as the microkernel reads it; the address where its first tile packs it, or 0."""

    address: int
    k_stride: int
    copy: int


def make_multiply(config: BlockConfig) -> Callable:
    """``multiply(args, work)``: C = A·B on this thread, for at most a chunk of k; C holds lanes."""
    mr, nr, chain = config.mr, config.nr, config.chain
    lanes, is_vectors = config.lanes, not operand_of(config).converts
    choose_b_access, loops_2_to_1 = make_choose_b_access(config), make_loops_2_to_1(config)
    multiply_row, size, sequential_bytes = make_multiply_row(config), operand_of(config).size, config.sequential_bytes

    @jit
    def loops_5_to_3(args, work, first_column, columns, b_access):
        m, k = get(args, M), get(args, K)
        mc_max, kc_max, nc_max = get(compiled_config(), MC), get(compiled_config(), KC), get(compiled_config(), NC)
        whole_k = b_access == BY_COLUMNS or (b_access == BY_ROWS and m <= mr)
        if not is_vectors:  # A must be packed for all of k, in either order
            by_rows, by_columns = m * (k + lanes + PAD), k * (ceil_div(m, lanes) * lanes + PAD)
            whole_k = whole_k and max(by_rows, by_columns) <= get(compiled_config(), A_LANES)
        step = k if whole_k else plan_k(k, kc_max, chain)
        for panel in range(ceil_div(columns, nc_max)):  # a range whose step is not a constant may raise
            jc = panel * nc_max
            for block in range(ceil_div(k, step)):
                pc, j, nc = block * step, first_column + jc, min(nc_max, columns - jc)
                for rows in range(ceil_div(m, mc_max)):
                    start = Position(j, pc, min(step, k - pc), rows * mc_max)
                    loops_2_to_1(args, work, b_access, whole_k, nc, start)

    def multiply(args, work):
        n = get(args, N)
        if get(args, M) == 1 and get(args, B_CS) == 1 and (n * size >= sequential_bytes or not is_vectors):
            multiply_row(args, work)
            return
        whole = n // nr * nr
        b_access = choose_b_access(args)
        if b_access == PACKED:
            loops_5_to_3(args, work, 0, n, PACKED)
        else:
            if whole > 0:
                loops_5_to_3(args, work, 0, whole, b_access)
            if whole < n:
                loops_5_to_3(args, work, whole, n - whole, PACKED)

    return multiply


def make_choose_b_access(config: BlockConfig) -> Callable:
    """``choose_b_access(args)``: how whole panels of B are read."""
    is_vectors, size = not operand_of(config).converts, operand_of(config).size
    direct_rows, aliased_rows = config.direct_rows * config.mr, config.aliased_rows * config.mr
    transposed_rows = config.transposed_rows

    @jit
    def choose_b_access(args):
        m, b_rs, b_cs = get(args, M), get(args, B_RS), get(args, B_CS)
        if b_cs == 1 and is_vectors and m <= (direct_rows if b_rs * size % ALIASED != 0 else aliased_rows):
            return BY_ROWS
        if b_rs == 1 and m <= transposed_rows:
            return BY_COLUMNS
        return PACKED

    return choose_b_access


def make_locate_a(config: BlockConfig) -> Callable:
    """``locate_a(args, whole_k, panels, start, work)`` → ``ARows``, and whether they have yet to be packed.

    A is only broadcast from. With adjacent steps of k it is read in place; otherwise it is packed along its contiguous
    dimension: columns here, rows with the first panel of B.
    """
    operand, lanes = operand_of(config), config.lanes
    size, k_per_lane, direct_panels = operand.size, operand.k_per_lane, config.direct_panels
    lanes_along_k = make_lanes_along_k(operand)
    pack_steps = types.ExternalFunction(f"{config.name}_pack_steps", PACK_STEPS_SIGNATURE)

    @jit
    def locate_a(args, whole_k, panels, start, work):
        a_rs, a_cs, ic, pc, kc = get(args, A_RS), get(args, A_CS), start.ic, start.pc, start.kc
        source = get(args, A) + (ic * a_rs + pc * a_cs) * size
        if (a_cs == 1 or whole_k or panels <= direct_panels) and lanes_along_k(get(args, K), a_rs, a_cs):
            return ARows(source, a_rs // k_per_lane, a_cs), False
        if a_rs == 1 and a_cs != 1:
            rows = min(get(compiled_config(), MC), get(args, M) - ic)
            if k_per_lane == 1:
                deep = ceil_div(kc, lanes) * lanes
                pack_steps(work, deep, deep + PAD, source, rows, a_rs, a_cs, kc)
                return ARows(work, deep + PAD, 1), False
            wide = ceil_div(rows, lanes) * lanes
            pack_steps(work, wide, wide + PAD, source, kc, a_cs, a_rs, rows)
            return ARows(work, 1, wide + PAD), False
        return ARows(work, ceil_div(kc, k_per_lane * lanes) * lanes + PAD, 1), True

    return locate_a


def make_loops_2_to_1(config: BlockConfig) -> Callable:
    """``loops_2_to_1(args, work, b_access, whole_k, nc, start)``: a block of A times a panel of nc columns of B."""
    operand, mr, nr = operand_of(config), config.mr, config.nr
    size, lane_bytes, k_per_lane, is_vectors = operand.size, config.lane_bytes, operand.k_per_lane, not operand.converts
    locate_a, one_panel = make_locate_a(config), make_one_panel(config)
    pack_steps = types.ExternalFunction(f"{config.name}_pack_steps", PACK_STEPS_SIGNATURE)

    @jit
    def loops_2_to_1(args, work, b_access, whole_k, nc, start):
        first_column, pc, kc, ic = start
        m, depth, b_rs, b_cs = get(args, M), ceil_div(kc, k_per_lane), get(args, B_RS), get(args, B_CS)
        a, missing = locate_a(args, whole_k, ceil_div(nc, nr), start, work)
        b_work, mc_max, j = work + get(compiled_config(), B_OFFSET), get(compiled_config(), MC), 0
        while j < nc:
            columns = min(nr, nc - j)
            source = get(args, B) + (pc * b_rs + (first_column + j) * b_cs) * size
            target = b_work + (j * depth * lane_bytes if m > mc_max else 0)
            b, b_ks, b_copy = source, b_cs if b_access == BY_COLUMNS else b_rs, 0
            if b_access != PACKED:
                columns = WIDE * nr if m == 1 and nc - j >= WIDE * nr else nr
            elif ic == 0 and columns == nr and m >= mr and (b_rs == 1 or (b_cs == 1 and is_vectors)):
                b_copy = target
                if not (b_cs == 1 and is_vectors):
                    b_ks = b_cs
            else:
                b, b_ks = target, nr
                if ic == 0:
                    pack_steps(target, nr, nr, source, kc, b_rs, b_cs, columns)
            at = Position(first_column + j, pc, kc, ic)
            one_panel(args, b_access, at, columns, a, missing and j == 0, BPanel(b, b_ks, b_copy))
            j += columns

    return loops_2_to_1


def make_one_panel(config: BlockConfig) -> Callable:
    """``one_panel(args, b_access, start, columns, a_rows, missing, b_panel)``: a block of A times one panel of B.

    Where rows of A are ``missing`` they are packed, those of a tile just before it. Where ``b_panel.copy`` is an
    address, the first tile packs the panel there, transposed if necessary, and the others read the copy.
    """
    operand, nr, lanes, lane_bytes = operand_of(config), config.nr, config.lanes, config.lane_bytes
    size, k_per_lane, row_steps, vector_steps = (
        operand.size,
        operand.k_per_lane,
        tile_sizes(config.mr),
        tile_sizes(config.vectors),
    )
    is_vectors = not operand.converts
    copying, widest = (len(tiles(row_steps, vector_steps)) - last for last in (2, 1))
    pack_rows = types.ExternalFunction(f"{config.name}_pack_rows", PACK_ROWS_SIGNATURE)
    microkernel = types.ExternalFunction(f"{config.name}_microkernel", types.void(*[types.int64] * ARGUMENTS))
    transposed = types.ExternalFunction(f"{config.name}_transposed", types.void(*[types.int64] * TRANSPOSED_ARGUMENTS))

    @jit
    def one_panel(args, b_access, start, columns, a_rows, missing, b_panel):
        j, pc, kc, ic = start
        a, a_rs, a_ks = a_rows
        b, b_ks, b_copy = b_panel
        chain, c_rs, a_row, a_step = get(args, CHAIN), get(args, C_RS), get(args, A_RS), get(args, A_CS)
        vector_step, rows, depth = (
            smallest(vector_steps, ceil_div(columns, lanes)),
            min(get(compiled_config(), MC), get(args, M) - ic),
            ceil_div(kc, k_per_lane),
        )
        transposes_b, i = not (get(args, B_CS) == 1 and is_vectors), 0
        while i < rows:
            step = largest(row_steps, rows - i)
            a_tile, c_tile = a + i * a_rs * lane_bytes, get(args, C) + ((ic + i) * c_rs + j) * lane_bytes
            if missing:
                source = get(args, A) + ((ic + i) * a_row + pc * a_step) * size
                pack_rows(a_tile, row_steps[step], a_rs, source, kc, a_step, a_row)
            if b_access == BY_COLUMNS or (transposes_b and b_copy != 0):
                tile = len(row_steps) if b_copy != 0 else step
                transposed(tile, columns, kc, a_tile, a_rs, a_ks, b, b_ks, c_tile, c_rs, pc == 0, chain, b_copy)
            else:
                tile = step * len(vector_steps) + vector_step
                if columns > nr:
                    tile = widest
                elif b_copy != 0:
                    tile = copying
                microkernel(tile, depth, a_tile, a_rs, a_ks, b, b_ks, c_tile, c_rs, columns, pc == 0, chain, b_copy)
            if b_copy != 0:
                b, b_ks, b_copy = b_copy, nr, 0
            i += row_steps[step]

    return one_panel
