"""Step 2: the loop over j goes inside, so that the innermost loop runs along rows of B and C."""

import numpy as np
from numba import njit


@njit
def gemm(a, b):
    """C[i, :] += A[i, p] · B[p, :]: neighbours in memory, which LLVM turns into vector instructions."""
    (m, k), n = a.shape, b.shape[1]
    c = np.zeros((m, n), a.dtype)
    for i in range(m):
        for p in range(k):
            x = a[i, p]
            for j in range(n):
                c[i, j] += x * b[p, j]
    return c


if __name__ == "__main__":
    from verify import verify

    verify(gemm)
