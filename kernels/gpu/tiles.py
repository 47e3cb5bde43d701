"""What the GEMM kernels share: order of tiles, range of k of one split, multiplication of one tile, its store."""

import triton
import triton.language as tl

# So many 8-bit products may the matrix unit of sm_90 add in 14 bits; torch's use_fast_accum=False promises no less.
IMPRECISE = tl.constexpr(128)


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
def multiply_add(a, b, acc, PRECISION: tl.constexpr, UPCAST: tl.constexpr, MAX_IMPRECISE: tl.constexpr = None):
    """acc + a * b of blocks that were loaded; PRECISION and UPCAST as in `gemm`."""
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    if PRECISION == "tf32":
        a = round_to_tf32(a)
        b = round_to_tf32(b)
    return tl.dot(a, b, acc, input_precision=PRECISION, max_num_imprecise_acc=MAX_IMPRECISE, out_dtype=acc.dtype)


@triton.jit
def tile_coords(tile, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Row and column of a tile. GROUP_M rows of tiles are visited together, so that tiles of B are reused from L2."""
    group = tile // (GROUP_M * tiles_n)
    in_group = tile % (GROUP_M * tiles_n)
    rows_in_group = tl.minimum(tiles_m - group * GROUP_M, GROUP_M)
    return group * GROUP_M + in_group % rows_in_group, in_group // rows_in_group


@triton.jit
def split_k_range(part, k, BLOCK_K: tl.constexpr, SPLIT_K: tl.constexpr):
    """First step of BLOCK_K of one of SPLIT_K splits, and the step after its last; the last split may be shorter."""
    steps = 1 + (k - 1) // BLOCK_K
    most = (steps + SPLIT_K - 1) // SPLIT_K
    return tl.minimum(part * most, steps), tl.minimum(part * most + most, steps)


@triton.jit
def load_block(desc, batch, i, j, ROWS: tl.constexpr, COLS: tl.constexpr, BATCHED: tl.constexpr):
    """Load the ROWS x COLS block at (i, j) of a matrix in memory order; zero beyond its edges."""
    if BATCHED:  # noqa: SIM108 (a constexpr's branches need not have one type)
        block = desc.load([batch, i, j]).reshape(ROWS, COLS)
    else:
        block = desc.load([i, j])
    return block


@triton.jit
def load_left(
    desc, batch, row0, depth0,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, TRANSPOSED: tl.constexpr, BATCHED: tl.constexpr,
):  # fmt: skip
    """Load BLOCK_M x BLOCK_K of the left operand; TRANSPOSED where its rows are adjacent in memory."""
    if TRANSPOSED:
        block = load_block(desc, batch, depth0, row0, BLOCK_K, BLOCK_M, BATCHED).T
    else:
        block = load_block(desc, batch, row0, depth0, BLOCK_M, BLOCK_K, BATCHED)
    return block


@triton.jit
def load_right(
    desc, batch, depth0, col0,
    BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, TRANSPOSED: tl.constexpr, BATCHED: tl.constexpr,
):  # fmt: skip
    """Load BLOCK_K x BLOCK_N of the right operand."""
    if TRANSPOSED:
        block = load_block(desc, batch, col0, depth0, BLOCK_N, BLOCK_K, BATCHED).T
    else:
        block = load_block(desc, batch, depth0, col0, BLOCK_K, BLOCK_N, BATCHED)
    return block


@triton.jit
def accumulate_tile(
    a_desc, b_desc, batch, row0, col0, first, last,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    A_TRANSPOSED: tl.constexpr, B_TRANSPOSED: tl.constexpr, BATCHED: tl.constexpr, UPCAST: tl.constexpr,
    MAX_IMPRECISE: tl.constexpr = None,
):  # fmt: skip
    """Accumulate one tile in float32 over the steps [first, last) of k, read through descriptors.

    MAX_IMPRECISE: how many 8-bit products the matrix unit may add in its own 14-bit accumulator, before they are added
    to the float32 one.
    """
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for step in range(first, last):
        a = load_left(a_desc, batch, row0, step * BLOCK_K, BLOCK_M, BLOCK_K, A_TRANSPOSED, BATCHED)
        b = load_right(b_desc, batch, step * BLOCK_K, col0, BLOCK_K, BLOCK_N, B_TRANSPOSED, BATCHED)
        if UPCAST:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        acc = tl.dot(a, b, acc, max_num_imprecise_acc=MAX_IMPRECISE)
    return acc


@triton.jit
def scale_8_bits(acc, scales):
    """acc times the two scales of 8-bit operands; acc of others."""
    if scales.a is not None:
        acc *= tl.load(scales.a) * tl.load(scales.b)
    return acc


@triton.jit
def halves(tile):
    """The left and the right columns of a tile."""
    return tl.split(tl.permute(tl.reshape(tile, (tile.shape[0], 2, tile.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def store_rows(acc, c, row0, col0, rows, cols):
    """Round a tile once and store it into C, whose columns are adjacent; masked at the edges."""
    row = row0 + tl.arange(0, acc.shape[0])
    col = col0 + tl.arange(0, acc.shape[1])
    at = c.ptr + row[:, None].to(tl.int64) * c.row + col[None, :]
    tl.store(at, acc.to(c.ptr.dtype.element_ty), mask=(row < rows)[:, None] & (col < cols)[None, :])


@triton.jit
def store_strided(acc, c, row0, col0, rows, cols):
    """`store_rows` for any strides."""
    row = row0.to(tl.int64) + tl.arange(0, acc.shape[0])[:, None]
    col = col0.to(tl.int64) + tl.arange(0, acc.shape[1])[None, :]
    at = c.ptr + row * c.row + col * c.col
    tl.store(at, acc.to(c.ptr.dtype.element_ty), mask=(row < rows) & (col < cols))


@triton.jit
def store_block(acc, c_desc, batch, row0, col0, SUBTILES: tl.constexpr, BATCHED: tl.constexpr):
    """Store a tile into C through its descriptor, in SUBTILES parts, so that the buffer in shared memory is smaller."""
    if SUBTILES == 2:
        left, right = halves(acc)
        store_subtile(left, c_desc, batch, row0, col0, BATCHED)
        store_subtile(right, c_desc, batch, row0, col0 + acc.shape[1] // 2, BATCHED)
    else:
        store_subtile(acc, c_desc, batch, row0, col0, BATCHED)


@triton.jit
def store_subtile(acc, c_desc, batch, row0, col0, BATCHED: tl.constexpr):
    """Round once and store through a descriptor."""
    rounded = acc.to(c_desc.dtype)
    if BATCHED:
        c_desc.store([batch, row0, col0], rounded.reshape(1, acc.shape[0], acc.shape[1]))
    else:
        c_desc.store([row0, col0], rounded)
