"""Matrix multiplication and its two gradients as native PyTorch operators, from kernels that people can read."""

from .api import addmm, baddbmm, bmm, mm, mm_backward, scaled_mm
from .compose import linear, matmul
from .modes import deterministic, float32_products
from .nn import Linear, convert, converted, restore
from .override import disable, enable, enabled, info
from .strictness import strict
from .vectors import addmv, dot, mv, vdot

__version__ = "0.1.0"
__all__ = [
    "Linear",
    "addmm",
    "addmv",
    "baddbmm",
    "bmm",
    "convert",
    "converted",
    "deterministic",
    "disable",
    "dot",
    "enable",
    "enabled",
    "float32_products",
    "info",
    "linear",
    "matmul",
    "mm",
    "mm_backward",
    "mv",
    "restore",
    "scaled_mm",
    "strict",
    "vdot",
]
