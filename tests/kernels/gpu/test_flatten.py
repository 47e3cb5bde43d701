"""The persistent loop of gemm_tma: one loop over tiles and k, barriers made once, as many blocks as the model has."""

from __future__ import annotations

import itertools
from dataclasses import replace

import aot
import pytest

from matmul_grad.kernels.gpu.arguments import Strides
from matmul_grad.kernels.gpu.choose import FP8_TMA_TILES, TMA_TILES
from matmul_grad.kernels.gpu.config import RESERVED_BYTES, Problem, TileConfig, is_valid, resident_blocks
from matmul_grad.kernels.gpu.epilogue import Epilogue
from matmul_grad.kernels.gpu.gemm import gemm
from matmul_grad.kernels.gpu.plan import REGISTERS, Plan, plans

N = 4096
TYPES = {"a": "bf16", "b": "bf16", "c": "bf16", "source": "bf16", "work": "fp32"}
STRIDES = {"N": Strides(N, 1), "T": Strides(1, N)}
PERSISTENT = [tile for tile in TMA_TILES if tile.block_m * tile.block_n == 128 * 256]
SEVERAL = [tile for tile in TMA_TILES if tile not in PERSISTENT]

compiles = pytest.mark.skipif(
    not isinstance(gemm, aot.triton.JITFunction), reason="TRITON_INTERPRET is set for the whole session"
)


def problem_of(letters: str) -> Problem:
    return Problem(N, N, N, "bfloat16", letters[0], letters[1], tma=True)


def plan_of(
    tile: TileConfig, letters: str, arch: int, epilogue: Epilogue | None = None, store_tma: bool = True
) -> Plan:
    target, problem = aot.target_of(arch), problem_of(letters)
    assert is_valid(tile, problem, target)
    strides = STRIDES[letters[0]], STRIDES[letters[1]], STRIDES["N"]
    return plans(problem, tile, target, strides, store_tma=store_tma, epilogue=epilogue)[0]


def loops_around(operation: str, ttgir: str) -> set[int]:
    """In how many loops each occurrence of an operation is."""
    blocks: list[bool] = []
    found = set()
    for line in ttgir.splitlines():
        if f"{operation} " in line:
            found.add(sum(blocks))
        change = line.count("{") - line.count("}")
        blocks += ["scf.for" in line] * max(change, 0)
        del blocks[len(blocks) + min(change, 0) :]
    return found


def loops(kernel: aot.CompiledReport, arch: int) -> tuple[set[int], set[int]]:
    """Around the multiplication, and around the making of barriers."""
    unit = "ttng.warp_group_dot" if arch == 90 else "ttng.tc_gen5_mma"
    return loops_around(unit, kernel.ttgir), loops_around("ttng.init_barrier", kernel.ttgir)


def assert_fits(kernel: aot.CompiledReport, tile: TileConfig, arch: int) -> None:
    """No spill, and so many blocks on a multiprocessor as `resident_blocks` has it."""
    target = aot.target_of(arch)
    blocks = resident_blocks(tile, problem_of("NN"), target)
    assert kernel.spills == 0
    assert blocks * 32 * tile.warps * kernel.registers <= REGISTERS, kernel.registers
    assert blocks * (kernel.shared + RESERVED_BYTES) <= target.shared_bytes + RESERVED_BYTES, kernel.shared


def test_loops_around_counts_loops_alone() -> None:
    text = (
        "a {\n scf.for x {\n  scf.if y {\n   op 1 {z = 2}\n  } else {\n  }\n  scf.for z {\n   op 2\n  }\n }\n op 3\n}"
    )
    assert loops_around("op", text) == {0, 1, 2}
    assert loops_around("no", text) == set()


