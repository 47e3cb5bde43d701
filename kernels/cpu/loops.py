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

from typing import NamedTuple

from .config import ALIASED, PAD
from .config_words import (
    A_LANES,
    ALIASED_ROWS,
    B_OFFSET,
    CONVERTS,
    DIRECT_PANELS,
    DIRECT_ROWS,
    KC,
    LANE_BYTES,
    LANES,
    MC,
    MICROKERNEL,
    MR,
    NC,
    NR,
    PACK_PATCH_ROWS,
    PACK_PATCH_STEPS,
    PACK_ROWS,
    PACK_STEPS,
    PAIRS,
    PANEL_CHAIN,
    ROW_SIZES,
    SEQUENTIAL_BYTES,
    SIZE,
    TRANSPOSED,
    TRANSPOSED_ROWS,
    VECTOR_SIZES,
)
from .gemm_args import A_CS, A_PATCHES, A_RS, ACCUMULATE, B_CS, B_PATCHES, B_RS, C_RS, A, B, C, K, M, N
from .memory import call_kernel, ceil_div, floor_div, get, jit
from .microkernel import ARGUMENTS, WIDE
from .pack import PACK_ROWS_ARGUMENTS, PACK_STEPS_ARGUMENTS
from .patches import PATCH_ROWS_ARGUMENTS, PATCH_STEPS_ARGUMENTS
from .row import has_few_steps, multiply_rows, rows_are_in_order
from .schedule import BY_COLUMNS, BY_ROWS, CHAIN, PACKED, lanes_along_k, plan_k, round_lanes
from .transposed import TRANSPOSED_ARGUMENTS

call_microkernel, call_transposed = call_kernel(ARGUMENTS), call_kernel(TRANSPOSED_ARGUMENTS)
call_pack_steps, call_pack_rows = call_kernel(PACK_STEPS_ARGUMENTS), call_kernel(PACK_ROWS_ARGUMENTS)
call_patch_steps, call_patch_rows = call_kernel(PATCH_STEPS_ARGUMENTS), call_kernel(PATCH_ROWS_ARGUMENTS)


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


def multiply(config, args, work):
    """C = A·B on this thread, or C += A·B where ACCUMULATE is set, for at most a chunk of k; C holds lanes."""
    n, nr = get(args, N), get(config, NR)
    sequential = n * get(config, SIZE) >= get(config, SEQUENTIAL_BYTES) or get(config, CONVERTS) != 0
    if has_few_steps(config, args) or (get(args, M) == 1 and sequential and rows_are_in_order(args)):
        multiply_rows(config, args, work)
        return
    b_access, first, columns = choose_b_access(config, args), 0, n
    if b_access != PACKED:
        columns = floor_div(n, nr) * nr
        if columns == 0:
            b_access, columns = PACKED, n
    while columns > 0:  # whole panels, and then the last one, which is always packed
        loops_5_to_3(config, args, work, first, columns, b_access)
        first += columns
        columns, b_access = n - first, PACKED


@jit
def choose_b_access(config, args):
    """How whole panels of B are read."""
    m, b_rs, b_cs = get(args, M), get(args, B_RS), get(args, B_CS)
    if b_cs == 1 and get(config, CONVERTS) == 0:
        aliased = b_rs * get(config, SIZE) % ALIASED == 0
        if m <= (get(config, ALIASED_ROWS) if aliased else get(config, DIRECT_ROWS)):
            return BY_ROWS
    if b_rs == 1 and m <= get(config, TRANSPOSED_ROWS):
        return BY_COLUMNS
    return PACKED


