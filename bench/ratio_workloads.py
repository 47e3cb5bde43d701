"""What `cpu-ratio` compares, one workload a comparison, in the order of measuring."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from .. import testing
from . import baseline
from .shapes import CUBES, LAYERS_NK, TOKENS, Shape

PARTS = ("products", "step", "openblas", "overhead")
DTYPES = ("f32", "f64", "bf16", "f16")
LAYOUTS = ("NN", "NT", "TN")
LARGEST = 2048  # rows or tokens: above it a comparison takes minutes, and says what the size below it says
CALL = 8  # the size whose time is all overhead
PEAK_FROM = 1024  # cubes from here on are held against the peak of the CPU

# Operations a second that the slower of two backends makes with one thread, on Zen 4: to weigh what is left to do.
PACE = {"f32": 80e9, "f64": 40e9, "bf16": 150e9, "f16": 6e9}


@dataclass(frozen=True)
class RatioWorkload:
    """One comparison: torch, or NumPy's OpenBLAS, beside this package."""

    part: str
    dtype: str
    layout: str
    m: int
    n: int
    k: int

    @property
    def product(self) -> str:
        return baseline.STEP if self.part == "step" else "forward"

    @property
    def flops(self) -> int:
        return baseline.flops(self.m, self.n, self.k, self.product)

    @property
    def case(self) -> testing.Case:
        return testing.Case(self.product, testing.DTYPES[self.dtype], self.layout, self.m, self.n, self.k)

    @property
    def peak(self) -> bool:
        """Whether the peak of the CPU is measured beside it."""
        return self.part == "products" and self.m == self.n == self.k >= PEAK_FROM

    def weight(self, seconds: float, threads: int) -> float:
        """About how many seconds it takes when ``seconds`` are asked for."""
        return seconds + 0.1 + 10 * self.flops / PACE[self.dtype] / threads


def jobs(parts: Collection[str], dtypes: Collection[str], threads: int, quick: bool = False) -> list[RatioWorkload]:
    """The comparisons of these parts and dtypes with this number of threads."""
    made = {
        "products": products(quick),
        "step": (RatioWorkload("step", "f32", "NN", n, n, n) for n in ((256,) if quick else (256, 512, 1024, 2048))),
        "openblas": openblas((256, 512) if quick else (256, 512, 1024, 2048)),
        "overhead": iter([RatioWorkload("overhead", "f32", "NN", CALL, CALL, CALL)] if threads == 1 else []),
    }
    return [workload for part in PARTS if part in parts for workload in made[part] if workload.dtype in dtypes]


def products(quick: bool = False) -> Iterator[RatioWorkload]:
    """Shape by shape, so that the right result is worked out once for all dtypes and layouts of one."""
    for shape, dtype, layout in itertools.product(few_shapes() if quick else shapes(), DTYPES, LAYOUTS):
        if not quick or dtype != "f16" or baseline.flops(*shape, "forward") < 1e9:
            yield RatioWorkload("products", dtype, layout, *shape)


def openblas(sizes: Collection[int]) -> Iterator[RatioWorkload]:
    for n, dtype in itertools.product(sizes, ("f32", "f64")):
        yield RatioWorkload("openblas", dtype, "NN", n, n, n)


def shapes() -> list[Shape]:
    cubes = [shape for shape in CUBES if shape[0] <= LARGEST]
    return cubes + [(m, n, k) for n, k in LAYERS_NK[:3] for m in TOKENS if m <= LARGEST]


def few_shapes() -> list[Shape]:
    return [(64, 64, 64), (256, 256, 256), (PEAK_FROM,) * 3, (1, 768, 768), (32, 768, 768)]
