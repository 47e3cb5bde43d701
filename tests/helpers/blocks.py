"""Configurations of the driver to test: every dtype on every instruction set here, and small blocks."""

from __future__ import annotations

import dataclasses

import pytest

from matmul_grad.kernels.cpu import driver, host
from matmul_grad.kernels.cpu.config import BlockConfig, choose

DTYPES = ("float32", "float64", "bfloat16", "float16")


def small(block: BlockConfig) -> BlockConfig:
    """The same tile in blocks of a few tiles, so that every loop and path runs more than once on small matrices."""
    return dataclasses.replace(
        block,
        mc=2 * block.mr,
        kc=block.chain,
        nc=2 * block.nr,
        chunk=2 * block.chain,
        partial_lanes=3 * block.mr * block.nr,
        aliased_rows=0,
        sequential_bytes=0,
    )


def blocks() -> list[BlockConfig]:
    chosen = []
    for isa in host.host_isas():
        cpu = host.cpu(isa)
        chosen += [choose(dtype, cpu) for dtype in DTYPES if dtype != "float16" or cpu.has_fp16_convert]
    return [*chosen, small(driver.config("float32")), small(driver.config("bfloat16"))]


def parameters(*more: BlockConfig) -> list:
    return [pytest.param(block, id=f"{block.name}-{block.mc}x{block.kc}x{block.nc}") for block in (*blocks(), *more)]
