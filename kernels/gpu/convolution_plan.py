"""From a convolution to the plans of its product over patches: digits, strides, tiles, kernels. Pure, without torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from .arguments import Axis, Groups, Operands, Outer, Phase, PointerArg, Spatial, Strides
from .choose import SPLITS, predicted_seconds
from .config import (
    Problem,
    Target,
    TileConfig,
    cdiv,
    dtype_name,
    is_valid,
    kernel_name,
    kind,
    work_items,
)
from .epilogue import Epilogue
from .patches import gemm_patches
from .plan import REDUCE_BLOCK, Plan, blocks, options, scalar_args, source_arg, with_suffix
from .reduce import reduce

# By the kind of the product and the family of loads: "lines" where a step of k has one tap and its channels are
# adjacent (16-byte loads), "taps" where they are not, "digits" for all else. Largest first; one BLOCK_K a kind and
# order. Cut to compile without spills for sm_80, sm_90, sm_100 and sm_120 in three dimensions: where loads are narrow,
# a thread holds an address and a mask of each element. None has been timed yet.
SMALL = {
    "tf32": (TileConfig(64, 64, 32, stages=3, warps=8), TileConfig(64, 32, 32, stages=3, warps=8)),
    "tf32x3": (TileConfig(64, 64, 32, stages=3, warps=8),),
    "fp32": (TileConfig(64, 64, 16, stages=3, warps=8), TileConfig(64, 32, 16, stages=3, warps=8)),
    "fp64": (TileConfig(32, 32, 16, stages=3, warps=8),),
}
TILES = {
    **{(kind, family): tiles for kind, tiles in SMALL.items() for family in ("lines", "taps", "digits")},
    ("half", "lines"): (
        TileConfig(128, 128, 64, stages=3, warps=8),
        TileConfig(128, 64, 64, stages=3, warps=8),
        TileConfig(64, 64, 64, stages=3, warps=4),
        TileConfig(64, 32, 64, stages=3, warps=4),
    ),
    ("half", "taps"): (TileConfig(64, 64, 64, stages=3, warps=8), TileConfig(64, 32, 64, stages=3, warps=8)),
    ("half", "digits"): (
        TileConfig(128, 64, 32, stages=3, warps=8),
        TileConfig(64, 64, 32, stages=3, warps=8),
        TileConfig(64, 32, 32, stages=3, warps=4),
    ),
    ("tf32", "lines"): (
        TileConfig(128, 128, 32, stages=3, warps=8),
        TileConfig(128, 64, 32, stages=3, warps=8),
        *SMALL["tf32"],
    ),
    ("fp32", "lines"): (TileConfig(128, 64, 16, stages=3, warps=8), *SMALL["fp32"]),
}

WIDE_FROM = 2**31 - 2**16


@dataclass(frozen=True)
class Tensor:
    """Sizes and strides of an image (sample, channel, spatial) or a filter (out channel, in channel, spatial)."""

    sizes: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def spatial(self) -> list[tuple[int, int]]:
        """Size and stride of each spatial dimension."""
        return list(zip(self.sizes[2:], self.strides[2:], strict=True))

    @property
    def span(self) -> int:
        """Elements from the first to behind the last."""
        return 1 + sum((size - 1) * stride for size, stride in zip(self.sizes, self.strides, strict=True))


@dataclass(frozen=True)
class Convolution:
    """The parameters that all three products share: one number of each a spatial dimension, and the groups."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1


