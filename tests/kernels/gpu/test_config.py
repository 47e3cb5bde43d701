"""is_valid rejects what cannot run; names of kernels are unique."""

from __future__ import annotations

import doctest
import itertools
import subprocess
import sys
from dataclasses import replace

import pytest
from gpu_targets import DTYPE_NAMES, TARGETS

from matmul_grad.kernels.gpu import config as module
from matmul_grad.kernels.gpu.choose import TILES, choose
from matmul_grad.kernels.gpu.config import Problem, Target, TileConfig, is_valid, kernel_name

LAYOUTS = ("NN", "NT", "TN", "TT", "SS", "NS")

GOOD = TileConfig(128, 128, 64, stages=3, warps=8)
HALF = Problem(512, 512, 512, "bfloat16")
EIGHT = Problem(512, 512, 512, "float8_e4m3fn", "N", "T", result="bfloat16")
VECTOR = TileConfig(16, 1, 256, stages=2, warps=4, path="vector")
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
    "parts-too-short": (replace(GOOD, split_k=4), HALF),
    "parts-of-an-invariant-problem": (replace(GOOD, split_k=2), replace(HALF, k=8192, invariant=True)),
    "parts-beyond-the-workspace": (replace(GOOD, split_k=64), replace(HALF, k=1 << 20)),
    "more-programs-than-a-grid-has": (GOOD, replace(HALF, m=128, n=128, batch=2**31)),
    "path": (replace(GOOD, path="textures"), HALF),
    "subtiles-of-pointers": (replace(GOOD, subtiles=2), HALF),
    "tma-of-what-it-cannot-read": (replace(GOOD, path="tma"), HALF),
    "tma-of-fp32": (replace(GOOD, path="tma", block_k=16), replace(HALF, dtype="float32", tma=True)),
    "vector-of-a-matrix": (VECTOR, HALF),
    "vector-of-a-batch": (VECTOR, replace(HALF, n=1, batch=2)),
    "vector-of-an-invariant-problem": (VECTOR, replace(HALF, n=1, invariant=True)),
    "8-bits-not-along-k": (replace(GOOD, block_k=128), replace(EIGHT, b="N")),
    "8-bits-into-8-bits": (replace(GOOD, block_k=128), replace(EIGHT, result="float8_e5m2")),
    "8-bits-of-two-sums-a-register": (TileConfig(128, 256, 128, stages=3, warps=8), EIGHT),
    "vector-of-tf32": (VECTOR, replace(HALF, n=1, dtype="float32", precision="tf32")),
    "dtype": (GOOD, replace(HALF, dtype="int32")),
    "parts-of-an-unknown-dtype": (replace(GOOD, split_k=2), replace(HALF, dtype="int32")),
    "tf32-of-bf16": (GOOD, replace(HALF, precision="tf32")),
    "precision": (GOOD, replace(HALF, dtype="float32", precision="bf16x3")),
}


@pytest.mark.parametrize("case", BAD_TILES)
def test_is_valid_rejects(case: str) -> None:
    tile, problem = BAD_TILES[case]
    assert is_valid(GOOD, HALF, TARGETS["sm90"])
    assert is_valid(replace(GOOD, split_k=2), HALF, TARGETS["sm90"])
    assert is_valid(replace(GOOD, path="tma", subtiles=2), replace(HALF, tma=True), TARGETS["sm90"])
    assert is_valid(TileConfig(128, 128, 128, stages=3, warps=8), EIGHT, TARGETS["sm90"])
    assert not is_valid(TileConfig(128, 128, 128, stages=3, warps=8), EIGHT, TARGETS["sm80"])
    assert is_valid(VECTOR, replace(HALF, n=1), TARGETS["sm90"])
    assert not is_valid(tile, problem, TARGETS["sm90"])


def test_tma_is_valid_on_hopper_and_datacentre_blackwell() -> None:
    tile, problem = TileConfig(64, 64, 64, stages=3, warps=4, path="tma"), replace(HALF, tma=True)
    assert [name for name, target in TARGETS.items() if is_valid(tile, problem, target)] == ["sm90", "sm100"]


def test_is_valid_rejects_a_gpu_before_sm80() -> None:
    assert not is_valid(GOOD, HALF, Target(75, 68, 227 << 10))
    with pytest.raises(ValueError, match="no tile for"):
        choose(HALF, Target(75, 68, 64 << 10))


def test_choose_raises_for_unknown_dtype_and_precision() -> None:
    with pytest.raises(ValueError, match="no GPU kernel for dtype int32"):
        choose(replace(HALF, dtype="int32"), TARGETS["sm90"])
    with pytest.raises(ValueError, match="no tile for"):
        choose(replace(HALF, dtype="float32", precision="bf16x3"), TARGETS["sm90"])


def test_kernel_names_are_unique() -> None:
    names = {
        kernel_name(Problem(1, 1, 1, dtype, letters[0], letters[1], precision), tile)
        for (dtype, precision), letters in itertools.product(DTYPE_NAMES.values(), LAYOUTS)
        for tile in TILES["half", True]
    }
    assert len(names) == len(DTYPE_NAMES) * len(LAYOUTS) * len(TILES["half", True])


def test_doctests() -> None:
    failures, tried = doctest.testmod(module)
    assert (failures, tried > 0) == (0, True)


def test_config_imports_neither_torch_nor_triton() -> None:
    code = "import sys, runpy; runpy.run_path(sys.argv[1]); print({'torch', 'triton'} & set(sys.modules))"
    command = [sys.executable, "-I", "-c", code, str(module.__file__)]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip() == "set()"