@jit
def loops_5_to_3(config, args, work, first_column, columns, b_access):
    m, k, mc_max, nc_max = get(args, M), get(args, K), get(config, MC), get(config, NC)
    whole_k = b_access == BY_COLUMNS or (b_access == BY_ROWS and m <= get(config, MR))
    if whole_k and (get(config, CONVERTS) != 0 or get(args, A_PATCHES) != 0):  # A must be packed for all of k
        by_rows, by_columns = m * (k + get(config, LANES) + PAD), k * (round_lanes(config, m) + PAD)
        whole_k = max(by_rows, by_columns) <= get(config, A_LANES)
    step = k if whole_k else plan_k(k, get(config, KC), get(config, PANEL_CHAIN))
    for panel in range(ceil_div(columns, nc_max)):  # a range whose step is not a constant may raise
        jc = panel * nc_max
        for block in range(ceil_div(k, step)):
            pc, j, nc = block * step, first_column + jc, min(nc_max, columns - jc)
            for rows in range(ceil_div(m, mc_max)):
                start = Position(j, pc, min(step, k - pc), rows * mc_max)
                loops_2_to_1(config, args, work, b_access, whole_k, nc, start)


@jit
def locate_a(config, args, whole_k, panels, start, work):
    """``ARows``, and whether they have yet to be packed.

    A is only broadcast from. With adjacent steps of k it is read in place; otherwise it is packed along its contiguous
    dimension: columns and patches here, rows with the first panel of B.
    """
    a_rs, a_cs, ic, pc, kc = get(args, A_RS), get(args, A_CS), start.ic, start.pc, start.kc
    pairs = get(config, PAIRS)
    source = get(args, A) + (ic * a_rs + pc * a_cs) * get(config, SIZE)
    address, row_stride, k_stride, missing = work, round_lanes(config, (kc + pairs) >> pairs) + PAD, 1, True
    in_place = a_cs == 1 or whole_k or panels <= get(config, DIRECT_PANELS)
    if get(args, A_PATCHES) != 0:
        rows, missing = min(get(config, MC), get(args, M) - ic), False
        call_patch_rows(get(config, PACK_PATCH_ROWS), work, rows, row_stride, source, kc, get(args, A_PATCHES))
    elif in_place and lanes_along_k(config, get(args, K), a_rs, a_cs):
        address, row_stride, k_stride, missing = source, a_rs >> pairs, a_cs, False
    elif a_rs == 1 and a_cs != 1:
        rows, missing = min(get(config, MC), get(args, M) - ic), False
        lines, line_stride, width, width_stride, exist = rows, a_rs, row_stride - PAD, a_cs, kc
        if pairs != 0:
            lines, line_stride, width, width_stride, exist = kc, a_cs, round_lanes(config, rows), a_rs, rows
            row_stride, k_stride = 1, width + PAD
        stride = width + PAD
        call_pack_steps(get(config, PACK_STEPS), work, width, stride, source, lines, line_stride, width_stride, exist)
    return ARows(address, row_stride, k_stride), missing


@jit
def loops_2_to_1(config, args, work, b_access, whole_k, nc, start):
    """A block of A times a panel of nc columns of B."""
    first_column, pc, kc, ic = start
    m, b_rs, b_cs, mr, nr = get(args, M), get(args, B_RS), get(args, B_CS), get(config, MR), get(config, NR)
    size, depth = get(config, SIZE), (kc + get(config, PAIRS)) >> get(config, PAIRS)
    row_bytes = depth * get(config, LANE_BYTES) if m > get(config, MC) else 0
    a, missing = locate_a(config, args, whole_k, ceil_div(nc, nr), start, work)
    are_vectors = b_cs == 1 and get(config, CONVERTS) == 0
    b_work, j = work + get(config, B_OFFSET), 0
    while j < nc:
        columns = min(nr, nc - j)
        source = get(args, B) + (pc * b_rs + (first_column + j) * b_cs) * size
        target = b_work + j * row_bytes
        b, b_ks, b_copy = source, b_cs if b_access == BY_COLUMNS else b_rs, 0
        if b_access != PACKED:
            columns = WIDE * nr if m == 1 and nc - j >= WIDE * nr else nr
        elif ic == 0 and columns == nr and m >= mr and (b_rs == 1 or are_vectors):
            b_copy = target
            if not are_vectors:
                b_ks = b_cs
        else:
            b, b_ks = target, nr
            patches = get(args, B_PATCHES)
            if ic == 0 and patches != 0:
                call_patch_steps(get(config, PACK_PATCH_STEPS), target, nr, source, kc, columns, patches)
            elif ic == 0:
                call_pack_steps(get(config, PACK_STEPS), target, nr, nr, source, kc, b_rs, b_cs, columns)
        at = Position(first_column + j, pc, kc, ic)
        one_panel(config, args, b_access, at, columns, a, missing and j == 0, BPanel(b, b_ks, b_copy))
        j += columns


