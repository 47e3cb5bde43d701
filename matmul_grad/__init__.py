"""Matrix multiplication and its two gradients as native PyTorch operators, from kernels that people can read."""

from importlib import import_module
from types import ModuleType

from .api import addmm, baddbmm, bmm, mm, mm_backward, scaled_mm
from .aten_override import disable, enable, enabled, info
from .convolution import conv1d, conv2d, conv3d, conv_transpose1d, conv_transpose2d, conv_transpose3d
from .functional import linear, matmul
from .gated import gated_linear
from .grouped import grouped_mm
from .nn import GatedLinear, Linear, convert, converted, restore
from .settings import deterministic, float32_products
from .strict_mode import strict
from .vectors import addmv, dot, mv, vdot

__version__ = "0.1.0"
_MODULES = ("bench", "reference", "testing")
__all__ = [
    "GatedLinear",
    "Linear",
    "addmm",
    "addmv",
    "baddbmm",
    "bmm",
    "conv1d",
    "conv2d",
    "conv3d",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
    "convert",
    "converted",
    "deterministic",
    "disable",
    "dot",
    "enable",
    "enabled",
    "float32_products",
    "gated_linear",
    "grouped_mm",
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


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})


def __getattr__(name: str) -> ModuleType:
    """The modules that are loaded when they are first used."""
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
