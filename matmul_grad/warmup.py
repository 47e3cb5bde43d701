"""Compile every CPU kernel before it is needed; where they are in the cache, load them."""

from __future__ import annotations

from collections.abc import Callable

from . import ops

__all__ = ["steps"]


def steps() -> list[tuple[str, Callable[[], object]]]:
    """What there is to compile: a name and the call that does it, each for itself.

    >>> names = [name for name, compile_kernel in steps()]
    >>> names[0], len(names) > 1
    ('operator', True)
    """
    from .kernels.cpu import config, driver

    def gemm(dtype: str) -> tuple[str, Callable[[], object]]:
        block = driver.config(dtype)
        return block.name, lambda: driver.gemm_address(block)

    return [("operator", ops.native_status), *(gemm(dtype) for dtype in config.SIZES)]
