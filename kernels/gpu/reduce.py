"""The second kernel of a product whose k is split: the partial results added in order."""

import triton
import triton.language as tl

from .activation import activate
from .epilogue import SCALARS, epilogue


@triton.jit(repr=lambda specialization: specialization.constants["NAME"], do_not_specialize=SCALARS)
def reduce(
    parts_ptr, c_ptr, size, n, c, pre, source, alpha_low, alpha_high, beta_low, beta_high,
    SPLIT_K: tl.constexpr, BLOCK: tl.constexpr, ACTIVATION: tl.constexpr, NAME: tl.constexpr,
):  # fmt: skip
    """C[z, i, j] = round(P[z, 0, i, j] + P[z, 1, i, j] + ...), BLOCK elements a program.

    Shapes: P (batches, SPLIT_K, size) with size = m * n, contiguous; C (m, n). c: `Strides`, any. source: `Matrix`.
    Grid: ceil(size / BLOCK) * batches.
    Epilogue: as `gemm`; the source may be C.
    Dtypes: P float32 (float64 for a float64 C). Rounding: once, at the store.
    Edges: masks. Determinism: partial results are added upward; no atomics.
    """
    blocks = 1 + (size - 1) // BLOCK
    index = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    inside = index < size
    at = parts_ptr + batch * SPLIT_K * size + index
    total = tl.load(at, mask=inside, other=0.0)
    for part in tl.static_range(1, SPLIT_K):
        total += tl.load(at + part * tl.cast(size, tl.int64), mask=inside, other=0.0)
    added = None
    if source.ptr is not None:
        added_at = source.ptr + batch * source.batch + index // n * source.row + index % n * source.col
        added = tl.load(added_at, mask=inside, other=0.0)
    total = epilogue(total, added, (alpha_low, alpha_high, beta_low, beta_high))
    offset = batch * c.batch + index // n * c.row + index % n * c.col
    if pre is not None:
        tl.store(pre + offset, total.to(pre.dtype.element_ty), mask=inside)
    tl.store(c_ptr + offset, activate(total, ACTIVATION).to(c_ptr.dtype.element_ty), mask=inside)
