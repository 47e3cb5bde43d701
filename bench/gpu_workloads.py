"""What `gpu-report` compares, in order: when the time is up, what is left out is what matters least."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .. import testing
from . import baseline
from .shapes import DEEPSEEK, LAYERS_NK, ODD, Shape

PRODUCTS = (*testing.PRODUCTS, baseline.STEP)
HALF = ("bf16", "f16")
CUBES: tuple[Shape, ...] = tuple((n, n, n) for n in (256, 512, 1024, 2048, 4096, 8192))
LAYERS: tuple[Shape, ...] = tuple((m, n, k) for n, k in LAYERS_NK for m in (1, 8, 128, 2048))

# A few of each kind, so that a run that is cut short has seen every kind. The longest sum comes last: it is
# gigabytes to read, and says nothing of any layer.
CORE: tuple[Shape, ...] = (
    *CUBES,
    (1, 4096, 4096), (8, 4096, 4096), (128, 6144, 4096), (2048, 4096, 4096), (2048, 3072, 768), (4096, 7168, 2048),
    (128, 2112, 7168), (4097, 4097, 4097), (257, 129, 513), (1, 1024, 1024), (1024, 1, 1024),
)  # fmt: skip
EVERY: tuple[Shape, ...] = tuple(dict.fromkeys((*CORE, *LAYERS, *DEEPSEEK, *ODD)))
FLOAT32: tuple[Shape, ...] = (
    (1024, 1024, 1024), (4096, 4096, 4096), (2048, 3072, 768), (128, 4096, 4096), (512, 512, 512), (2048, 2048, 2048),
    (257, 129, 513), (1, 4096, 4096),
)  # fmt: skip
INVARIANT: tuple[Shape, ...] = (
    (4096, 4096, 4096), (128, 4096, 4096), (2048, 4096, 4096), (8, 4096, 4096), (1024, 1024, 1024), (2048, 3072, 768),
)  # fmt: skip
BATCHED = ((32, (512, 512, 512)), (64, (128, 128, 64)), (16, (2048, 128, 2048)))
IMPLEMENTATIONS: tuple[Shape, ...] = ((4096, 4096, 4096), (1024, 1024, 1024), (128, 4096, 4096), (2048, 4096, 4096))
OTHER_PACKAGES = ("batch_invariant_ops", "torch.compile", "flag_gems")  # the quickest to begin with first


@dataclass(frozen=True)
class GpuWorkload:
    """One comparison with torch on the same operands.

    part: "products", "bmm", "invariant" (in the batch-invariant mode), or the name of another package that
    takes torch's place. precision: of float32: "ieee", "tf32" or "tf32x3"; torch's is "ieee" always.
    """

    part: str
    product: str
    dtype: str
    m: int
    n: int
    k: int
    precision: str = "ieee"
    batch: int = 1

    @property
    def name(self) -> str:
        parts = self.part if self.part != "products" else "", self.product, self.dtype
        precision = self.precision if self.precision != "ieee" else ""
        batch = f"{self.batch}x" if self.batch > 1 else ""
        return "-".join(filter(None, (*parts, precision, f"{batch}{self.m}x{self.n}x{self.k}")))

    @property
    def shape(self) -> Shape:
        return self.m, self.n, self.k

    @property
    def torch_dtype(self) -> torch.dtype:
        return testing.DTYPES[self.dtype]

    @property
    def flops(self) -> int:
        return self.batch * baseline.flops(*self.shape, self.product)

    @property
    def bytes(self) -> int:
        """Of both operands and the gradient of the result."""
        m, n, k = self.shape
        return self.batch * (m * k + k * n + m * n) * self.torch_dtype.itemsize


def ratios() -> list[GpuWorkload]:
    """The ratio table: bfloat16 on the shapes that matter most, then some of every other kind, then the rest."""
    first, rest = CORE, [shape for shape in EVERY if shape not in CORE]
    ordered = [
        *products(first, ("bf16",)),
        *float32(FLOAT32[:4]),
        *(GpuWorkload("invariant", baseline.STEP, "bf16", *shape) for shape in INVARIANT),
        *batched(),
        *products(first, ("f16",)),
        *float32(FLOAT32[4:]),
        *products(rest, ("bf16",)),
        *products(rest, ("f16",)),
    ]
    return list(dict.fromkeys(ordered))


def products(shapes: Sequence[Shape], dtypes: Sequence[str]) -> Iterator[GpuWorkload]:
    for shape, dtype, product in itertools.product(shapes, dtypes, PRODUCTS):
        yield GpuWorkload("products", product, dtype, *shape)


def float32(shapes: Sequence[Shape]) -> Iterator[GpuWorkload]:
    """A step follows torch's setting, which has no name for 3×TF32 and would be torch's TF32 too."""
    for shape, precision in itertools.product(shapes, ("ieee", "tf32", "tf32x3")):
        for product in PRODUCTS if precision == "ieee" else testing.PRODUCTS:
            yield GpuWorkload("products", product, "f32", *shape, precision=precision)


def batched() -> Iterator[GpuWorkload]:
    for (batch, shape), product in itertools.product(BATCHED, testing.PRODUCTS):
        yield GpuWorkload("bmm", product, "bf16", *shape, batch=batch)


def against_others() -> list[GpuWorkload]:
    """Other packages, forward."""
    return [GpuWorkload(name, "forward", "bf16", *shape) for name in OTHER_PACKAGES for shape in IMPLEMENTATIONS]


def of_row(row: dict[str, Any]) -> GpuWorkload:
    """The workload that a row was made of.

    >>> of_row({"part": "bmm", "product": "dgrad", "dtype": "f16", "m": 1, "n": 2, "k": 3, "batch": 4}).name
    'bmm-dgrad-f16-4x1x2x3'
    """
    fields = {name: row[name] for name in GpuWorkload.__dataclass_fields__ if name in row}
    return GpuWorkload(**fields)
