"""Step 5: packing. The block of B is copied, so that its rows lie together, whatever the width of B."""

import numpy as np
from numba import njit

MR = 4
KC, NC = 64, 1024


@njit
def pack(b, pc, jc, block):
    """block[p, j] = B[pc + p, jc + j], and the number of its rows, which is less at the lower edge."""
    depth, width = min(KC, b.shape[0] - pc), min(NC, b.shape[1] - jc)
    for p in range(depth):
        row, copy = b[pc + p, jc : jc + width], block[p]
        for j in range(width):
            copy[j] = row[j]
    return depth


@njit
def add_rows(a, block, depth, c, i, pc, jc):
    """C[i : i+4, jc : jc+NC] += A[i : i+4, pc : pc+KC] · block."""
    c0, c1, c2, c3 = c[i, jc : jc + NC], c[i + 1, jc : jc + NC], c[i + 2, jc : jc + NC], c[i + 3, jc : jc + NC]
    for p in range(depth):
        row = block[p]
        x0, x1, x2, x3 = a[i, pc + p], a[i + 1, pc + p], a[i + 2, pc + p], a[i + 3, pc + p]
        for j in range(c0.size):
            y = row[j]
            c0[j] += x0 * y
            c1[j] += x1 * y
            c2[j] += x2 * y
            c3[j] += x3 * y


@njit
def add_row(a, block, depth, c, i, pc, jc):
    """The same of one row, for the rows that remain."""
    c0 = c[i, jc : jc + NC]
    for p in range(depth):
        row, x = block[p], a[i, pc + p]
        for j in range(c0.size):
            c0[j] += x * row[j]


@njit
def gemm(a, b):
    """Step 4 on a copy of each block."""
    (m, k), n = a.shape, b.shape[1]
    c = np.zeros((m, n), a.dtype)
    block = np.empty((KC, NC), a.dtype)
    whole = m - m % MR
    for jc in range(0, n, NC):
        for pc in range(0, k, KC):
            depth = pack(b, pc, jc, block)
            for i in range(0, whole, MR):
                add_rows(a, block, depth, c, i, pc, jc)
            for i in range(whole, m):
                add_row(a, block, depth, c, i, pc, jc)
    return c


if __name__ == "__main__":
    from verify import verify

    verify(gemm)
