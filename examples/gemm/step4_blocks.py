"""Step 4: blocks. A piece of B that fits into L2 is used by all rows of A before the next one is read."""

import numpy as np
from numba import njit

MR = 4
KC, NC = 64, 1024  # of float32: 256 KiB, half of a small L2


@njit
def add_rows(a, b, c, i, pc, jc):
    """C[i : i+4, jc : jc+NC] += A[i : i+4, pc : pc+KC] · B[pc : pc+KC, jc : jc+NC]."""
    c0, c1, c2, c3 = c[i, jc : jc + NC], c[i + 1, jc : jc + NC], c[i + 2, jc : jc + NC], c[i + 3, jc : jc + NC]
    for p in range(pc, min(pc + KC, b.shape[0])):
        row = b[p, jc : jc + NC]
        x0, x1, x2, x3 = a[i, p], a[i + 1, p], a[i + 2, p], a[i + 3, p]
        for j in range(row.size):
            y = row[j]
            c0[j] += x0 * y
            c1[j] += x1 * y
            c2[j] += x2 * y
            c3[j] += x3 * y


@njit
def add_row(a, b, c, i, pc, jc):
    """The same of one row, for the rows that remain."""
    c0 = c[i, jc : jc + NC]
    for p in range(pc, min(pc + KC, b.shape[0])):
        row, x = b[p, jc : jc + NC], a[i, p]
        for j in range(row.size):
            c0[j] += x * row[j]


@njit
def gemm(a, b):
    """C[:, jc] += A[:, pc] · B[pc, jc], block by block."""
    (m, k), n = a.shape, b.shape[1]
    c = np.zeros((m, n), a.dtype)
    whole = m - m % MR
    for jc in range(0, n, NC):
        for pc in range(0, k, KC):
            for i in range(0, whole, MR):
                add_rows(a, b, c, i, pc, jc)
            for i in range(whole, m):
                add_row(a, b, c, i, pc, jc)
    return c


if __name__ == "__main__":
    from verify import verify

    verify(gemm)
