"""Step 1: the definition. One element of C after the other, each a sum over k."""

import numpy as np
from numba import njit


@njit
def gemm(a, b):
    """C[i, j] = Σ_p A[i, p] · B[p, j]."""
    (m, k), n = a.shape, b.shape[1]
    c = np.empty((m, n), a.dtype)
    for i in range(m):
        for j in range(n):
            total = a.dtype.type(0)
            for p in range(k):
                total += a[i, p] * b[p, j]
            c[i, j] = total
    return c


if __name__ == "__main__":
    from verify import verify

    verify(gemm)
