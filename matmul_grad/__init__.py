"""Matrix multiplication and its two gradients as native PyTorch operators, from kernels that people can read."""

from .api import mm, mm_backward
from .override import disable, enable, enabled, info
from .strictness import strict

__version__ = "0.1.0"
__all__ = ["disable", "enable", "enabled", "info", "mm", "mm_backward", "strict"]
