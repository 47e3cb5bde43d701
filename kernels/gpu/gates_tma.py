"""The Triton kernel of a gated product through TMA: operands by descriptors, results by pointers."""

import triton
import triton.language as tl

from .gates import gate_and_store
from .tiles import load_left, load_right, tile_coords


@triton.jit(repr=lambda specialization: specialization.constants["NAME"])
def gemm_gated_tma(
    a_desc, b_desc, gate_desc, c, pre, value, source, gate_source, m, n, k,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    TRANSPOSED: tl.constexpr, UPCAST: tl.constexpr, ACTIVATION: tl.constexpr, NAME: tl.constexpr,
):  # fmt: skip
    """C = activation(P) * S, P = A * G + gate_source, S = A * B + source; the programs divide the tiles.

    Shapes, results, sources, aliasing, rounding, determinism: as `gemm_gated`. Grid: any number of programs.
    Strides: of the descriptors, TRANSPOSED where rows are adjacent: of A, B and G; what one can hold is
    `operands.fits_tma`. Any of C.
    Dtypes: 16-bit, accumulated in float32.
    Edges: TMA loads zeros beyond an operand; stores are masked.
    Source: as `gemm_tma`.
    """
    tiles_m = 1 + (m - 1) // BLOCK_M
    tiles_n = 1 + (n - 1) // BLOCK_N
    for item in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        row, col = tile_coords(item, tiles_m, tiles_n, GROUP_M)
        row0 = row * BLOCK_M
        col0 = col * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        gate_acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for step in range(0, 1 + (k - 1) // BLOCK_K):
            depth0 = step * BLOCK_K
            left = load_left(a_desc, 0, row0, depth0, BLOCK_M, BLOCK_K, TRANSPOSED[0], False)
            right = load_right(b_desc, 0, depth0, col0, BLOCK_K, BLOCK_N, TRANSPOSED[1], False)
            gate_right = load_right(gate_desc, 0, depth0, col0, BLOCK_K, BLOCK_N, TRANSPOSED[2], False)
            if UPCAST:
                left = left.to(tl.float32)
                right = right.to(tl.float32)
                gate_right = gate_right.to(tl.float32)
            acc = tl.dot(left, right, acc)
            gate_acc = tl.dot(left, gate_right, gate_acc)
        gate_and_store(acc, gate_acc, (source, gate_source), c, (pre, value), row0, col0, m, n, ACTIVATION)
