"""Whether a step is correct: small integers have exact products, so every element must be equal."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

# (m, n, k): one element, edges of every tile and block in each dimension, an empty sum.
SHAPES = ((1, 1, 1), (4, 16, 8), (7, 17, 9), (97, 35, 300), (130, 260, 257), (5, 1100, 70), (2, 4100, 3), (3, 5, 0))

Gemm = Callable[[np.ndarray, np.ndarray], np.ndarray]


def verify(gemm: Gemm) -> None:
    """Compare with NumPy; AssertionError where an element differs."""
    draw = np.random.default_rng(0).integers
    for m, n, k in SHAPES:
        a, b = (draw(-9, 10, shape).astype(np.float32) for shape in ((m, k), (k, n)))
        np.testing.assert_array_equal(gemm(a, b), a @ b, err_msg=f"{m}×{n}×{k}")
    print(f"{len(SHAPES)} products are exact")
