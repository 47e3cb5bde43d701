"""The epilogue of every kernel that stores a result: alpha * accumulator + beta * source, before the one rounding."""

import triton
import triton.language as tl

from .tiles import store_rows

# Arguments of every kernel that stores a result; were they specialised, each alpha and beta would be compiled anew.
SCALES = ("alpha_low", "alpha_high", "beta_low", "beta_high")
# Of the source of a tile, so many columns are loaded at a time: beside the largest tiles, more spill.
COLUMNS = tl.constexpr(64)


@triton.jit
def scale_from(low, high, SCALE: tl.constexpr):
    """alpha or beta, from the two halves of a float64's bits: Triton makes a float32 of a float."""
    bits = (high.to(tl.int64) << 32) | (low.to(tl.int64) & 0xFFFFFFFF)
    return bits.to(tl.float64, bitcast=True).to(SCALE)


@triton.jit
def scale_by_alpha(acc, scales):
    """alpha * acc, rounded to the type of acc; acc where there is no alpha."""
    if scales[0] is not None:
        acc *= scale_from(scales[0], scales[1], acc.dtype)
    return acc


@triton.jit
def add_source(acc, source, scales):
    """acc + beta * source in one multiply-add; acc where source is None."""
    if source is not None:
        acc = tl.fma(source.to(acc.dtype), scale_from(scales[2], scales[3], acc.dtype), acc)
    return acc


@triton.jit
def epilogue(acc, source, scales):
    """alpha * acc + beta * source, for a source that is loaded already.

    source: the elements that are added, in the shape of acc; None adds nothing. scales: the arguments `SCALES`, in
    their order.
    """
    return add_source(scale_by_alpha(acc, scales), source, scales)


@triton.jit
def load_source(base, s_row, s_col, row, col, in_rows, in_cols):
    """What is added to a tile; one row, column or number of it where the other stride is None."""
    if s_row is None and s_col is None:
        source = tl.load(base)
    elif s_row is None:
        source = tl.load(base + col * s_col, mask=in_cols, other=0.0)
    elif s_col is None:
        source = tl.load(base + row * s_row, mask=in_rows, other=0.0)
    else:
        source = tl.load(base + row * s_row + col * s_col, mask=in_rows & in_cols, other=0.0)
    return source


@triton.jit
def add_source_to_tile(
    acc, base, s_row, s_col, row0, col0, rows, cols, scales, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """`add_source` of a whole tile, COLUMNS at a time; base None adds nothing."""
    if base is None:
        pass
    elif BLOCK_N > COLUMNS:
        left, right = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))
        left = add_source_to_tile(left, base, s_row, s_col, row0, col0, rows, cols, scales, BLOCK_M, BLOCK_N // 2)
        right = add_source_to_tile(
            right, base, s_row, s_col, row0, col0 + BLOCK_N // 2, rows, cols, scales, BLOCK_M, BLOCK_N // 2
        )
        acc = tl.reshape(tl.permute(tl.join(left, right), (0, 2, 1)), (BLOCK_M, BLOCK_N))
    else:
        row = row0.to(tl.int64) + tl.arange(0, BLOCK_M)[:, None]
        col = col0.to(tl.int64) + tl.arange(0, BLOCK_N)[None, :]
        acc = add_source(acc, load_source(base, s_row, s_col, row, col, row < rows, col < cols), scales)
    return acc


@triton.jit
def tile_epilogue(
    acc, base, s_row, s_col, row0, col0, rows, cols, scales, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """`epilogue` of a whole tile. alpha precedes the cuts: in the pieces it costs the largest tiles registers."""
    acc = scale_by_alpha(acc, scales)
    return add_source_to_tile(acc, base, s_row, s_col, row0, col0, rows, cols, scales, BLOCK_M, BLOCK_N)


@triton.jit
def tile_epilogue_and_store(
    acc, base, s_row, s_col, c_ptr, c_row, row0, col0, rows, cols, scales,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """`tile_epilogue` and `store_rows`."""
    acc = scale_by_alpha(acc, scales)
    add_source_and_store(acc, base, s_row, s_col, c_ptr, c_row, row0, col0, rows, cols, scales, BLOCK_M, BLOCK_N)


@triton.jit
def add_source_and_store(
    acc, base, s_row, s_col, c_ptr, c_row, row0, col0, rows, cols, scales,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """`add_source_to_tile` and `store_rows`, COLUMNS at a time: what is stored leaves its registers to the next."""
    if base is not None and BLOCK_N > COLUMNS:
        left, right = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))
        add_source_and_store(
            left, base, s_row, s_col, c_ptr, c_row, row0, col0, rows, cols, scales, BLOCK_M, BLOCK_N // 2
        )
        add_source_and_store(
            right, base, s_row, s_col, c_ptr, c_row, row0, col0 + BLOCK_N // 2, rows, cols, scales,
            BLOCK_M, BLOCK_N // 2,
        )  # fmt: skip
    else:
        acc = add_source_to_tile(acc, base, s_row, s_col, row0, col0, rows, cols, scales, BLOCK_M, BLOCK_N)
        store_rows(acc, c_ptr, row0, col0, rows, cols, c_row, BLOCK_M, BLOCK_N)