@dataclass(frozen=True)
class PatchProduct:
    """One product over patches, as `gemm_patches` computes it.

    m, n, k: of a group; m and k the largest of a phase. axes, phases: the last dimension first. taps: the digits of k
    where they are the filter's. wide: indices have 64 bits. name: forward, dgrad or wgrad.
    """

    name: str
    m: int
    n: int
    k: int
    outer: Outer
    groups: Groups
    axes: tuple[Axis, ...]
    phases: tuple[Phase, ...] = ()
    taps: tuple[int, ...] | None = None
    wide: bool = False

    @property
    def launched(self) -> int:
        """Products of one launch: phases times groups."""
        return math.prod(phase.stride for phase in self.phases) * self.groups.number

    def family(self, dtype: str, precision: str) -> str:
        """The tiles of `TILES` for a dtype. Whether a step of k has one tap depends on the filter's channels alone."""
        whole = TILES[kind(Problem(1, 1, 1, dtype, precision=precision)), "taps"][0].block_k
        if self.name == "wgrad" or self.outer.steps % whole:
            return "digits"
        return "lines" if self.outer.k_a == 1 else "taps"

    def order(self, family: str) -> str:
        """The order of rows and of steps of k, as `gemm_patches` names it."""
        return "pixel" if self.name == "wgrad" else "digits" if family == "digits" else "tap"

    def problem(self, dtype: str, precision: str, invariant: bool) -> Problem:
        """What the choice of a tile depends on. Only the weight gradient, whose k is pixels, may split k."""
        whole, aligned = invariant or self.name != "wgrad", self.family(dtype, precision) == "lines"
        m, n, k = self.m, self.n, self.k
        return Problem(m, n, k, dtype, "S", "S", precision, aligned, batch=self.launched, invariant=whole)


def digits_of(x: Sequence[Any]) -> tuple[Any, ...]:
    """Of each spatial dimension, the last one first."""
    return tuple(reversed(x))


def is_wide(*tensors: Tensor) -> bool:
    """Whether an index or an offset can exceed 32 bits, also in the part of a tile that lies behind the last row."""
    return any(max(x.span, math.prod(x.sizes)) >= WIDE_FROM for x in tensors)


def forward_product(conv: Convolution, image: Tensor, filters: Tensor, result: Tensor) -> PatchProduct:
    """Y[(s, y), o] = sum over (c, t) of X[s, c, y * stride - padding + t * dilation] * W[o, c, t]."""
    samples, (out, channels) = image.sizes[0], filters.sizes[:2]
    out //= conv.groups
    axes = [
        Axis(rows, steps, stride, dilation, -padding, size, a, b, c, 0, 0)
        for (size, a), (steps, b), (rows, c), stride, padding, dilation in zip(
            image.spatial, filters.spatial, result.spatial, conv.stride, conv.padding, conv.dilation, strict=True
        )
    ]
    a, b, c = image.strides, filters.strides, result.strides
    return PatchProduct(
        "forward",
        samples * math.prod(result.sizes[2:]),
        out,
        channels * math.prod(filters.sizes[2:]),
        Outer(samples, channels, rows_a=a[0], k_a=a[1], k_b=b[1], cols_b=b[0], rows_c=c[0], cols_c=c[1]),
        Groups(conv.groups, channels * a[1], out * b[0], out * c[1]),
        digits_of(axes),
        taps=digits_of(filters.sizes[2:]),
        wide=is_wide(image, filters, result),
    )