@compiles
@pytest.mark.parametrize("letters", ["NN", "NT", "TN", "TT"])
@pytest.mark.parametrize(("arch", "tile"), list(itertools.product((90, 100), PERSISTENT)), ids=str)
def test_persistent_loop_is_one_loop(arch: int, tile: TileConfig, letters: str) -> None:
    kernel = aot.compile_for(plan_of(tile, letters, arch), TYPES, arch)
    dots, barriers = loops(kernel, arch)
    assert 1 in dots and 2 not in dots  # sm_100 peels the first step
    assert barriers == {0}
    assert_fits(kernel, tile, arch)


ROW, MATRIX, ALPHA = Epilogue(source=Strides(0, 1)), Epilogue(source=Strides(N, 1)), Epilogue(alpha=2)


@compiles
@pytest.mark.parametrize("epilogue", [ROW, ALPHA], ids=["row", "alpha"])
@pytest.mark.parametrize("store_tma", [True, False], ids=["tma", "rows"])
def test_a_row_to_add_and_alpha_are_flattened_too(store_tma: bool, epilogue: Epilogue) -> None:
    tile = PERSISTENT[0]
    kernel = aot.compile_for(plan_of(tile, "NT", 90, epilogue, store_tma), TYPES, 90)
    assert loops(kernel, 90) == ({1}, {0})
    assert_fits(kernel, tile, 90)


@compiles
@pytest.mark.parametrize("tile", PERSISTENT, ids=str)
def test_alpha_alone_fits_on_sm_100(tile: TileConfig) -> None:
    """As one loop it would take 245,808 bytes of shared memory."""
    assert_fits(aot.compile_for(plan_of(tile, "NT", 100, ALPHA), TYPES, 100), tile, 100)


@compiles
@pytest.mark.parametrize(("arch", "tile"), list(itertools.product((90, 100), SEVERAL)), ids=str)
def test_several_blocks_of_smaller_tiles_are_resident(arch: int, tile: TileConfig) -> None:
    """They overlap each other, so their loops stay two."""
    assert resident_blocks(tile, problem_of("NN"), aot.target_of(arch)) > 1
    kernel = aot.compile_for(plan_of(tile, "NT", arch), TYPES, arch)
    assert max(loops(kernel, arch)[0]) == 2
    assert_fits(kernel, tile, arch)


def test_what_is_flattened_and_how_many_programs_there_are() -> None:
    """Programs of a tile that fills a multiprocessor: one each, at most one a tile."""
    large, small = PERSISTENT[0], SEVERAL[0]
    target = aot.target_of(90)
    assert [plan_of(tile, "NN", 90).constants["FLATTEN"] for tile in (large, small)] == [True, False]
    assert not plan_of(large, "NN", 90, MATRIX).constants["FLATTEN"]
    assert [plan_of(large, "NN", 100, epilogue).constants["FLATTEN"] for epilogue in (ROW, ALPHA)] == [False, False]
    eight = replace(problem_of("NT"), dtype="float8_e4m3fn", result="bfloat16"), FP8_TMA_TILES[1]
    assert is_valid(eight[1], eight[0], target) and resident_blocks(eight[1], eight[0], target) == 1
    (plan,) = plans(*eight, target, (STRIDES["N"], STRIDES["T"], STRIDES["N"]), store_tma=True)
    assert not plan.constants["FLATTEN"]
    split = replace(large, split_k=4), replace(problem_of("NN"), m=512)
    assert is_valid(*split, target)
    assert not plans(split[1], split[0], target, (STRIDES["N"],) * 3)[0].constants["FLATTEN"]
    for m, programs in ((128, 16), (128 * 12, target.sms), (128 * 8, 128), (N, target.sms)):
        problem = replace(problem_of("NN"), m=m)
        (plan,) = plans(problem, large, target, (STRIDES["N"],) * 3, store_tma=True)
        assert plan.programs == programs
    (plan,) = plans(problem_of("NN"), small, target, (STRIDES["N"],) * 3, store_tma=True)
    assert plan.programs == (N // small.block_m) * (N // small.block_n)
