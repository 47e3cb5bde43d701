"""choose is pure, total and valid over every shape that matters; is_valid rejects what cannot run."""

from __future__ import annotations

import doctest
import itertools
import subprocess
import sys
from dataclasses import replace

import pytest

from matmul_grad.kernels.gpu import config as module
from matmul_grad.kernels.gpu.config import (
    TILES,
    Problem,
    Target,
    TileConfig,
    choose,
    is_valid,
    kernel_name,
    kind,
)

TARGETS = {
    "sm80": Target(80, 108, 163 << 10),
    "sm86": Target(86, 84, 99 << 10),
    "sm89": Target(89, 128, 99 << 10),
    "sm90": Target(90, 132, 227 << 10),
    "sm100": Target(100, 148, 227 << 10),
    "sm120": Target(120, 170, 99 << 10),
}
NUMBERS = {
    "fp16": ("float16", "ieee"),
    "bf16": ("bfloat16", "ieee"),
    "fp32": ("float32", "ieee"),
    "tf32": ("float32", "tf32"),
    "fp64": ("float64", "ieee"),
}
LAYOUTS = ("NN", "NT", "TN", "TT", "SS", "NS")

CUBES = [(n, n, n) for n in (64, 128, 256, 512, 1024, 2048, 4096)]
TOKENS = (1, 8, 32, 128, 512, 2048, 8192)
WEIGHTS = (
    (768, 768), (3072, 768), (768, 3072), (6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336),
    (4608, 3584), (37888, 3584), (3584, 18944),
)  # fmt: skip
DEEPGEMM = ((2112, 7168), (576, 7168), (24576, 1536), (32768, 512), (7168, 16384), (4096, 7168), (7168, 2048))
ODD = [(4095, 4095, 4095), (4097, 4097, 4097), (1000, 1000, 1000), (257, 129, 513), (16, 2, 30_000_000)]
SMALL = list(itertools.product((0, 1, 17, 64, 129), repeat=3))
HUGE = [(2**31, 1, 1), (1, 2**31, 1), (1, 1, 2**31), (2**40, 1, 2**40)]
FORWARD = (
    CUBES
    + [(tokens, n, k) for tokens in TOKENS for n, k in WEIGHTS]
    + [(m, n, k) for m in (1, 128, 4096) for n, k in DEEPGEMM]
    + ODD
)
# dgrad is (m, n) . (n, k), wgrad is (k, m) . (m, n).
SHAPES = [product for m, n, k in FORWARD for product in ((m, n, k), (m, k, n), (k, n, m))] + SMALL + HUGE


def problems(number: str) -> list[Problem]:
    dtype, precision = NUMBERS[number]
    return [
        Problem(m, n, k, dtype, letters[0], letters[1], precision, aligned)
        for (m, n, k), letters, aligned in itertools.product(SHAPES, ("NN", "TS"), (True, False))
    ]


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("arch", TARGETS)
def test_choose_is_total_and_valid(arch: str, number: str) -> None:
    target = TARGETS[arch]
    chosen = {problem: choose(problem, target) for problem in problems(number)}
    assert [problem for problem, tile in chosen.items() if not is_valid(tile, problem, target)] == []
    assert {tile.block_k for tile in chosen.values()} == {next(iter(chosen.values())).block_k}


@pytest.mark.parametrize("number", NUMBERS)
def test_choose_is_pure(number: str) -> None:
    first = [choose(problem, TARGETS["sm90"]) for problem in problems(number)]
    choose.cache_clear()
    again = [choose(problem, TARGETS["sm90"]) for problem in reversed(problems(number))]
    assert first == again[::-1]


@pytest.mark.parametrize("number", NUMBERS)
def test_every_tile_is_chosen_somewhere(number: str) -> None:
    dtype, precision = NUMBERS[number]
    for aligned in (True, False):
        listed = set(TILES[kind(Problem(1, 1, 1, dtype, precision=precision)), aligned])
        used = {
            choose(problem, target)
            for target in TARGETS.values()
            for problem in problems(number)
            if problem.aligned == aligned
        }
        assert used == listed


