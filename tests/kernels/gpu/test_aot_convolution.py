"""Every tile of a convolution compiles for sm_80, 90, 100 and 120 into what was meant, without spills."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import aot
import pytest
from aot import ARCHES, INSTRUCTIONS
from gpu_targets import DTYPE_NAMES, TARGETS

from matmul_grad.kernels.gpu.config import ITEM_BYTES, SHORT_NAMES, Target, TileConfig, is_valid, kind, shared_bytes
from matmul_grad.kernels.gpu.convolution_plan import (
    TILES,
    Convolution,
    PatchProduct,
    Tensor,
    choose_tile,
    convolution_plans,
    forward_product,
    input_gradient_product,
    weight_gradient_product,
)
from matmul_grad.kernels.gpu.patches import gemm_patches

compiles = pytest.mark.skipif(
    not isinstance(gemm_patches, aot.triton.JITFunction), reason="TRITON_INTERPRET is set for the whole session"
)
# Channels, dimensions, strided, channels_last: of each family the ones that need most registers.
GEOMETRIES = (
    (256, 2, False, True),
    (256, 2, True, True),
    (256, 2, False, False),
    (256, 3, True, False),
    (40, 3, True, False),
    (40, 3, False, True),
    (40, 1, False, False),
)
FAST = {  # a case of each family and product on sm_90, and of each kind
    "conv_forward_bf16_128x128x64_s3_w8-2d-last@sm_90",
    "conv_dgrad_bf16_64x64x64_s3_w8-3d-strided@sm_90",
    "conv_wgrad_bf16_128x64x32_s3_w8-2d-last@sm_90",
    "conv_forward_bf16_128x64x32_s3_w8-1d-few@sm_100",
    "conv_dgrad_tf32_128x128x32_s3_w8-2d-last-strided@sm_100",
    "conv_forward_fp32_64x64x16_s3_w8-2d@sm_80",
    "conv_wgrad_fp64_32x32x16_s3_w8-2d@sm_80",
    "conv_dgrad_tf32x3_64x64x32_s3_w8-2d@sm_120",
}


class Case(NamedTuple):
    """channels: 256, or 40, which fill no step of k. strided: stride 2. last: channels_last."""

    arch: int
    product: PatchProduct
    dtype: str
    precision: str
    tile: TileConfig
    channels: int
    dims: int
    strided: bool
    last: bool

    def __str__(self) -> str:
        plan = self.plans[0]
        name = plan.constants["NAME"].removesuffix("_addmm")
        marks = ("last", self.last), ("few", self.channels == 40), ("strided", self.strided)
        return f"{name}-{self.dims}d{''.join(f'-{mark}' for mark, is_set in marks if is_set)}@sm_{self.arch}"

    @property
    def plans(self) -> list:
        problem = self.product.problem(self.dtype, self.precision, False)
        return convolution_plans(self.product, problem, self.tile, bias=self.product.name == "forward")


def tensor(sizes: Sequence[int], last: bool = False) -> Tensor:
    order = [*range(len(sizes))]
    if last:
        order = [0, *order[2:], 1]
    strides = [math.prod(sizes[d] for d in order[order.index(i) + 1 :]) for i in range(len(sizes))]
    return Tensor(tuple(sizes), tuple(strides))


def products(channels: int, dims: int, stride: int, last: bool) -> tuple[PatchProduct, ...]:
    """The three products of 32 images of 32 pixels a dimension, taps of 3."""
    conv = Convolution((stride,) * dims, (1,) * dims, (1,) * dims)
    image, result = (tensor((32, channels, *[32 // by] * dims), last) for by in (1, stride))
    filters = tensor((channels, channels, *[3] * dims), last)
    return (
        forward_product(conv, image, filters, result),
        input_gradient_product(conv, result, filters, image),
        weight_gradient_product(conv, image, result, tensor(filters.sizes)),
    )


def cases() -> Iterator[Case]:
    names = [name for name in DTYPE_NAMES if name != "fp16"]
    for name, (channels, dims, strided, last), arch in itertools.product(names, GEOMETRIES, ARCHES):
        (dtype, precision), target = DTYPE_NAMES[name], aot.target_of(arch)
        for product in products(channels, dims, 1 + strided, last):
            if product.name == "wgrad" and strided:  # its strides are numbers of a call, as all else
                continue
            problem = product.problem(dtype, precision, False)
            for tile in TILES[kind(problem), product.family(dtype, precision)]:
                if is_valid(tile, problem, target):
                    yield Case(arch, product, dtype, precision, tile, channels, dims, strided, last)


CASES = {str(case): case for case in cases()}


@compiles
@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name not in FAST)) for name in CASES])
def test_kernel_compiles_to_the_expected_instruction_without_spills(name: str) -> None:
    case = CASES[name]
    short, acc = SHORT_NAMES[case.dtype], "fp64" if case.dtype == "float64" else "fp32"
    types = {**dict.fromkeys(("a", "b", "c", "source"), short), "work": acc}
    report, target = aot.compile_for(case.plans[0], types, case.arch), aot.target_of(case.arch)
    problem = case.product.problem(case.dtype, case.precision, False)
    assert report.spills == 0, report
    assert 0 < report.registers <= 255, report
    assert report.shared <= min(shared_bytes(case.tile, problem, target), target.shared_bytes), report
    assert re.fullmatch(INSTRUCTIONS[case.arch, kind(problem).removesuffix("x3")], report.instruction), report
    family = case.product.family(case.dtype, case.precision)
    if family == "lines" and case.product.name == "dgrad":  # the bias of a forward product is a narrow load
        elements = case.tile.block_k * case.tile.block_n // (32 * case.tile.warps)
        assert report.load_bytes == min(16, elements * ITEM_BYTES[case.dtype]), report
    if family == "lines":
        assert report.ttgir.count("ttg.async_copy_global_to_local") >= 2 * case.tile.stages, report


def test_cases_cover_every_tile() -> None:
    assert {name for name in FAST if name not in CASES} == set()
    found = {(kind(case.product.problem(case.dtype, case.precision, False)), case.tile) for case in CASES.values()}
    assert found == {(kind_of, tile) for (kind_of, _), tiles in TILES.items() for tile in tiles}
    assert {case.product.family(case.dtype, case.precision) for case in CASES.values()} == {"lines", "taps", "digits"}


def test_block_k_depends_on_kind_and_order_alone() -> None:
    """So do the bits of an output: not on the memory format."""
    for kind_of in {key[0] for key in TILES}:
        depths = {family: {tile.block_k for tile in TILES[kind_of, family]} for family in ("lines", "taps", "digits")}
        assert depths["lines"] == depths["taps"] and all(len(depth) == 1 for depth in depths.values())


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("name", DTYPE_NAMES)
def test_every_product_has_a_tile_and_only_weight_gradients_split_k(name: str, target: Target) -> None:
    """k is split where few tiles have many pixels, never in batch-invariant mode, and within the workspace."""
    dtype, precision = DTYPE_NAMES[name]
    for last, channels in itertools.product((False, True), (256, 40)):
        for product in products(channels, 2, 2, last):
            for invariant in (False, True):
                problem = product.problem(dtype, precision, invariant)
                tile = choose_tile(problem, product.family(dtype, precision), target)
                assert is_valid(tile, problem, target)
                assert tile.split_k == 1 or (product.name == "wgrad" and not invariant)
    (*_, few) = products(40, 2, 1, False)
    assert choose_tile(few.problem(dtype, precision, False), "digits", target).split_k > 1


def test_wide_indices_are_those_of_large_tensors() -> None:
    """Where a view repeats one element, its sizes count, since rows and steps of k do."""
    conv = Convolution((1,), (0,), (1,))
    filters = tensor((1, 1, 1))
    for samples, wide in ((2**31, True), (2**31 - 2**16, True), (2**31 - 2**17, False)):
        for strides in ((1, 1, 1), (0, 0, 0)):
            image = Tensor((samples, 1, 1), strides)
            assert forward_product(conv, image, filters, tensor((1, 1, 1))).wide == wide


@compiles
def test_too_large_tile_is_reported_to_spill() -> None:
    """The reading of spills is not blind."""
    product = products(256, 3, 2, False)[1]
    problem = product.problem("bfloat16", "ieee", False)
    (plan,) = convolution_plans(product, problem, TileConfig(128, 128, 64, stages=3, warps=4))
    assert aot.compile_for(plan, dict.fromkeys("abc", "bf16"), 90).spills > 0


@compiles
def test_split_of_a_weight_gradient_is_two_kernels_within_one_dimension_of_the_grid() -> None:
    product = products(256, 2, 1, False)[2]
    problem = product.problem("bfloat16", "ieee", False)
    tile = replace(TILES["half", "digits"][0], split_k=4)
    first, last = convolution_plans(product, problem, tile)
    assert first.programs == math.ceil(256 * 9 / 128) * (256 // 64) * 4
    assert last.programs == 256 * 9 * 256 // 1024
