"""Every tile that choose can return compiles for sm_80, sm_90 and sm_100 into what was meant."""

from __future__ import annotations

import itertools
import re
from typing import NamedTuple

import pytest

from matmul_grad.kernels.gpu import aot
from matmul_grad.kernels.gpu.config import (
    ITEM_BYTES,
    SHORT_NAMES,
    TILES,
    Problem,
    TileConfig,
    choose,
    kernel_name,
    kind,
    shared_bytes,
)

pytestmark = pytest.mark.skipif(
    not isinstance(aot.gemm, aot.triton.JITFunction), reason="TRITON_INTERPRET is set for the whole session"
)

ARCHES = (80, 90, 100)
TRITON = tuple(int(part) for part in aot.triton.__version__.split(".")[:2])
NUMBERS = (("bfloat16", "ieee"), ("float32", "tf32"), ("float32", "ieee"), ("float64", "ieee"))
DENSE = ("NN", "NT", "TN", "TT")

# The matrix unit of each architecture; there is none for IEEE float32, and the oldest serves float64.
INSTRUCTIONS = {
    (80, "half"): r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.(bf16\.bf16|f16\.f16)\.f32",
    (90, "half"): r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k16\.f32\.(bf16\.bf16|f16\.f16)",
    (100, "half"): r"tcgen05\.mma\.cta_group::1\.kind::f16",
    (80, "tf32"): r"mma\.sync\.aligned\.m16n8k8\.row\.col\.f32\.tf32\.tf32\.f32",
    (90, "tf32"): r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k8\.f32\.tf32\.tf32",
    (100, "tf32"): r"tcgen05\.mma\.cta_group::1\.kind::tf32",
    **{(arch, "fp32"): r"fma\.rn\.f32(x2)?" for arch in ARCHES},
    **{(arch, "fp64"): r"mma\.sync\.aligned\.m\d+n8k\d+\.row\.col\.f64\.f64\.f64\.f64" for arch in ARCHES},
    # Before 3.9, Triton does not use the float64 matrix unit of sm_100.
    **({(100, "fp64"): r"fma\.rn\.f64"} if TRITON < (3, 9) else {}),
}

# Sizes that reach every tile: skinny, a few tiles, about one wave, many waves.
SIZES = (1, 16, 256, 512, 1024, 1536, 2048, 4096, 8192)


class Case(NamedTuple):
    arch: int
    problem: Problem
    tile: TileConfig

    def __str__(self) -> str:
        number = "tf32" if self.problem.precision == "tf32" else SHORT_NAMES[self.problem.dtype]
        shape = f"{self.tile.block_m}x{self.tile.block_n}x{self.tile.block_k}"
        loads = "" if self.problem.aligned else "-unaligned"
        return f"aot-sm{self.arch}-{number}-{self.problem.a}{self.problem.b}-{shape}{loads}"


def chosen(arch: int, dtype: str, precision: str, aligned: bool) -> list[TileConfig]:
    """The distinct tiles that choose returns, the largest first."""
    problems = [Problem(m, n, 4096, dtype, "N", "N", precision, aligned) for m in SIZES for n in SIZES]
    found = {choose(problem, aot.target_of(arch)) for problem in problems}
    return [tile for tile in TILES[kind(problems[0]), aligned] if tile in found]


def cases() -> list[Case]:
    """Every chosen tile once, the layouts in turn; the largest 16-bit tile in all four, and in float16."""
    found, turn = [], itertools.count()
    for arch, (dtype, precision), aligned in itertools.product(ARCHES, NUMBERS, (True, False)):
        layouts = DENSE if aligned else (*DENSE, "SS")
        for position, tile in enumerate(chosen(arch, dtype, precision, aligned)):
            every = position == 0 and aligned and dtype == "bfloat16"
            for letters in DENSE if every else [layouts[next(turn) % len(layouts)]]:
                problem = Problem(4096, 4096, 4096, dtype, letters[0], letters[1], precision, aligned)
                found.append(Case(arch, problem, tile))
            if every:
                found.append(Case(arch, Problem(4096, 4096, 4096, "float16", "N", "T"), tile))
    return found


@pytest.mark.parametrize("case", cases(), ids=str)
def test_compiles_into_what_was_meant(case: Case) -> None:
    arch, problem, tile = case
    target = aot.target_of(arch)
    report = aot.compile_for(problem, tile, arch)
    assert report.name == kernel_name(problem, tile)
    assert re.fullmatch(INSTRUCTIONS[arch, kind(problem)], report.instruction), report
    assert report.spills == 0, report
    assert 0 < report.registers <= 255, report
    assert 0 < report.shared <= shared_bytes(tile, problem, target) <= target.shared_bytes, report
    assert report.load_bytes == (16 if problem.aligned else ITEM_BYTES[problem.dtype]), report


def test_the_cases_reach_every_layout_and_kind() -> None:
    found = cases()
    assert {(case.arch, kind(case.problem), case.problem.aligned) for case in found} == set(
        itertools.product(ARCHES, ("half", "tf32", "fp32", "fp64"), (True, False))
    )
    assert {case.problem.a + case.problem.b for case in found} == {*DENSE, "SS"}
    assert len({str(case) for case in found}) == len(found)


def test_a_tile_that_is_too_large_spills() -> None:
    """The reading of spills is not blind: 128 x 256 accumulators do not fit four warps."""
    problem = Problem(4096, 4096, 4096, "bfloat16", "N", "T")
    assert aot.compile_for(problem, TileConfig(128, 256, 32, stages=2, warps=4), 80).spills > 0
