"""GEMM for CPU, in Numba."""
