"""Which dtypes have convolutions: bfloat16 has none where the CPU multiplies pairs of it; torch has kernels there."""

import torch

from matmul_grad.kernels.native import convolution


def has_kernel(dtype: torch.dtype) -> bool:
    one = torch.ones(1, 1, 1, dtype=dtype)
    return convolution.supports(one, one)
