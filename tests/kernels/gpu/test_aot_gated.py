"""Gated products: every tile compiles for sm_80, 90, 100 and 120 without spills, and the choice of one is pure."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import aot
import pytest
from aot import ARCHES, INSTRUCTIONS
from gpu_targets import DTYPE_NAMES, TARGETS

from matmul_grad.kernels.gpu.arguments import Strides
from matmul_grad.kernels.gpu.choose import TMA_TILES
from matmul_grad.kernels.gpu.config import ITEM_BYTES, SHORT_NAMES, Problem, Target, TileConfig, kind, shared_bytes
from matmul_grad.kernels.gpu.gated_plan import (
    GATED_TILES,
    candidates,
    choose_gated,
    doubled,
    fastest_predicted,
    gated_plan,
    is_valid_gated,
    paired,
    seconds,
)
from matmul_grad.kernels.gpu.gates import gemm_gated
from matmul_grad.kernels.gpu.plan import Plan

compiles = pytest.mark.skipif(
    not isinstance(gemm_gated, aot.triton.JITFunction), reason="TRITON_INTERPRET is set for the whole session"
)
N = 4096
READ = False, False
FAST = {  # a case of each path and architecture, aligned and not
    "gated_tma_nt_bf16_128x128x64_s4_w8_gelu@sm_90",
    "gated_tma_nt_bf16_128x64x64_s3_w8_gelu@sm_100",
    "gated_nt_bf16_128x64x64_s4_w8_gelu@sm_80",
    "gated_nt_tf32_128x64x32_s3_w8_gelu@sm_90",
    "gated_nt_fp64_32x16x16_s3_w4_gelu@sm_80",
    "gated_nn_bf16_64x32x64_s3_w8_gelu-unaligned@sm_120",
}


class Case(NamedTuple):
    arch: int
    problem: Problem
    tile: TileConfig

    def __str__(self) -> str:
        loads = "" if self.problem.aligned else "-unaligned"
        return f"{self.plan().constants['NAME']}{loads}@sm_{self.arch}"

    def plan(self, activation: str = "gelu", keep: bool = True, added: str = "matrix") -> Plan:
        """By default with all that takes registers: a matrix is added to both, and both are kept."""
        layouts = {"N": Strides(N, 1), "T": Strides(1, N), "S": Strides(2 * N, 2)}
        names = {"a": self.problem.a, "b": self.problem.b, "gate": self.problem.b, "c": "N"}
        strides = {name: layouts[letter] for name, letter in names.items()}
        if not self.problem.aligned:
            strides = {name: Strides(*(x + 1 if x > 1 else x for x in found[:2])) for name, found in strides.items()}
        source = {"matrix": strides["c"], "row": Strides(0, 1), "none": None}[added]
        if source is not None:
            strides |= {"source": source, "gate_source": source}
        return gated_plan(self.problem, self.tile, aot.target_of(self.arch), strides, activation, keep=keep)

    def types(self) -> dict[str, str]:
        names = ("a", "b", "gate", "c", "pre", "value", "source", "gate_source")
        return dict.fromkeys(names, SHORT_NAMES[self.problem.dtype])


def problem_of(name: str, letters: str, aligned: bool, tma: bool = False) -> Problem:
    dtype, precision = DTYPE_NAMES[name]
    return Problem(N, N, N, dtype, letters[0], letters[1], precision, aligned, tma)


def cases() -> Iterator[Case]:
    names = [name for name in DTYPE_NAMES if name != "fp16"]
    forms = (True, "NN"), (True, "NT"), (True, "TN"), (False, "NN"), (False, "TS")
    for arch, name, (aligned, letters) in itertools.product(ARCHES, names, forms):
        problem = problem_of(name, letters, aligned)
        yield from (Case(arch, problem, tile) for tile in candidates(problem, aot.target_of(arch)))
    for arch, letters in itertools.product((90, 100), ("NN", "NT", "TN", "TT")):
        problem = problem_of("bf16", letters, True, tma=True)
        found = candidates(problem, aot.target_of(arch))
        yield from (Case(arch, problem, tile) for tile in found if tile.path == "tma")


CASES = {str(case): case for case in cases()}


@compiles
@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name not in FAST)) for name in CASES])
def test_kernel_compiles_to_the_expected_instruction_without_spills(name: str) -> None:
    arch, problem, tile = case = CASES[name]
    report, target = aot.compile_for(case.plan(), case.types(), arch), aot.target_of(arch)
    assert report.name == case.plan().constants["NAME"]
    assert report.spills == 0, report
    assert 0 < report.registers <= 255, report
    bound = shared_bytes(doubled(tile), paired(problem), target)
    assert report.shared <= min(bound, target.shared_bytes), report
    assert re.fullmatch(INSTRUCTIONS[arch, kind(problem).removesuffix("x3")], report.instruction), report
    if tile.path == "tma":
        assert report.copy_bytes == set(), report
    elif problem.aligned:
        assert report.copy_bytes == {16}, report
    else:
        assert report.copy_bytes == ({ITEM_BYTES[problem.dtype]} if ITEM_BYTES[problem.dtype] >= 4 else set()), report


@compiles
@pytest.mark.slow
@pytest.mark.parametrize("added", ["none", "row"])
@pytest.mark.parametrize("activation", ["relu", "tanh", "silu"])
def test_other_stores_do_not_spill_either(activation: str, added: str) -> None:
    for name in ("gated_tma_nt_bf16_128x128x64_s4_w8_gelu@sm_90", "gated_tma_nt_bf16_256x64x64_s3_w8_gelu@sm_90"):
        case = CASES[name]
        report = aot.compile_for(case.plan(activation, keep=added == "row", added=added), case.types(), case.arch)
        assert report.spills == 0, report
        assert report.name.endswith(activation)


def test_cases_cover_every_tile() -> None:
    assert FAST - set(CASES) == set()
    found = {(kind(case.problem), case.problem.aligned, doubled(case.tile)) for case in CASES.values()}
    listed = {(of, aligned, tile) for (of, aligned), tiles in GATED_TILES.items() for tile in tiles if of != "fp8"}
    assert found == listed | {("half", True, tile) for tile in TMA_TILES}


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("name", DTYPE_NAMES)
def test_choose_is_valid_and_pure(name: str, target: Target) -> None:
    """For any sizes; and BLOCK_K is one number, so that no size changes the order of a sum."""
    found: dict[Problem, TileConfig | None] = {}
    for m, n, k in itertools.product((1, 100, 8192), (1, 96, 4096), (1, 80, 16384)):
        for aligned, invariant in itertools.product((False, True), repeat=2):
            problem = replace(problem_of(name, "NT", aligned), m=m, n=n, k=k, invariant=invariant)
            found[problem] = tile = choose_gated(problem, target, READ)
            assert tile is None or is_valid_gated(tile, problem, target)
            assert tile is not None or not invariant  # which way is taken would depend on m
    assert len({tile.block_k for tile in found.values() if tile is not None}) == 1
    fastest_predicted.cache_clear()
    assert {problem: choose_gated(problem, target, READ) for problem in reversed(found)} == found


def test_layers_of_models_are_one_launch_on_an_h100() -> None:
    """Tokens by the sizes of a feed-forward layer; not where few results have long sums, which are cut."""
    target = TARGETS["sm90"]
    for m, (n, k) in itertools.product((1, 64, 512, 2048, 8192), ((3072, 768), (14336, 4096))):
        problem = replace(problem_of("bf16", "NT", True, tma=True), m=m, n=n, k=k)
        tile = choose_gated(problem, target, READ)
        assert tile is not None and tile.path == "tma", (m, n, k)
        assert seconds(tile, problem, target) > 0
    assert choose_gated(replace(problem_of("bf16", "NT", True, tma=True), m=64, n=64, k=8192), target, READ) is None
    large = choose_gated(replace(problem_of("bf16", "NT", True, tma=True), m=8192), target, READ)
    assert large is not None and 2 * large.block_m * large.block_n == 128 * 256


def test_large_unaligned_operands_are_left_to_padded_copies() -> None:
    target = TARGETS["sm90"]
    problem = replace(problem_of("bf16", "NT", False), m=4097, n=4097, k=4097)
    assert choose_gated(problem, target, (True, True)) is None
    assert choose_gated(replace(problem, m=5, n=33, k=65), target, (True, True)) is not None


def test_a_new_number_of_tokens_costs_no_new_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    from matmul_grad.kernels.gpu import gated_plan as module

    target, problem = TARGETS["sm90"], problem_of("bf16", "NT", True, tma=True)
    chosen = choose_gated(problem, target, READ)
    monkeypatch.delattr(module, "predicted_seconds")
    for fewer in range(N - 63, N, 7):
        assert choose_gated(replace(problem, m=fewer), target, READ) == chosen


def test_tiles_that_are_not_valid() -> None:
    target, problem = TARGETS["sm90"], problem_of("bf16", "NT", True, tma=True)
    tile = TileConfig(128, 128, 64, stages=3, warps=8)
    assert is_valid_gated(tile, problem, target)
    for wrong in ({"split_k": 4}, {"block_n": 8}, {"block_n": 256}, {"warps": 4}, {"stages": 8}, {"path": "vector"}):
        assert not is_valid_gated(replace(tile, **wrong), problem, target), wrong
