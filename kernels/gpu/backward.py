"""The Triton kernel of a backward pass: both gradients in one launch."""

import triton
import triton.language as tl

from .tiles import accumulate_tile, store_block, store_rows, tile_coords


@triton.jit(repr=lambda specialization: specialization.constants["NAME"])
def backward_tma(
    a_desc, b_desc, rows_desc, columns_desc, da_desc, db_desc, da, db, m, n, k,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    A_TRANSPOSED: tl.constexpr, B_TRANSPOSED: tl.constexpr, GRAD_TRANSPOSED: tl.constexpr,
    SUBTILES: tl.constexpr, NAME: tl.constexpr,
):  # fmt: skip
    """dB = At . dC and dA = dC . Bt; tiles of dB first, then of dA.

    Shapes: A (m, k), B (k, n), dC (m, n); m, n, k >= 1. Grid: any number of programs.
    Strides: of the descriptors; TRANSPOSED operands have adjacent rows. dC is read through two descriptors, since
    its tiles in the two products differ: rows_desc as the left operand of dA, columns_desc as the right one of dB.
    Dtypes: 16-bit, accumulated in float32.
    Result: through da_desc and db_desc, or where one is None to the `Matrix` da or db, by rows.
    Rounding, edges, determinism: as `gemm_tma`. Source: docs/derivation.md.
    """
    tiles_k = 1 + (k - 1) // BLOCK_M
    tiles_n = 1 + (n - 1) // BLOCK_N
    of_db = tiles_k * tiles_n
    tiles_m = 1 + (m - 1) // BLOCK_M
    of_da = tiles_m * (1 + (k - 1) // BLOCK_N)
    for item in range(tl.program_id(0), of_db + of_da, tl.num_programs(0)):
        if item < of_db:
            row, col = tile_coords(item, tiles_k, tiles_n, GROUP_M)
            row0 = row * BLOCK_M
            col0 = col * BLOCK_N
            acc = accumulate_tile(
                a_desc, columns_desc, 0, row0, col0, 0, 1 + (m - 1) // BLOCK_K,
                BLOCK_M, BLOCK_N, BLOCK_K, not A_TRANSPOSED, GRAD_TRANSPOSED, False, False,
            )  # fmt: skip
            if db_desc is not None:
                store_block(acc, db_desc, 0, row0, col0, SUBTILES, False)
            else:
                store_rows(acc, db, row0, col0, k, n)
        else:
            row, col = tile_coords(item - of_db, tiles_m, 1 + (k - 1) // BLOCK_N, GROUP_M)
            row0 = row * BLOCK_M
            col0 = col * BLOCK_N
            acc = accumulate_tile(
                rows_desc, b_desc, 0, row0, col0, 0, 1 + (n - 1) // BLOCK_K,
                BLOCK_M, BLOCK_N, BLOCK_K, GRAD_TRANSPOSED, not B_TRANSPOSED, False, False,
            )  # fmt: skip
            if da_desc is not None:
                store_block(acc, da_desc, 0, row0, col0, SUBTILES, False)
            else:
                store_rows(acc, da, row0, col0, m, k)