def input_gradient_product(conv: Convolution, grad: Tensor, filters: Tensor, result: Tensor) -> PatchProduct:
    """dX[(s, x), c] = sum over (o, t) of dY[s, o, (x + padding - t * dilation) / stride] * W[o, c, t], where whole.

    With a stride the pixels are in phases, by their coordinates modulo the stride: each has taps of its own.
    """
    samples, (out, channels) = grad.sizes[0], filters.sizes[:2]
    out //= conv.groups
    strided = max(conv.stride) > 1
    axes, phases = [], []
    for (size, a), (taps, b), (rows, c), stride, padding, dilation in zip(
        grad.spatial, filters.spatial, result.spatial, conv.stride, conv.padding, conv.dilation, strict=True
    ):
        divisor = math.gcd(stride, dilation)
        every = stride // divisor
        axes.append(Axis(rows, taps, 1, -(dilation // divisor), padding, size, a, b, c, 0, 0))
        inverse = pow(dilation // divisor, -1, every) if every > 1 else 0
        phases.append(Phase(stride, padding, rows, taps, dilation, divisor, every, inverse))
    a, b, c = grad.strides, filters.strides, result.strides
    return PatchProduct(
        "dgrad",
        samples * math.prod(cdiv(phase.size, phase.stride) for phase in phases),
        channels,
        out * math.prod(cdiv(phase.taps, phase.every) for phase in phases),
        Outer(samples, out, rows_a=a[0], k_a=a[1], k_b=b[0], cols_b=b[1], rows_c=c[0], cols_c=c[1]),
        Groups(conv.groups, out * a[1], out * b[0], channels * c[1]),
        digits_of(axes),
        digits_of(phases) if strided else (),
        taps=None if strided else digits_of(filters.sizes[2:]),
        wide=is_wide(grad, filters, result),
    )


def weight_gradient_product(conv: Convolution, image: Tensor, grad: Tensor, result: Tensor) -> PatchProduct:
    """dW[o, (c, t)] = sum over (s, y) of dY[s, o, y] * X[s, c, y * stride - padding + t * dilation].

    Its rows are (c, t), its columns o.
    """
    samples, (out, channels) = image.sizes[0], result.sizes[:2]
    out //= conv.groups
    axes = [
        Axis(rows, steps, dilation, stride, -padding, size, a, b, c, 0, 0)
        for (size, a), (steps, b), (rows, c), stride, padding, dilation in zip(
            image.spatial, grad.spatial, result.spatial, conv.stride, conv.padding, conv.dilation, strict=True
        )
    ]
    a, b, c = image.strides, grad.strides, result.strides
    return PatchProduct(
        "wgrad",
        channels * math.prod(result.sizes[2:]),
        out,
        samples * math.prod(grad.sizes[2:]),
        Outer(channels, samples, rows_a=a[1], k_a=a[0], k_b=b[0], cols_b=b[1], rows_c=c[1], cols_c=c[0]),
        Groups(conv.groups, channels * a[1], out * b[1], out * c[0]),
        digits_of(axes),
        wide=is_wide(image, grad, result),
    )


@lru_cache(maxsize=4096)
def choose_tile(problem: Problem, family: str, target: Target) -> TileConfig:
    """The tile that the model predicts to be fastest, of equals the largest. Pure: nothing is timed.

    BLOCK_K depends on dtype, precision and the filter's channels, and k is whole but for the weight gradient, so an
    output element has the same bits in any image and any batch. Raises ValueError where no tile is valid.
    """
    tiles = [replace(tile, split_k=splits) for tile in TILES[kind(problem), family] for splits in SPLITS]
    valid = [tile for tile in tiles if is_valid(tile, problem, target)]
    if not valid:
        raise ValueError(f"no tile for {problem} on {target}")
    return min(valid, key=lambda tile: predicted_seconds(tile, problem, target))


def spatial(values: Sequence[Any], unused: Any) -> Spatial:
    return Spatial(*values, *[unused] * (3 - len(values)))


def convolution_plans(
    product: PatchProduct, problem: Problem, config: TileConfig, *, upcast: bool = False, bias: bool = False
) -> list[Plan]:
    """The plans of a product on the tensors "a", "b" and "c", "work" where k is split, and "source": the bias.

    Where k is split, C is the gradient of a weight, contiguous.
    """
    m, n, split = product.m, product.n, config.split_k > 1
    epilogue = Epilogue(source=Strides(0, 1, n)) if bias else None
    groups, name = product.groups, kernel_name(problem, config).replace("gemm_ss", f"conv_{product.name}")
    if split:
        groups = groups._replace(c=config.split_k * m * n, part=m * n)
    first = Plan(
        gemm_patches,
        work_items(problem, config),
        (
            Operands(PointerArg("a"), PointerArg("b"), PointerArg("work" if split else "c")), m, n, product.k,
            product.outer, spatial(product.axes, Axis()),
            spatial(product.phases, Phase()) if product.phases else None,
            groups, source_arg(epilogue), *scalar_args(epilogue),
        ),
        {
            **blocks(config),
            "SPLIT_K": config.split_k,
            "TAPS": product.taps,
            "DIMS": len(product.axes),
            "ORDER": product.order(product.family(problem.dtype, problem.precision)),
            "PRECISION": problem.precision,
            "WIDE": product.wide,
            "UPCAST": upcast,
            "NAME": with_suffix(name, epilogue),
        },
        options(config),
    )  # fmt: skip
    if not split:
        return [first]
    name = f"reduce_{dtype_name(problem)}_k{config.split_k}"
    result = Strides(m, 1, m * n)  # a row of it is a column of C
    arguments = PointerArg("work"), PointerArg("c"), m * n, m, result, None, source_arg(None), *scalar_args(None)
    constants = {"SPLIT_K": config.split_k, "BLOCK": REDUCE_BLOCK, "ACTIVATION": None, "NAME": name}
    last = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}
    return [first, Plan(reduce, cdiv(m * n, REDUCE_BLOCK) * groups.number, arguments, constants, last)]
