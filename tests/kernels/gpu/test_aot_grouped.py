"""Grouped products: every tile compiles for sm_80, 90, 100 and 120 without spills, and the choice of one is pure."""

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
from matmul_grad.kernels.gpu.config import ITEM_BYTES, SHORT_NAMES, Target, TileConfig, is_valid, kind, shared_bytes
from matmul_grad.kernels.gpu.grouped_plan import (
    GROUP_TILES,
    MAX_GROUPS,
    MAX_SIZE,
    GroupedProduct,
    choose_grouped,
    fastest_predicted,
    fits,
    grouped_plan,
    most_tiles,
)
from matmul_grad.kernels.gpu.groups import gemm_groups
from matmul_grad.kernels.gpu.plan import Plan

compiles = pytest.mark.skipif(
    not isinstance(gemm_groups, aot.triton.JITFunction), reason="TRITON_INTERPRET is set for the whole session"
)
N, GROUPS = 4096, 16
FAST = {  # a case of each kind, each form and each architecture, aligned and not
    "grouped_rows_nt_bf16_128x256x64_s3_w8@sm_90",
    "grouped_steps_tn_bf16_128x128x64_s4_w8@sm_90",
    "grouped_rows_nn_bf16_128x128x64_s3_w8@sm_100",
    "grouped_rows_tma_nt_bf16_128x256x64_s4_w8@sm_90",
    "grouped_steps_tma_tn_bf16_128x256x64_s4_w8@sm_90",
    "grouped_rows_tma_nn_bf16_128x128x64_s3_w8@sm_100",
    "grouped_steps_tma_tn_bf16_128x128x64_s3_w8@sm_100",
    "grouped_steps_tn_tf32_128x64x32_s3_w8@sm_100",
    "grouped_rows_nt_fp32_128x64x16_s3_w8@sm_80",
    "grouped_steps_tn_fp64_64x32x16_s3_w8@sm_80",
    "grouped_rows_nt_tf32x3_64x32x32_s3_w8@sm_120",
    "grouped_rows_ts_bf16_64x64x64_s3_w8-unaligned@sm_90",
    "grouped_steps_nt_fp32_64x32x16_s3_w8-unaligned@sm_120",
}


class Case(NamedTuple):
    arch: int
    product: GroupedProduct
    tile: TileConfig

    def __str__(self) -> str:
        loads = "" if self.product.aligned else "-unaligned"
        return f"{self.plan.constants['NAME']}{loads}@sm_{self.arch}"

    @property
    def plan(self) -> Plan:
        product = self.product
        strides = {"N": Strides(N, 1), "T": Strides(1, N), "S": Strides(2 * N, 2)}
        a, b, c = strides[product.a], strides[product.b], strides["N"]
        if not product.aligned:
            a, b, c = (Strides(*(x + 1 if x > 1 else x for x in matrix[:2])) for matrix in (a, b, c))
        b, c = (b, c._replace(batch=N * N)) if product.by_steps else (b._replace(batch=N * N), c)
        return grouped_plan(product, self.tile, aot.target_of(self.arch), (a, b, c))


def product_of(name: str, by_steps: bool, letters: str, aligned: bool, tma: bool = False) -> GroupedProduct:
    dtype, precision = DTYPE_NAMES[name]
    return GroupedProduct(N, N, N, GROUPS, by_steps, dtype, letters[0], letters[1], precision, aligned, tma)


def cases() -> Iterator[Case]:
    """Aligned rows have A by rows, and aligned steps A by columns and B by rows: all layouts that they can have."""
    names = [name for name in DTYPE_NAMES if name != "fp16"]
    forms = (
        (False, True, "NN"), (False, True, "NT"), (True, True, "TN"),
        (False, False, "NN"), (False, False, "TS"), (True, False, "NT"), (True, False, "TN"),
    )  # fmt: skip
    for arch, name, (by_steps, aligned, letters) in itertools.product(ARCHES, names, forms):
        product = product_of(name, by_steps, letters, aligned)
        for tile in GROUP_TILES[kind(product.problem), aligned]:
            if is_valid(tile, product.problem, aot.target_of(arch)):
                yield Case(arch, product, tile)
    for arch, tile, (by_steps, aligned, letters) in itertools.product((90, 100), TMA_TILES, forms):
        if aligned:
            yield Case(arch, product_of("bf16", by_steps, letters, True, tma=True), tile)


CASES = {str(case): case for case in cases()}


@compiles
@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name not in FAST)) for name in CASES])
def test_kernel_compiles_to_the_expected_instruction_without_spills(name: str) -> None:
    case = CASES[name]
    arch, product, tile = case
    types = {**dict.fromkeys("abc", SHORT_NAMES[product.dtype]), "offs": "i32"}
    report, target = aot.compile_for(case.plan, types, arch), aot.target_of(arch)
    assert report.name == case.plan.constants["NAME"]
    assert report.spills == 0, report
    assert 0 < report.registers <= 255, report
    assert report.shared <= min(shared_bytes(tile, product.problem, target), target.shared_bytes), report
    assert re.fullmatch(INSTRUCTIONS[arch, kind(product.problem).removesuffix("x3")], report.instruction), report
    if product.tma:
        assert (report.copy_bytes, report.load_bytes) == (set(), 4), report  # of offs alone
    elif product.aligned:
        assert report.copy_bytes == {16}, report
    else:
        assert report.copy_bytes == ({ITEM_BYTES[product.dtype]} if ITEM_BYTES[product.dtype] >= 4 else set()), report


