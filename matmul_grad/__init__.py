"""Matrix multiplication and its two gradients as native PyTorch operators, from kernels that people can read."""

from .api import mm, mm_backward, scaled_mm
from .modes import deterministic, float32_products
from .override import disable, enable, enabled, info
from .strictness import strict

__version__ = "0.1.0"
__all__ = [
    "deterministic",
    "disable",
    "enable",
    "enabled",
    "float32_products",
    "info",
    "mm",
    "mm_backward",
    "scaled_mm",
    "strict",
]
