"""Step 3: four rows of C at a time, so that an element of B that was loaded is used four times."""

import numpy as np
from numba import njit

MR = 4


@njit
def add_rows(a, b, c, i):
    """C[i : i+4, :] += A[i : i+4, :] · B."""
    for p in range(b.shape[0]):
        x0, x1, x2, x3 = a[i, p], a[i + 1, p], a[i + 2, p], a[i + 3, p]
        for j in range(b.shape[1]):
            y = b[p, j]
            c[i, j] += x0 * y
            c[i + 1, j] += x1 * y
            c[i + 2, j] += x2 * y
            c[i + 3, j] += x3 * y


@njit
def add_row(a, b, c, i):
    """C[i, :] += A[i, :] · B, for the rows that remain."""
    for p in range(b.shape[0]):
        for j in range(b.shape[1]):
            c[i, j] += a[i, p] * b[p, j]


@njit
def add_product(a, b, c):
    """C += A · B."""
    m = a.shape[0]
    whole = m - m % MR
    for i in range(0, whole, MR):
        add_rows(a, b, c, i)
    for i in range(whole, m):
        add_row(a, b, c, i)


@njit
def gemm(a, b):
    """A · B."""
    c = np.zeros((a.shape[0], b.shape[1]), a.dtype)
    add_product(a, b, c)
    return c


if __name__ == "__main__":
    from verify import verify

    verify(gemm)