def test_cases_cover_every_tile_and_form() -> None:
    assert FAST - set(CASES) == set()
    found = {(kind(case.product.problem), case.product.aligned, case.product.by_steps) for case in CASES.values()}
    kinds = {kind for kind, _ in GROUP_TILES if kind != "fp8"}
    assert found == set(itertools.product(kinds, (True, False), (True, False)))
    tiles = {(kind(case.product.problem), case.product.aligned, case.tile) for case in CASES.values()}
    listed = {
        (kind, aligned, tile) for (kind, aligned), tiles in GROUP_TILES.items() for tile in tiles if kind != "fp8"
    }
    assert tiles == listed | {("half", True, tile) for tile in TMA_TILES}


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("name", DTYPE_NAMES)
def test_choose_is_total_valid_and_pure(name: str, target: Target) -> None:
    """For any sizes; and BLOCK_K is one number, so that no size changes the order of a sum."""
    found = {}
    for m, n, k, groups in itertools.product((1, 100, 8192), (1, 96, 4096), (1, 80, 16384), (1, 8, 257)):
        for by_steps, aligned in itertools.product((False, True), repeat=2):
            product = replace(product_of(name, by_steps, "NN", aligned), m=m, n=n, k=k, groups=groups)
            found[product] = choose_grouped(product, target)
            assert is_valid(found[product], product.problem, target) and found[product].split_k == 1
    assert len({tile.block_k for tile in found.values()}) == 1
    fastest_predicted.cache_clear()
    assert {product: choose_grouped(product, target) for product in reversed(found)} == found


def test_large_groups_have_a_large_tile_and_small_ones_a_small_one() -> None:
    target, product = TARGETS["sm90"], product_of("bf16", False, "NT", True)
    assert choose_grouped(replace(product, m=1 << 16, groups=8), target).block_m == 128
    assert choose_grouped(replace(product, m=512, n=512, groups=64), target).block_m == 64
    steps = product_of("bf16", True, "TN", True)
    few = choose_grouped(replace(steps, m=512, n=512, groups=1), target)
    assert few.block_m * few.block_n == 64 * 64
    unknown = replace(product, dtype="float32", precision="bf16x3")
    with pytest.raises(ValueError, match="no tile for"):
        choose_grouped(unknown, target)


def test_a_new_number_of_tokens_costs_no_new_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    from matmul_grad.kernels.gpu import grouped_plan as module

    target = TARGETS["sm90"]
    for product, size in ((product_of("bf16", False, "NT", True), "m"), (product_of("bf16", True, "TN", True), "k")):
        chosen = choose_grouped(product, target)
        with monkeypatch.context() as patch:
            patch.delattr(module, "predicted_seconds")
            for fewer in range(N - 63 * GROUPS, N, 37):
                assert choose_grouped(replace(product, **{size: fewer}), target) == chosen


@pytest.mark.parametrize("by_steps", [False, True], ids=["rows", "steps"])
def test_programs_are_as_many_as_multiprocessors_hold_whatever_the_groups(by_steps: bool) -> None:
    target, large = TARGETS["sm90"], GROUP_TILES["half", True][0]
    product = product_of("bf16", by_steps, "TN" if by_steps else "NT", True)
    case = Case(90, product, large)
    assert case.plan.programs == target.sms
    assert case._replace(product=replace(product, m=64, n=64, groups=3)).plan.programs == (3 if by_steps else 4)
    small = Case(90, product, GROUP_TILES["half", True][-1]).plan.programs
    assert small % target.sms == 0 and small > target.sms


def test_most_tiles_is_a_bound_that_some_groups_reach() -> None:
    """Rows: each group but one of a single row, and a row behind them."""
    product, tile = product_of("fp32", False, "NN", True), TileConfig(16, 16, 16, 2, 4)
    product = replace(product, m=19, n=33, groups=3)
    sizes = 1, 1, 16, 1  # the last one behind the groups
    assert sum(sizes) == product.m
    assert sum(-(-size // 16) for size in sizes) * 3 <= most_tiles(product, tile) == (2 + 3) * 3


def test_what_32_bits_do_not_count_is_left_to_the_loop() -> None:
    product = product_of("bf16", False, "NT", True)
    assert fits(product) and fits(replace(product, m=MAX_SIZE, n=32)) and fits(replace(product, groups=MAX_GROUPS))
    wrong_sizes = {"m": MAX_SIZE + 1}, {"groups": MAX_GROUPS + 1}, {"m": MAX_SIZE, "n": MAX_SIZE}
    for wrong in (*wrong_sizes, {"m": 1 << 27, "n": 32, "groups": MAX_GROUPS}):
        assert not fits(replace(product, **wrong))