@jit
def one_panel(config, args, b_access, start, columns, a_rows, missing, b_panel):
    """A block of A times one panel of B.

    Where rows of A are ``missing`` they are packed, those of a tile just before it. Where ``b_panel.copy`` is an
    address, the first tile packs the panel there, transposed if necessary, and the others read the copy.
    """
    j, pc, kc, ic = start
    a, a_rs, a_ks = a_rows
    b, b_ks, b_copy = b_panel
    mr, nr, lane_bytes, chain = get(config, MR), get(config, NR), get(config, LANE_BYTES), get(args, CHAIN)
    c_rs, a_row, a_step, row_sizes = get(args, C_RS), get(args, A_RS), get(args, A_CS), get(config, ROW_SIZES)
    rows, depth = min(get(config, MC), get(args, M) - ic), (kc + get(config, PAIRS)) >> get(config, PAIRS)
    transposes_b = get(args, B_CS) != 1 or get(config, CONVERTS) != 0
    first = 1 if pc == 0 and get(args, ACCUMULATE) == 0 else 0
    vector_sizes, i = get(config, VECTOR_SIZES), 0
    vector_tile = smallest_width(config, columns)
    c = get(args, C) + (ic * c_rs + j) * lane_bytes
    while i < rows:
        row_tile, height, count = 0, mr, 1
        if rows - i < mr:  # the largest of the powers of two, which end the sizes, that fits
            row_tile, height = row_sizes - 1, 1
            while 2 * height <= rows - i:
                row_tile, height = row_tile - 1, 2 * height
        a_tile, c_tile = a + i * a_rs * lane_bytes, c + i * c_rs * lane_bytes
        if missing:
            source = get(args, A) + ((ic + i) * a_row + pc * a_step) * get(config, SIZE)
            call_pack_rows(get(config, PACK_ROWS), a_tile, height, a_rs, source, kc, a_step, a_row)
        if b_access == BY_COLUMNS or (transposes_b and b_copy != 0):
            tile = row_sizes if b_copy != 0 else row_tile
            call_transposed(
                get(config, TRANSPOSED), tile, columns, kc, a_tile, a_rs, a_ks, b, b_ks, c_tile, c_rs, first, chain,
                b_copy,
            )  # fmt: skip
        else:
            tile = row_tile * vector_sizes + vector_tile
            if columns > nr:
                tile = row_sizes * vector_sizes + 1  # the wide row, see microkernel.tiles
            elif b_copy != 0:
                tile = row_sizes * vector_sizes
            elif not missing and row_tile == 0 and mr > 1:
                count = floor_div(rows - i, mr)
            call_microkernel(
                get(config, MICROKERNEL), tile, count, depth, a_tile, a_rs, a_ks, b, b_ks, c_tile, c_rs, columns, first,
                chain, b_copy,
            )  # fmt: skip
        if b_copy != 0:
            b, b_ks, b_copy = b_copy, nr, 0
        i += count * height


@jit
def smallest_width(config, columns):
    """Number of the smallest tile, by vectors, that holds so many columns: the sizes end with the powers of two."""
    tile, width = get(config, VECTOR_SIZES) - 1, get(config, LANES)
    while width < columns and tile > 0:
        tile, width = tile - 1, 2 * width
    return tile
