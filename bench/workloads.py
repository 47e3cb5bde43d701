"""What the bench compares: a workload is one product, of one dtype, layout and shape, on so many threads."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .. import testing
from . import baseline
from .shapes import QUICK, QUICK_GPU, SETS, Shape

PASSES = (*testing.PRODUCTS, baseline.STEP)
LAYOUTS = ("NN", "NT", "TN")
SUITES = ("quick", *(name for name in SETS if name != "deepseek"), "all")
# Operations a second of the slower of two backends on one thread of Zen 4: to weigh what is left to do.
PACE = {"f32": 60e9, "f64": 30e9, "bf16": 100e9, "f16": 6e9}


@dataclass(frozen=True)
class Workload:
    """One comparison. ``layout`` says how A and B lie in memory; the gradient of C lies by rows."""

    product: str
    dtype: str
    layout: str
    m: int
    n: int
    k: int
    threads: int = 1
    device: str = "cpu"

    @property
    def name(self) -> str:
        where = f"{self.threads}t" if self.device == "cpu" else self.device
        return f"{self.product}-{self.dtype}-{self.layout}-{self.m}x{self.n}x{self.k}-{where}"

    @property
    def shape(self) -> Shape:
        return self.m, self.n, self.k

    @property
    def torch_dtype(self) -> torch.dtype:
        return testing.DTYPES[self.dtype]

    @property
    def flops(self) -> int:
        return baseline.flops(*self.shape, self.product)

    @property
    def summed(self) -> int:
        """How many products an element of the result is the sum of: the fewest, in a step."""
        m, n, k = self.shape
        return {"forward": k, "dgrad": n, "wgrad": m}.get(self.product, min(m, n))

    @property
    def held(self) -> int:
        """Bytes of A, B and the gradient."""
        m, n, k = self.shape
        return (m * k + k * n + m * n) * self.torch_dtype.itemsize

    @property
    def given(self) -> int:
        """Bytes of the results."""
        m, n, k = self.shape
        sizes = {"forward": m * n, "dgrad": m * k, "wgrad": k * n}
        return sizes.get(self.product, sum(sizes.values())) * self.torch_dtype.itemsize

    @property
    def moved(self) -> int:
        """Bytes that have to be read or written: each factor and each result once, for each of the products."""
        return self.held * (3 if self.product == baseline.STEP else 1)

    def weight(self, seconds: float, rounds: int = 6, backends: int = 3) -> float:
        """About how many seconds the comparison takes where ``seconds`` are asked for."""
        if self.device != "cpu":
            return seconds + 1.0
        return seconds + 0.3 + rounds * backends * self.flops / PACE[self.dtype] / self.threads


def of_row(row: dict[str, Any]) -> Workload:
    """The workload that a row was measured of.

    >>> of_row({"product": "dgrad", "dtype": "f32", "layout": "NN", "m": 1, "n": 2, "k": 3, "rounds": 5}).name
    'dgrad-f32-NN-1x2x3-1t'
    """
    return Workload(**{name: row[name] for name in Workload.__dataclass_fields__ if name in row})


def shapes(suite: str, device: str) -> tuple[Shape, ...]:
    """The shapes of a suite.

    >>> shapes("small", "cpu")[:3]
    ((1, 1, 1), (2, 2, 2), (4, 4, 4))
    """
    quick = QUICK if device == "cpu" else QUICK_GPU
    if suite == "quick":
        return quick
    sets = SETS.values() if suite == "all" else [SETS[suite]]
    return tuple(dict.fromkeys([*(quick if suite == "all" else ()), *itertools.chain(*sets)]))


def plan(
    suite: str, device: str, dtypes: Sequence[str], passes: Sequence[str], threads: Sequence[int], max_gflop: float
) -> tuple[list[Workload], int]:
    """The workloads of a run in the order of measuring, and how many were left out as larger than ``max_gflop``.

    A shape is met in every layout forward. Its gradients and the step read operands that lie by rows, and turn
    them by their strides.

    >>> planned, larger = plan("cubes", "cpu", ["f32"], ["forward"], [1], max_gflop=1)
    >>> [workload.name for workload in planned][:4], larger
    (['forward-f32-NN-64x64x64-1t', 'forward-f32-NT-64x64x64-1t', 'forward-f32-TN-64x64x64-1t', \
'forward-f32-NN-128x128x128-1t'], 9)
    """
    every = [
        Workload(product, dtype, layout, *shape, threads=count, device=device)
        for count, shape, dtype, product in itertools.product(threads, shapes(suite, device), dtypes, passes)
        for layout in (LAYOUTS if product == "forward" else LAYOUTS[:1])
    ]
    kept = [workload for workload in every if workload.flops <= max_gflop * 1e9]
    return kept, len(every) - len(kept)
