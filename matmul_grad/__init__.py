"""Matrix multiplication and its two gradients as native PyTorch operators, from kernels that people can read."""

from .api import mm, mm_backward, scaled_mm
from .modes import deterministic, float32_products
from .strictness import strict

__version__ = "0.1.0"
__all__ = ["deterministic", "float32_products", "mm", "mm_backward", "scaled_mm", "strict"]
