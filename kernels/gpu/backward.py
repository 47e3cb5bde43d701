"""The Triton kernel of a backward pass: both gradients, and the bias's, in one launch."""

import triton
import triton.language as tl

from .tiles import accumulate_tile, load_left, load_right, store_block, store_rows, tile_coords


@triton.jit
def accumulate_tile_and_sums(
    a_desc, b_desc, row0, col0, steps,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    A_TRANSPOSED: tl.constexpr, B_TRANSPOSED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """As `accumulate_tile`, and the sums of the right operand's columns."""
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    sums = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for step in range(0, steps):
        a = load_left(a_desc, 0, row0, step * BLOCK_K, BLOCK_M, BLOCK_K, A_TRANSPOSED, False)
        b = load_right(b_desc, 0, step * BLOCK_K, col0, BLOCK_K, BLOCK_N, B_TRANSPOSED, False)
        if UPCAST:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        acc = tl.dot(a, b, acc)
        sums += tl.sum(b.to(tl.float32), axis=0)
    return acc, sums


@triton.jit(repr=lambda specialization: specialization.constants["NAME"])
def backward_tma(
    a_desc, b_desc, rows_desc, columns_desc, da_desc, db_desc,
    da_ptr, db_ptr, bias_ptr, da_row, db_row,
    m, n, k,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    A_TRANSPOSED: tl.constexpr, B_TRANSPOSED: tl.constexpr, GRAD_TRANSPOSED: tl.constexpr, BIAS: tl.constexpr,
    DA_TMA: tl.constexpr, DB_TMA: tl.constexpr, SUBTILES: tl.constexpr, UPCAST: tl.constexpr, NAME: tl.constexpr,
):  # fmt: skip
    """dB = At . dC, dA = dC . Bt and, where BIAS, the sums of dC's columns; tiles of dB first, then of dA.

    Shapes: A (m, k), B (k, n), dC (m, n); m, n, k >= 1. Grid: any number of programs.
    Strides: of the descriptors; TRANSPOSED operands have adjacent rows. dC is read through two descriptors, since
    its tiles in the two products differ: rows_desc as the left operand of dA, columns_desc as the right one of dB.
    Dtypes: 16-bit, accumulated in float32; the bias's gradient has the same dtype.
    Result: through da_desc and db_desc where DA_TMA and DB_TMA, else to da_ptr and db_ptr.
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
            steps = 1 + (m - 1) // BLOCK_K
            if BIAS and row == 0:
                acc, sums = accumulate_tile_and_sums(
                    a_desc, columns_desc, row0, col0, steps,
                    BLOCK_M, BLOCK_N, BLOCK_K, not A_TRANSPOSED, GRAD_TRANSPOSED, UPCAST,
                )  # fmt: skip
                column = col0 + tl.arange(0, BLOCK_N)
                tl.store(bias_ptr + column, sums.to(bias_ptr.dtype.element_ty), mask=column < n)
            else:
                acc = accumulate_tile(
                    a_desc, columns_desc, 0, row0, col0, 0, steps,
                    BLOCK_M, BLOCK_N, BLOCK_K, not A_TRANSPOSED, GRAD_TRANSPOSED, False, UPCAST,
                )  # fmt: skip
            if DB_TMA:
                store_block(acc, db_desc, 0, row0, col0, BLOCK_M, BLOCK_N, SUBTILES, False)
            else:
                store_rows(acc, db_ptr, row0, col0, k, n, db_row, BLOCK_M, BLOCK_N)
        else:
            row, col = tile_coords(item - of_db, tiles_m, 1 + (k - 1) // BLOCK_N, GROUP_M)
            row0 = row * BLOCK_M
            col0 = col * BLOCK_N
            acc = accumulate_tile(
                rows_desc, b_desc, 0, row0, col0, 0, 1 + (n - 1) // BLOCK_K,
                BLOCK_M, BLOCK_N, BLOCK_K, GRAD_TRANSPOSED, not B_TRANSPOSED, False, UPCAST,
            )  # fmt: skip
            if DA_TMA:
                store_block(acc, da_desc, 0, row0, col0, BLOCK_M, BLOCK_N, SUBTILES, False)
            else:
                store_rows(acc, da_ptr, row0, col0, m, k, da_row, BLOCK_M, BLOCK_N)
