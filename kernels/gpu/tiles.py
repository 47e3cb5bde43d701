"""What every GEMM kernel shares: the order of tiles, the share of k, the product of one tile, its store."""

import triton
import triton.language as tl


@triton.jit
def round_to_tf32(x):
    """Nearest TF32 (10 mantissa bits) of float32, ties away from zero; Inf stays, NaN becomes the quiet NaN.

    Matrix units drop the low 13 bits instead, which biases each product towards zero and makes Inf of a NaN
    whose payload lies there.
    """
    bits = x.to(tl.int32, bitcast=True)
    rounded = ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return tl.where(x == x, rounded, float("nan"))


@triton.jit
def place(tile, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Row and column of a tile: GROUP_M rows of tiles are walked together, so that B's are met again in L2."""
    group = tile // (GROUP_M * tiles_n)
    in_group = tile % (GROUP_M * tiles_n)
    rows_in_group = tl.minimum(tiles_m - group * GROUP_M, GROUP_M)
    return group * GROUP_M + in_group % rows_in_group, in_group // rows_in_group


@triton.jit
def share_of_k(part, k, BLOCK_K: tl.constexpr, SPLIT_K: tl.constexpr):
    """First and last step of BLOCK_K of one of SPLIT_K parts: cut by k alone, the last part may be shorter."""
    steps = 1 + (k - 1) // BLOCK_K
    most = (steps + SPLIT_K - 1) // SPLIT_K
    return tl.minimum(part * most, steps), tl.minimum(part * most + most, steps)


@triton.jit
def load_block(desc, batch, i, j, ROWS: tl.constexpr, COLS: tl.constexpr, BATCHED: tl.constexpr):
    """The ROWS x COLS block at (i, j) of a matrix in memory order, zero beyond its edges."""
    if BATCHED:  # noqa: SIM108 (a constexpr's branches need not have one type)
        block = desc.load([batch, i, j]).reshape(ROWS, COLS)
    else:
        block = desc.load([i, j])
    return block


@triton.jit
def left_block(
    desc, batch, row0, depth0, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, TURNED: tl.constexpr, BATCHED: tl.constexpr
):
    """BLOCK_M x BLOCK_K of the left operand; TURNED where its rows are the ones that are adjacent in memory."""
    if TURNED:
        block = load_block(desc, batch, depth0, row0, BLOCK_K, BLOCK_M, BATCHED).T
    else:
        block = load_block(desc, batch, row0, depth0, BLOCK_M, BLOCK_K, BATCHED)
    return block


@triton.jit
def right_block(
    desc, batch, depth0, col0, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, TURNED: tl.constexpr, BATCHED: tl.constexpr
):
    """BLOCK_K x BLOCK_N of the right operand."""
    if TURNED:
        block = load_block(desc, batch, col0, depth0, BLOCK_N, BLOCK_K, BATCHED).T
    else:
        block = load_block(desc, batch, depth0, col0, BLOCK_K, BLOCK_N, BATCHED)
    return block


@triton.jit
def tile_product(
    a_desc, b_desc, batch, row0, col0, first, last,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    A_TURNED: tl.constexpr, B_TURNED: tl.constexpr, BATCHED: tl.constexpr, UPCAST: tl.constexpr,
    IMPRECISE: tl.constexpr = None,
):  # fmt: skip
    """The float32 sums of one tile over the steps [first, last) of k, read through descriptors.

    IMPRECISE: how many 8-bit products the matrix unit may add in its own narrow sums before they join the others.
    """
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for step in range(first, last):
        a = left_block(a_desc, batch, row0, step * BLOCK_K, BLOCK_M, BLOCK_K, A_TURNED, BATCHED)
        b = right_block(b_desc, batch, step * BLOCK_K, col0, BLOCK_K, BLOCK_N, B_TURNED, BATCHED)
        if UPCAST:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        acc = tl.dot(a, b, acc, max_num_imprecise_acc=IMPRECISE)
    return acc


@triton.jit
def scale_of(scale_a_ptr, scale_b_ptr):
    """What 8-bit operands were divided by, both at once."""
    return tl.load(scale_a_ptr) * tl.load(scale_b_ptr)


@triton.jit
def store_rows(acc, c_ptr, row0, col0, rows, cols, c_row, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """A tile into C, whose columns are together: masked, and rounded once."""
    row = row0 + tl.arange(0, BLOCK_M)
    col = col0 + tl.arange(0, BLOCK_N)
    at = c_ptr + row[:, None].to(tl.int64) * c_row + col[None, :]
    tl.store(at, acc.to(c_ptr.dtype.element_ty), mask=(row < rows)[:, None] & (col < cols)[None, :])


@triton.jit
def store_block(
    acc, c_desc, batch, row0, col0,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SUBTILES: tl.constexpr, BATCHED: tl.constexpr,
):  # fmt: skip
    """A tile into C through its descriptor, in SUBTILES halves: the buffer in shared memory is as much smaller."""
    if SUBTILES == 2:
        left, right = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))
        store_half(left, c_desc, batch, row0, col0, BLOCK_M, BLOCK_N // 2, BATCHED)
        store_half(right, c_desc, batch, row0, col0 + BLOCK_N // 2, BLOCK_M, BLOCK_N // 2, BATCHED)
    else:
        store_half(acc, c_desc, batch, row0, col0, BLOCK_M, BLOCK_N, BATCHED)


@triton.jit
def store_half(part, c_desc, batch, row0, col0, ROWS: tl.constexpr, COLS: tl.constexpr, BATCHED: tl.constexpr):
    rounded = part.to(c_desc.dtype)
    if BATCHED:
        c_desc.store([batch, row0, col0], rounded.reshape(1, ROWS, COLS))
    else:
        c_desc.store([row0, col0], rounded)
