"""The second half of a product whose k was cut: its parts added up in order."""

import triton
import triton.language as tl

from .epilogue import SCALES, epilogue


@triton.jit(repr=lambda specialization: specialization.constants["NAME"], do_not_specialize=SCALES)
def reduce(
    parts_ptr, c_ptr, size, n, c_row, c_col, c_batch,
    source_ptr, s_row, s_col, s_batch, alpha_low, alpha_high, beta_low, beta_high,
    SPLIT_K: tl.constexpr, BLOCK: tl.constexpr, NAME: tl.constexpr,
):  # fmt: skip
    """C[z, i, j] = round(P[z, 0, i, j] + P[z, 1, i, j] + ...), BLOCK elements a program.

    Shapes: P (batches, SPLIT_K, size) with size = m * n, contiguous; C (m, n) of any strides, products c_batch
    apart. Grid: (ceil(size / BLOCK), batches).
    Sums: as `gemm`; the source may be C.
    Dtypes: P float32 (float64 for a float64 C). Rounding: once, at the store.
    Edges: masks. Determinism: parts are added upward; no atomics.
    """
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    batch = tl.program_id(1).to(tl.int64)
    inside = index < size
    at = parts_ptr + batch * SPLIT_K * size + index
    total = tl.load(at, mask=inside, other=0.0)
    for part in tl.static_range(1, SPLIT_K):
        total += tl.load(at + part * tl.cast(size, tl.int64), mask=inside, other=0.0)
    source = None
    if source_ptr is not None:
        source_at = source_ptr + batch * s_batch + index // n * s_row + index % n * s_col
        source = tl.load(source_at, mask=inside, other=0.0)
    total = epilogue(total, source, (alpha_low, alpha_high, beta_low, beta_high))
    c = c_ptr + batch * c_batch + index // n * c_row + index % n * c_col
    tl.store(c, total.to(c_ptr.dtype.element_ty), mask=inside)
