"""The Triton GEMM through TMA: operands and result by descriptors, one program a multiprocessor."""

import triton
import triton.language as tl

from .arguments import Matrix
from .epilogue import SCALARS, activate_and_store, tile_epilogue, tile_epilogue_and_store
from .tiles import IMPRECISE, accumulate_tile, scale_8_bits, split_k_range, store_block, tile_coords


@triton.jit(repr=lambda specialization: specialization.constants["NAME"], do_not_specialize=SCALARS)
def gemm_tma(
    a_desc, b_desc, c_desc, c, pre, scales, m, n, k, batches,
    source, alpha_low, alpha_high, beta_low, beta_high,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    SPLIT_K: tl.constexpr, TRANSPOSED: tl.constexpr, STORE: tl.constexpr, FLATTEN: tl.constexpr,
    UPCAST: tl.constexpr, NAME: tl.constexpr,
):  # fmt: skip
    """C[z, i, j] = sum over t < k of A[z, i, t] * B[z, t, j]; the programs divide the tiles of all products.

    Shapes: A (m, k), B (k, n), C (m, n), or a batch of each; m, n, k >= 1. batches: how many, None for one product.
    c, source: `Matrix`. scales: `ScalePtrs`. Grid: any number of programs, which take tiles in turn.
    TRANSPOSED: of A and of B. STORE: into how many parts a tile is cut to store it, and the activation or None.
    FLATTEN makes one loop of those over tiles and over k, so that the first loads of a tile are under way while the
    one before is stored; `plan.is_flattened` is where it may be set.
    Strides: of the descriptors: adjacent columns, or adjacent rows and TRANSPOSED; what a descriptor
    can hold is `operands.fits_tma`.
    Dtypes: 16-bit a and b, accumulated in float32, and c and source alike or float32; or 8-bit a and b, whose sums are
    multiplied by the two scales in float32 before they are rounded.
    Epilogue: as `gemm`; `pre` is a descriptor where c_desc is one, else an address.
    Result: through c_desc, or where that is None to c, by rows. With SPLIT_K > 1 c is the workspace: SPLIT_K float32
    partial results of each product, for `reduce`.
    Aliasing: c overlaps neither a nor b; the source may be c.
    Rounding: once, at the store.
    Edges: TMA loads zeros beyond an operand and writes nothing beyond C.
    Determinism: t runs upward in steps of BLOCK_K inside a split of k; splits depend on k alone; no atomics.
    Source: after the persistent matrix multiplication of Triton's tutorials.
    """
    tiles_m = 1 + (m - 1) // BLOCK_M
    tiles_n = 1 + (n - 1) // BLOCK_N
    tiles = tiles_m * tiles_n
    BATCHED: tl.constexpr = batches is not None
    items = tiles * SPLIT_K * batches if BATCHED else tiles * SPLIT_K
    scalars = (alpha_low, alpha_high, beta_low, beta_high)
    MAX_IMPRECISE: tl.constexpr = None if scales.a is None else IMPRECISE
    ACTIVATION: tl.constexpr = STORE[1]  # Triton 3.6 cannot pass on an element of a tuple, a plain string there
    for item in tl.range(tl.program_id(0), items, tl.num_programs(0), flatten=FLATTEN):
        part = item // tiles
        row, col = tile_coords(item % tiles, tiles_m, tiles_n, GROUP_M)
        first, last = split_k_range(part % SPLIT_K, k, BLOCK_K, SPLIT_K)
        row0 = row * BLOCK_M
        col0 = col * BLOCK_N
        batch = part // SPLIT_K
        acc = accumulate_tile(
            a_desc, b_desc, batch, row0, col0, first, last,
            BLOCK_M, BLOCK_N, BLOCK_K, TRANSPOSED[0], TRANSPOSED[1], BATCHED, UPCAST, MAX_IMPRECISE,
        )  # fmt: skip
        acc = scale_8_bits(acc, scales)
        added = source
        if source.ptr is not None:
            added = Matrix(source.ptr + batch.to(tl.int64) * source.batch, source.row, source.col, source.batch)
        c_part = c
        pre_part = pre
        if c_desc is None:
            c_part = Matrix(c.ptr + part.to(tl.int64) * c.batch, c.row, c.col, c.batch)
            if pre is not None:
                pre_part = pre + part.to(tl.int64) * c.batch
        if ACTIVATION is not None:
            activate_and_store(
                acc, added, c_part, c_desc, pre_part, batch, row0, col0, m, n, scalars, ACTIVATION, BATCHED
            )  # fmt: skip
        elif c_desc is not None:
            acc = tile_epilogue(acc, added, row0, col0, m, n, scalars)
            store_block(acc, c_desc, batch, row0, col0, STORE[0], BATCHED)
        else:
            tile_epilogue_and_store(acc, added, c_part, row0, col0, m, n, scalars)
