"""The Triton GEMM of the copy engine: operands and result through TMA descriptors, one program a multiprocessor."""

import triton
import triton.language as tl

from .epilogue import SCALES, tile_epilogue, tile_epilogue_and_store
from .tiles import accumulate_tile, scale_of, split_k_range, store_block, tile_coords


@triton.jit(repr=lambda specialization: specialization.constants["NAME"], do_not_specialize=SCALES)
def gemm_tma(
    a_desc, b_desc, c_desc, c_ptr, scale_a_ptr, scale_b_ptr, c_row, c_part,
    m, n, k, batches,
    source_ptr, s_row, s_col, s_batch, alpha_low, alpha_high, beta_low, beta_high,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    SPLIT_K: tl.constexpr, A_TRANSPOSED: tl.constexpr, B_TRANSPOSED: tl.constexpr, BATCHED: tl.constexpr,
    STORE_TMA: tl.constexpr, SUBTILES: tl.constexpr, UPCAST: tl.constexpr, SCALED: tl.constexpr,
    IMPRECISE: tl.constexpr, NAME: tl.constexpr,
):  # fmt: skip
    """C[z, i, j] = sum over t < k of A[z, i, t] * B[z, t, j]; the programs share out all tiles of all products.

    Shapes: A (m, k), B (k, n), C (m, n), or `batches` of each (BATCHED); m, n, k >= 1. Grid: any number of
    programs; each takes every so many-th tile.
    Strides: of the descriptors: adjacent columns, or adjacent rows and a TRANSPOSED descriptor; what a descriptor
    can hold is `launch.fits_tma`.
    Dtypes: 16-bit, a, b and c alike, or 8-bit a and b, accumulated in float32; IMPRECISE as in `accumulate_tile`.
    SCALED multiplies the sums by two float32 before they are rounded.
    Sums: as `gemm`.
    Result: through c_desc where STORE_TMA, else to c_ptr with rows c_row and products c_part apart. With
    SPLIT_K > 1 c_ptr is the workspace: SPLIT_K float32 partial results a product, for `reduce`.
    Aliasing: c overlaps neither a nor b; the source may be c.
    Rounding: once, at the store.
    Edges: the copy engine reads zeros beyond an operand and writes nothing beyond C.
    Determinism: t runs upward in steps of BLOCK_K inside a part of k; parts are cut by k alone; no atomics.
    Source: after the persistent matrix multiplication of Triton's tutorials.
    """
    tiles_m = 1 + (m - 1) // BLOCK_M
    tiles_n = 1 + (n - 1) // BLOCK_N
    tiles = tiles_m * tiles_n
    for item in range(tl.program_id(0), tiles * SPLIT_K * batches, tl.num_programs(0)):
        part = item // tiles
        row, col = tile_coords(item % tiles, tiles_m, tiles_n, GROUP_M)
        first, last = split_k_range(part % SPLIT_K, k, BLOCK_K, SPLIT_K)
        row0 = row * BLOCK_M
        col0 = col * BLOCK_N
        batch = part // SPLIT_K
        acc = accumulate_tile(
            a_desc, b_desc, batch, row0, col0, first, last,
            BLOCK_M, BLOCK_N, BLOCK_K, A_TRANSPOSED, B_TRANSPOSED, BATCHED, UPCAST, IMPRECISE,
        )  # fmt: skip
        if SCALED:
            acc *= scale_of(scale_a_ptr, scale_b_ptr)
        source = None if source_ptr is None else source_ptr + batch.to(tl.int64) * s_batch
        scales = (alpha_low, alpha_high, beta_low, beta_high)
        if STORE_TMA:
            acc = tile_epilogue(acc, source, s_row, s_col, row0, col0, m, n, scales, BLOCK_M, BLOCK_N)
            store_block(acc, c_desc, batch, row0, col0, BLOCK_M, BLOCK_N, SUBTILES, BATCHED)
        else:
            tile_epilogue_and_store(
                acc, source, s_row, s_col, c_ptr + part.to(tl.int64) * c_part, c_row, row0, col0, m, n, scales,
                BLOCK_M, BLOCK_N,
            )  # fmt: skip