def test_a_large_problem_gets_a_large_tile_and_a_small_one_fills_the_gpu() -> None:
    target = TARGETS["sm90"]
    large = choose(Problem(8192, 8192, 8192, "bfloat16"), target)
    assert large == TileConfig(128, 256, 64, stages=3, warps=8)
    assert choose(Problem(1, 4096, 4096, "bfloat16"), target).block_n == 64


GOOD = TileConfig(128, 128, 64, stages=3, warps=8)
HALF = Problem(512, 512, 512, "bfloat16")
BAD_TILES = {
    "block_m-not-a-power-of-2": (replace(GOOD, block_m=96), HALF),
    "block_n-below-16": (replace(GOOD, block_n=8), HALF),
    "block_k-below-16": (replace(GOOD, block_k=8), HALF),
    "block_k-zero": (replace(GOOD, block_k=0), HALF),
    "block_m-below-wgmma": (replace(GOOD, block_m=32), HALF),
    "warps-not-a-power-of-2": (replace(GOOD, warps=6), HALF),
    "warps-below-a-warpgroup": (replace(GOOD, block_m=64, block_n=16, warps=2), HALF),
    "stages-zero": (replace(GOOD, stages=0), HALF),
    "shared-memory": (replace(GOOD, stages=8), HALF),
    "shared-memory-of-c": (replace(GOOD, block_m=256, block_k=16, warps=16), replace(HALF, dtype="float64")),
    "accumulators": (replace(GOOD, block_m=256, block_n=256, stages=1), HALF),
    "accumulators-fp64": (replace(GOOD, block_k=16, warps=4), replace(HALF, dtype="float64")),
    "group_m-zero": (replace(GOOD, group_m=0), HALF),
    "split_k": (replace(GOOD, split_k=2), HALF),
    "dtype": (GOOD, replace(HALF, dtype="int32")),
    "tf32-of-bf16": (GOOD, replace(HALF, precision="tf32")),
    "precision": (GOOD, replace(HALF, dtype="float32", precision="bf16x3")),
}


@pytest.mark.parametrize("case", BAD_TILES)
def test_is_valid_rejects(case: str) -> None:
    tile, problem = BAD_TILES[case]
    assert is_valid(GOOD, HALF, TARGETS["sm90"])
    assert not is_valid(tile, problem, TARGETS["sm90"])


def test_is_valid_rejects_a_gpu_before_sm80() -> None:
    assert not is_valid(GOOD, HALF, Target(75, 68, 227 << 10))
    with pytest.raises(ValueError, match="no tile for"):
        choose(HALF, Target(75, 68, 64 << 10))


def test_choose_names_what_it_does_not_know() -> None:
    with pytest.raises(ValueError, match="no GPU kernel for dtype int32"):
        choose(replace(HALF, dtype="int32"), TARGETS["sm90"])
    with pytest.raises(ValueError, match="no tile for"):
        choose(replace(HALF, dtype="float32", precision="bf16x3"), TARGETS["sm90"])


def test_names_tell_kernels_apart() -> None:
    names = {
        kernel_name(Problem(1, 1, 1, dtype, letters[0], letters[1], precision), tile)
        for (dtype, precision), letters in itertools.product(NUMBERS.values(), LAYOUTS)
        for tile in TILES["half", True]
    }
    assert len(names) == len(NUMBERS) * len(LAYOUTS) * len(TILES["half", True])


def test_doctests() -> None:
    failures, tried = doctest.testmod(module)
    assert (failures, tried > 0) == (0, True)


def test_config_imports_neither_torch_nor_triton() -> None:
    code = "import sys, runpy; runpy.run_path(sys.argv[1]); print({'torch', 'triton'} & set(sys.modules))"
    command = [sys.executable, "-I", "-c", code, str(module.__file__)]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip() == "set()"
