"""Every kernel that choose can ask for compiles for sm_80, 90, 100 and 120 into what was meant, without spills."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import aot
import pytest
from aot import ARCHES, INSTRUCTIONS, TRITON
from gpu_targets import DENSE, DTYPE_NAMES

from matmul_grad.kernels.gpu.arguments import Strides
from matmul_grad.kernels.gpu.choose import FP8_TMA_TILES, GROUPS, TILES, TMA_TILES, VECTOR_TILES, is_valid_backward
from matmul_grad.kernels.gpu.config import (
    ITEM_BYTES,
    SHORT_NAMES,
    Problem,
    TileConfig,
    is_valid,
    kernel_name,
    kind,
    shared_bytes,
)
from matmul_grad.kernels.gpu.epilogue import SCALARS, Epilogue
from matmul_grad.kernels.gpu.gemm import gemm
from matmul_grad.kernels.gpu.patches import gemm_patches
from matmul_grad.kernels.gpu.plan import Plan, backward_plan, plans
from matmul_grad.kernels.gpu.reduce import reduce
from matmul_grad.kernels.gpu.tma import gemm_tma
from matmul_grad.kernels.gpu.vector import matvec

pytestmark = pytest.mark.skipif(
    not isinstance(gemm, aot.triton.JITFunction), reason="TRITON_INTERPRET is set for the whole session"
)

NUMBERS = [DTYPE_NAMES[name] for name in ("bf16", "tf32", "tf32x3", "fp32", "fp64")]
N = 4096  # divides by all that alignment asks for
SPLITS = 4

# Triton 3.8.0 alone keeps two or four registers too many, outside of the loop, where it adds a row to narrow loads.
SPILLS = (
    {f"gemm_nt_tf32x3_64x64x32_s3_w8_addmm-row-unaligned@sm_{arch}": spilled for arch, spilled in ((80, 8), (120, 16))}
    if TRITON == (3, 8)
    else {}
)

SOURCES = {
    "matrix": Strides(N, 1),
    "transposed": Strides(1, N),
    "row": Strides(0, 1),
    "column": Strides(1, 0),
    "none": None,
}
"""The sources of an epilogue: N x N elements, one row or one column of them, nothing."""


class Case(NamedTuple):
    arch: int
    problem: Problem
    tile: TileConfig
    plan: Plan
    source: str = ""
    slow: bool = False
    activation: str = ""

    @property
    def name(self) -> str:
        return self.plan.constants["NAME"]

    def __str__(self) -> str:
        loads = "" if self.problem.aligned or self.tile.path == "vector" else "-unaligned"
        batch = "-batch" if self.problem.batch > 1 else ""
        grad = {True: "-grad_t", False: "-grad_n", None: ""}[self.plan.constants.get("GRAD_TRANSPOSED")]
        source = f"-{self.source}" if self.source else ""
        pre = "-pre" if self.activation else ""
        rows = "-rows" if (self.source or pre) and self.tile.path == "tma" and self.plan.arguments[2] is None else ""
        result = "-float32" if self.problem.result == "float32" else ""
        return f"{self.name}{grad}{source}{pre}{rows}{result}{batch}{loads}@sm_{self.arch}"


def strides_of(letter: str, batch: int = 1) -> Strides:
    """N x N elements: rows together, columns together, or neither."""
    row, col = {"N": (N, 1), "T": (1, N), "S": (2 * N, 2)}[letter]
    return Strides(row, col, N * N if batch > 1 else 0)


def problem_of(dtype: str, precision: str, letters: str, aligned: bool = True, batch: int = 1) -> Problem:
    tma = aligned and ITEM_BYTES[dtype] == 2
    return Problem(N, N, N, dtype, letters[0], letters[1], precision, aligned, tma, batch)


def cases_of(
    arch: int,
    problem: Problem,
    tile: TileConfig,
    source: str = "",
    slow: bool = False,
    store_tma: bool = True,
    activation: str = "",
) -> list[Case]:
    target = aot.target_of(arch)
    if not is_valid(tile, problem, target):
        return []
    strides = strides_of(problem.a, problem.batch), strides_of(problem.b, problem.batch), strides_of("N", problem.batch)
    if not problem.aligned:  # what does not divide by 16 takes narrow loads
        strides = tuple(
            Strides(*(x + 1 if x > 1 else x for x in matrix[:2]), matrix.batch)
            for matrix in strides
        )  # fmt: skip
    epilogue = Epilogue(1, 1, SOURCES[source], activation, bool(activation)) if source else None
    made = plans(problem, tile, target, strides, store_tma=store_tma, epilogue=epilogue)
    return [Case(arch, problem, tile, plan, source, slow, activation) for plan in made]


def products() -> Iterator[Case]:
    """Every tile, in alternating layouts; the largest 16-bit ones in all four, with split k, batches, float16.

    Of a kind the first tile that fits an architecture, and each tile for one architecture; the rest is slow.
    """
    index = itertools.count()
    ran: set[tuple[str, bool, int | TileConfig]] = set()
    for arch, (dtype, precision), aligned in itertools.product(ARCHES, NUMBERS, (True, False)):
        layouts = DENSE if aligned else (*DENSE, "SS")
        half = dtype == "bfloat16" and aligned
        kind_of = kind(problem_of(dtype, precision, "NN", aligned))
        for position, tile in enumerate([*(TMA_TILES if half else ()), *TILES[kind_of, aligned]]):
            every = half and (position == 0 or tile == TILES[kind_of, aligned][0])
            for letters in DENSE if every else [layouts[next(index) % len(layouts)]]:
                slow = not every and ran >= {(kind_of, aligned, tile), (kind_of, aligned, arch)}
                yield from cases_of(arch, problem_of(dtype, precision, letters, aligned), tile, slow=slow)
            if is_valid(tile, problem_of(dtype, precision, letters, aligned), aot.target_of(arch)):
                ran |= {(kind_of, aligned, tile), (kind_of, aligned, arch)}
            if aligned and (every or position == 0):
                yield from cases_of(arch, problem_of(dtype, precision, "NT"), replace(tile, split_k=SPLITS))
                yield from cases_of(arch, problem_of(dtype, precision, "NN", batch=8), tile)
            if every:
                yield from cases_of(arch, problem_of("float16", "ieee", "NT"), tile)
                yield from cases_of(arch, problem_of(dtype, precision, "NN"), replace(tile, group_m=GROUPS[-1]))


def epilogues() -> Iterator[Case]:
    """Every TMA tile with a matrix to add, which costs most registers, and the first with all else.

    Of the others the first of a kind; the rest are slow.
    """
    for arch, tile in itertools.product((90, 100), TMA_TILES):
        problem = problem_of("bfloat16", "ieee", "NT")
        yield from cases_of(arch, problem, tile, "matrix")
        yield from cases_of(arch, problem, tile, "matrix", arch == 90, store_tma=False)
        yield from cases_of(arch, problem, tile, "row", True, store_tma=False)
        for source in SOURCES if tile == TMA_TILES[0] else ():
            if source != "matrix":
                yield from cases_of(arch, problem, tile, source, slow=arch != 90 and source != "none")
    for arch, (dtype, precision), aligned in itertools.product(ARCHES, NUMBERS, (True, False)):
        kind_of = kind(problem_of(dtype, precision, "NN", aligned))
        for position, tile in enumerate(TILES[kind_of, aligned]):
            slow = position > 0 or not aligned
            yield from cases_of(arch, problem_of(dtype, precision, "NN", aligned), tile, "matrix", slow)
            yield from cases_of(arch, problem_of(dtype, precision, "NT", aligned), tile, "row", True)
        split = replace(TILES[kind_of, True][-1], split_k=SPLITS)
        if aligned:
            yield from cases_of(arch, problem_of(dtype, precision, "NN"), split, "matrix", arch != 90)[1:]
    for arch, (letter, tile), dtype in itertools.product(ARCHES, VECTOR_TILES.items(), ("bfloat16", "float64")):
        problem = replace(problem_of(dtype, "ieee", letter + "N"), n=1)
        yield from cases_of(arch, problem, tile, "matrix", letter != "N" or arch != 90)


def sums() -> Iterator[Case]:
    """Weight gradients of 16-bit operands, added to in float32: every tile that may be chosen; every second is slow."""
    index = itertools.count()
    for arch, aligned in itertools.product(ARCHES, (True, False)):
        problem = replace(problem_of("bfloat16", "ieee", "TN", aligned), result="float32")
        for tile in [*(TMA_TILES if problem.tma else ()), *TILES["half", aligned]]:
            yield from cases_of(arch, problem, tile, "matrix", next(index) % 2 == 1)
        split = replace(TILES["half", True][-1], split_k=SPLITS)
        yield from cases_of(arch, problem, split, "matrix", True)[1:] if aligned else []


def activations() -> Iterator[Case]:
    """Every tile with a row to add, gelu, which takes most registers, and its argument, which is stored too.

    Of the others the first tile; those that are not the first of a kind are slow.
    """
    for arch, (position, tile) in itertools.product((90, 100), enumerate(TMA_TILES)):
        problem = problem_of("bfloat16", "ieee", "NT")
        yield from cases_of(arch, problem, tile, "row", position > 0, activation="gelu")
        yield from cases_of(arch, problem, tile, "row", arch != 90 or position > 0, False, "gelu")
        for name in ("relu", "gelu_tanh", "silu", "tanh") if position == 0 else ():
            yield from cases_of(arch, problem, tile, "row", arch != 90, activation=name)
    for arch, (dtype, precision), aligned in itertools.product(ARCHES, NUMBERS, (True, False)):
        kind_of = kind(problem_of(dtype, precision, "NN", aligned))
        for position, tile in enumerate(TILES[kind_of, aligned]):
            slow = position > 0 or not aligned or arch in (100, 120)
            yield from cases_of(arch, problem_of(dtype, precision, "NN", aligned), tile, "row", slow, activation="gelu")
    for arch, tile in itertools.product(ARCHES, (TILES["half", True][-1],)):
        split = replace(tile, split_k=SPLITS)
        yield from cases_of(arch, problem_of("bfloat16", "ieee", "NN"), split, "row", arch != 90, activation="gelu")[1:]
        problem = replace(problem_of("bfloat16", "ieee", "NN"), n=1)
        yield from cases_of(arch, problem, VECTOR_TILES["N"], "row", arch != 90, activation="gelu")


def scaled() -> Iterator[Case]:
    """8-bit operands of every tile; the first also with k split."""
    for arch, (position, tile) in itertools.product((90, 100), enumerate((*FP8_TMA_TILES, *TILES["fp8", True]))):
        problem = replace(problem_of("float8_e4m3fn", "ieee", "NT"), tma=True, result="bfloat16")
        yield from cases_of(arch, problem, tile)
        if position == 1:
            yield from cases_of(arch, problem, replace(tile, split_k=SPLITS))
            yield from cases_of(arch, replace(problem, dtype="float8_e5m2"), tile)


def vectors() -> Iterator[Case]:
    dtypes = [dtype for dtype, item in ITEM_BYTES.items() if item > 1]
    for arch, (letter, tile), dtype in itertools.product(ARCHES, VECTOR_TILES.items(), dtypes):
        problem = replace(problem_of(dtype, "ieee", letter + "N"), n=1)
        yield from cases_of(arch, problem, tile)


def backwards() -> Iterator[Case]:
    """Every tile, in every layout of a, b and dC that one launch may serve; two of each in turn, the rest are slow."""
    index = itertools.count()
    for arch, tile in itertools.product((90, 100), TMA_TILES):
        target, problem = aot.target_of(arch), problem_of("bfloat16", "ieee", "NN")
        valid = [
            letters
            for letters in map("".join, itertools.product("NT", repeat=3))
            if is_valid_backward(tile, replace(problem, a=letters[0], b=letters[1]), letters[2], target)
        ]
        two = {valid[next(index) % len(valid)] for _ in range(2)}
        for letters in valid:
            strides = strides_of(letters[0]), strides_of(letters[1]), strides_of(letters[2])
            of_layout = replace(problem, a=letters[0], b=letters[1])
            plan = backward_plan(of_layout, tile, target, strides)
            yield Case(arch, of_layout, tile, plan, slow=letters not in two)


CASES = {
    str(case): case
    for case in (*products(), *sums(), *scaled(), *vectors(), *backwards(), *epilogues(), *activations())
}


def compiled(case: Case) -> aot.CompiledReport:
    short = SHORT_NAMES[case.problem.dtype]
    acc = "fp64" if case.problem.dtype == "float64" else "fp32"
    types = dict.fromkeys(("a", "b", "c", "source", "pre", "grad", "da", "db"), short)
    types |= dict.fromkeys(("work", "scale_a", "scale_b"), acc)
    if case.problem.result:
        types["c"] = types["source"] = SHORT_NAMES[case.problem.result]
    return aot.compile_for(case.plan, types, case.arch)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * case.slow) for name, case in CASES.items()]
)
def test_kernel_compiles_to_the_expected_instruction_without_spills(name: str) -> None:
    case = CASES[name]
    arch, problem, tile, *_ = case
    report, target = compiled(case), aot.target_of(arch)
    assert report.name == case.name
    assert report.spills <= SPILLS.get(name, 0), report
    assert 0 < report.registers <= 255, report
    assert report.shared <= target.shared_bytes, report
    if not case.name.startswith("reduce"):
        assert report.shared <= shared_bytes(tile, problem, target), report
        unit = kind(problem).removesuffix("x3")
        expected = r"fma\.rn\.f(32|64)(x2)?" if tile.path == "vector" else INSTRUCTIONS[arch, unit]
        assert re.fullmatch(expected, report.instruction), report
    if tile.path == "pointers" and not case.name.startswith("reduce") and not problem.result and not case.source:
        assert report.load_bytes == (16 if problem.aligned else ITEM_BYTES[problem.dtype]), report
    if tile.path == "tma" and tile.split_k == 1 and not problem.result and not case.source:
        assert report.load_bytes == 0, report


@pytest.mark.parametrize("slow", [False, True], ids=["the default suite", "all"])
def test_cases_cover_every_tile_layout_and_kind(slow: bool) -> None:
    found = [case for case in CASES.values() if slow or not case.slow]
    aligned = {(case.arch, kind(case.problem), case.problem.aligned) for case in found}
    kinds = ("half", "tf32", "tf32x3", "fp32", "fp64")
    assert aligned == set(itertools.product(ARCHES, kinds, (True, False))) | {(90, "fp8", True), (100, "fp8", True)}
    assert {case.problem.a + case.problem.b for case in found} >= {*DENSE, "SS"}
    listed = {tile for tiles in TILES.values() for tile in tiles} | {*TMA_TILES, *FP8_TMA_TILES, *VECTOR_TILES.values()}
    assert {replace(case.tile, split_k=1, group_m=GROUPS[0]) for case in found} == listed


def test_tile_that_is_too_large_is_reported_to_spill() -> None:
    """The reading of spills is not blind: 128 x 256 accumulators do not fit four warps."""
    problem, tile = problem_of("bfloat16", "ieee", "NT"), TileConfig(128, 256, 32, stages=2, warps=4)
    target, strides = aot.target_of(80), (strides_of("N"), strides_of("T"), strides_of("N"))
    (plan,) = plans(problem, tile, target, strides)
    assert compiled(Case(80, problem, tile, plan)).spills > 0
    assert kernel_name(problem, tile) == plan.constants["NAME"]


@pytest.mark.parametrize(("dtype", "bits", "rounds"), [("bfloat16", 32, True), ("float64", 64, False)])
def test_epilogue_is_one_multiply_add_and_float64_keeps_its_scalars(dtype: str, bits: int, rounds: bool) -> None:
    problem, target = problem_of(dtype, "ieee", "NN"), aot.target_of(80)
    strides, types = (strides_of("N"),) * 3, dict.fromkeys(("a", "b", "c", "source"), SHORT_NAMES[dtype])
    found = []
    for epilogue in (None, Epilogue(source=strides_of("N"))):
        (plan,) = plans(problem, TILES[kind(problem), True][-1], target, strides, epilogue=epilogue)
        source = aot.source(plan, types, True)
        kernel = aot.triton.compile(source, target=aot.GPUTarget("cuda", 80, 32), options=plan.options)
        ptx = kernel.asm["ptx"]
        found.append([f"fma.rn.f{bits}" in ptx, f"add.f{bits}" in ptx, "cvt.rn.f32.f64" in ptx, ".f64" in ptx])
    assert found == [[False, False, False, not rounds], [True, False, rounds, True]]


@pytest.mark.parametrize("letter", ["N", "T"])
@pytest.mark.parametrize("arch", ARCHES)
def test_matvec_loads_the_matrix_ahead_of_the_sum(arch: int, letter: str) -> None:
    """As copies into shared memory, of the first steps before the loop, and in the loop of a step to come."""
    problem = replace(problem_of("bfloat16", "ieee", letter + "N"), n=1)
    (case,) = cases_of(arch, problem, VECTOR_TILES[letter])
    copies = compiled(case).ttgir.count("ttg.async_copy_global_to_local")
    assert copies == case.tile.stages


@pytest.mark.parametrize("arch", ARCHES)
def test_sums_of_rests_that_are_nan_are_dropped(arch: int) -> None:
    """Else Inf would be NaN in three TF32 products: Inf - Inf is the rest of an operand."""
    (case, *_) = cases_of(arch, problem_of("float32", "tf32x3", "NN"), TILES["tf32x3", True][-1])
    assert re.search(r"arith\.cmpf uno, (%\S+), \1 .*\n.*arith\.select", compiled(case).ttgir)


@pytest.mark.parametrize("kernel", [gemm, gemm_tma, matvec, reduce, gemm_patches], ids=lambda kernel: kernel.__name__)
def test_alpha_and_beta_are_not_specialised(kernel: aot.triton.JITFunction) -> None:
    assert [kernel.params[kernel.arg_names.index(name)].do_not_specialize for name in SCALARS] == [True] * 4
