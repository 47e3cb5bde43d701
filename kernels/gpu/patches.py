"""The Triton GEMM over patches of images: every convolution and its gradients, without patches in memory."""

import triton
import triton.language as tl

from .arguments import Axis, Matrix, Spatial
from .epilogue import SCALARS, tile_epilogue
from .tiles import multiply_add, split_k_range, tile_coords


@triton.jit
def axis_of_phase(axis, phase, remainder):
    """The dimension of the pixels whose coordinate is `remainder` modulo the stride, and of the taps that reach them.

    Tap t reaches pixel x from x + padding - t * dilation, where that is a multiple of the stride: from every
    `phase.every`-th tap on, or from none.
    """
    shift = remainder + phase.padding
    first = shift // phase.divisor * phase.inverse % phase.every
    reached = (phase.taps - first + phase.every - 1) // phase.every
    return Axis(
        (phase.size - remainder + phase.stride - 1) // phase.stride,
        tl.where(shift % phase.divisor == 0, reached, 0),
        axis.row_step,
        axis.k_step,
        (shift - first * phase.dilation) // phase.stride,
        axis.size,
        axis.a,
        axis.b * phase.every,
        axis.c * phase.stride,
        axis.b * first,
        axis.c * remainder,
    )


@triton.jit
def axes_of_phase(axes, phases, index):
    """`axis_of_phase` of each dimension; the phases of the last one follow each other."""
    x = axis_of_phase(axes.x, phases.x, index % phases.x.stride)
    index = index // phases.x.stride
    y = axis_of_phase(axes.y, phases.y, index % phases.y.stride)
    z = axis_of_phase(axes.z, phases.z, index // phases.y.stride)
    return Spatial(x, y, z)


@triton.jit(repr=lambda specialization: specialization.constants["NAME"], do_not_specialize=SCALARS)
def gemm_patches(
    ptrs, m, n, k, outer, axes, phases, groups, source, alpha_low, alpha_high, beta_low, beta_high,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    SPLIT_K: tl.constexpr, TAPS: tl.constexpr, DIMS: tl.constexpr, ORDER: tl.constexpr, PRECISION: tl.constexpr,
    WIDE: tl.constexpr, UPCAST: tl.constexpr, NAME: tl.constexpr,
):  # fmt: skip
    """C[i, j] = sum over p < k of A(i, p) * B(p, j), one BLOCK_M x BLOCK_N tile of C a program; A is found by digits.

    Row i is the digits (outer, z, y, x), step p too: i = ((i_o * Iz + iz) * Iy + iy) * Ix + ix. They meet A at the
    coordinates of `Axis`, sample or channel i_o and p_o; outside of the image A is 0 and not read.
    Shapes: m, n >= 1; k is the product of all digits of p, and may be 0. axes: `Spatial` of DIMS `Axis`. outer:
    `Outer`. groups: `Groups`. phases: `Spatial` of `Phase` for the input gradient of a strided convolution, else None;
    m is then the largest of a phase. TAPS: the digits of p, x first, where they are constants, else None.
    ORDER: "digits" for the above. "tap" where BLOCK_K divides outer.steps: p is (block of channels, tap, channel of the
    block), so that a step of the loop has one tap. "pixel" for a weight gradient: row i is (z, y, x, outer), so that
    neighbours are channels; no sum changes by it.
    Grid: ceil(m / BLOCK_M) * ceil(n / BLOCK_N) * SPLIT_K * groups * phases, one dimension.
    Strides: any, in elements. Indices are 32-bit unless WIDE, which the plan sets where a tensor spans nearly 2**31.
    Dtypes, PRECISION, epilogue, aliasing, rounding, UPCAST: as `gemm`; the source is one row a group.
    Result: C; with SPLIT_K > 1 the workspace, partial results of each group groups.part apart, for `reduce`.
    Edges: masks. Nothing outside of the image is read, nor outside of B, and nothing outside of C is written.
    Determinism: p runs upward in steps of BLOCK_K inside a split of k; no atomics, no scatter.
    """
    BLOCKED: tl.constexpr = ORDER == "tap"
    OUTER_FIRST: tl.constexpr = ORDER == "pixel"
    INDEX: tl.constexpr = tl.int64 if WIDE else tl.int32
    tiles_m = 1 + (m - 1) // BLOCK_M
    tiles_n = 1 + (n - 1) // BLOCK_N
    part = tl.program_id(0) // (tiles_m * tiles_n)
    row_tile, col_tile = tile_coords(tl.program_id(0) % (tiles_m * tiles_n), tiles_m, tiles_n, GROUP_M)
    split = part % SPLIT_K
    group = (part // SPLIT_K % groups.number).to(tl.int64)
    if phases is not None:
        axes = axes_of_phase(axes, phases, (part // SPLIT_K // groups.number).to(INDEX))
        m = tl.cast(outer.rows, INDEX)
        k = tl.cast(outer.steps, INDEX)
        for d in tl.static_range(DIMS):
            m = m * axes[d].rows
            k = k * axes[d].steps

    row0 = row_tile.to(INDEX) * BLOCK_M
    col0 = col_tile.to(INDEX) * BLOCK_N
    row = row0 + tl.arange(0, BLOCK_M)
    col = col0 + tl.arange(0, BLOCK_N)
    in_rows = row < m
    in_cols = col < n
    a_row = tl.zeros((BLOCK_M,), dtype=INDEX)
    c_row = tl.zeros((BLOCK_M,), dtype=INDEX)
    rest = row
    if OUTER_FIRST:
        a_row += rest % outer.rows * outer.rows_a
        c_row += rest % outer.rows * outer.rows_c
        rest = rest // outer.rows
    for d in tl.static_range(DIMS):
        values = axes[d].rows if phases is None else tl.maximum(axes[d].rows, 1)
        row_digit = rest % values
        rest = rest // values
        a_row += (row_digit * axes[d].row_step + axes[d].origin) * axes[d].a
        c_row += row_digit * axes[d].c + axes[d].start_c
    if not OUTER_FIRST:
        a_row += rest * outer.rows_a
        c_row += rest * outer.rows_c
    a_base = ptrs.a + group * groups.a
    b_base = ptrs.b + group * groups.b + col[None, :] * outer.cols_b

    ACC: tl.constexpr = tl.float64 if ptrs.a.dtype.element_ty == tl.float64 else tl.float32
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    first, last = split_k_range(split, k, BLOCK_K, SPLIT_K)
    if BLOCKED:
        last = tl.minimum(last, k // BLOCK_K)  # none where no tap reaches the pixels of a phase
    for step in range(first, last):
        if BLOCKED:  # one tap a step: its digits and its place in the operands are scalars
            taps = tl.maximum(k // outer.steps, 1)
            depth_rest = step % taps
            channel = step // taps * BLOCK_K + tl.arange(0, BLOCK_K).to(INDEX)
            inside = in_rows[:, None]
            in_b = in_cols[None, :]
        else:
            depth_rest = step * BLOCK_K + tl.arange(0, BLOCK_K).to(INDEX)
            inside = in_rows[:, None] & (depth_rest < k)[None, :]
            in_b = (depth_rest < k)[:, None] & in_cols[None, :]
        a_depth = tl.zeros((BLOCK_K,), dtype=INDEX)
        b_depth = tl.zeros((BLOCK_K,), dtype=INDEX)
        row_rest = row // outer.rows if OUTER_FIRST else row
        for d in tl.static_range(DIMS):
            if phases is not None:
                steps = tl.maximum(axes[d].steps, 1)
                rows = tl.maximum(axes[d].rows, 1)
            elif TAPS is not None:
                steps = TAPS[d]
                rows = axes[d].rows
            else:
                steps = axes[d].steps
                rows = axes[d].rows
            digit = depth_rest % steps
            depth_rest = depth_rest // steps
            moved = digit * axes[d].k_step
            at = row_rest % rows * axes[d].row_step + axes[d].origin
            row_rest = row_rest // rows
            at = at[:, None] + (moved if BLOCKED else moved[None, :])
            inside = inside & (at >= 0) & (at < axes[d].size)
            a_depth += moved * axes[d].a
            b_depth += digit * axes[d].b + axes[d].start_b
        a_depth += (channel if BLOCKED else depth_rest) * outer.k_a
        b_depth += (channel if BLOCKED else depth_rest) * outer.k_b
        a = tl.load(a_base + (a_row[:, None] + a_depth[None, :]), mask=inside, other=0.0)
        b = tl.load(b_base + b_depth[:, None], mask=in_b, other=0.0)
        acc = multiply_add(a, b, acc, PRECISION, UPCAST)

    if source.ptr is not None:  # no function: before Triton 3.7 one can return no tuple that holds None
        source = Matrix(source.ptr + group * source.batch, source.row, source.col, source.batch)
    acc = tile_epilogue(acc, source, row0, col0, m, n, (alpha_low, alpha_high, beta_low, beta_high))
    c_base = ptrs.c + group * groups.c + split.to(tl.int64) * groups.part
    c_at = c_base + (c_row[:, None] + col[None, :] * outer.cols_c)
    tl.store(c_at, acc.to(ptrs.c.dtype.element_ty), mask=in_rows[:, None] & in_cols[None, :])
