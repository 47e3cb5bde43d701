"""Grouped products, forward and backward, beside a loop of torch.mm and torch's own: the layer of experts of a model.

The rows of x are cut into a group for each expert, balanced, or skewed so that the first has three tenths of them and
each further one seven tenths of those of the one before it. The targets are those of issue 15.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

import matmul_grad

from . import timer
from .conv_calls import instructions

KIND = "grouped"
HELP = "grouped products, forward and backward, over a loop of torch.mm and over torch's own"
SECONDS = 4.0  # of each comparison
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16, "f64": torch.float64}
TARGETS = {("f32", "loop"): 1.2, ("bf16", "torch"): 5.0}  # time of a baseline over ours, without AVX512-BF16
SKEW = 0.7


class Layer(NamedTuple):
    """x (rows, k) times the weights (experts, k, n)."""

    experts: int
    rows: int
    k: int
    n: int
    is_skewed: bool

    def __str__(self) -> str:
        return f"{self.experts} {'skewed' if self.is_skewed else 'balanced'}, {self.rows}×{self.k}→{self.n}"

    def sizes(self) -> list[int]:
        shares = [SKEW**i if self.is_skewed else 1.0 for i in range(self.experts)]
        found = [int(self.rows * share / sum(shares)) for share in shares]
        return [found[0] + self.rows - sum(found), *found[1:]]


LAYERS = [Layer(experts, 2048, 512, 512, skewed) for experts in (8, 16, 64) for skewed in (False, True)]
QUICK = [Layer(8, 64, 32, 48, True)]


class Comparison(NamedTuple):
    """Steps of this package and of the baselines on the same operands."""

    layer: Layer
    dtype: str
    steps: dict[str, Callable[[], object]]  # "matmul_grad" first


def comparisons(layers: list[Layer], dtypes: list[str]) -> Iterator[Comparison]:
    for dtype in dtypes:
        for layer in layers:
            yield Comparison(layer, dtype, steps(layer, DTYPES[dtype]))


def steps(layer: Layer, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """A forward and both gradients, by this package, by a loop of torch.mm, and by torch where it has the dtype."""
    x = torch.randn(layer.rows, layer.k, dtype=dtype, requires_grad=True)
    weights = torch.randn(layer.experts, layer.k, layer.n, dtype=dtype, requires_grad=True)
    grad, sizes = torch.randn(layer.rows, layer.n, dtype=dtype), layer.sizes()
    ends = torch.tensor(sizes).cumsum(0).to(torch.int32)

    def loop() -> Tensor:
        return torch.cat([torch.mm(part, one) for part, one in zip(x.split(sizes), weights.unbind(), strict=True)])

    def step(forward: Callable[[], Tensor]) -> object:
        return torch.autograd.grad(forward(), (x, weights), grad)

    found: dict[str, Callable[[], Tensor]] = {
        "matmul_grad": lambda: matmul_grad.grouped_mm(x, weights, offs=ends),
        "loop": loop,
    }
    if dtype != torch.float64:
        found["torch"] = lambda: torch.nn.functional.grouped_mm(x, weights, offs=ends)
    return {name: functools.partial(step, forward) for name, forward in found.items()}


def missed(dtype: str, ratios: dict[str, float]) -> str:
    """The target that is not met, if one is; that of 16 bits is for a CPU without instructions that multiply them."""
    late = [] if dtype == "bf16" and instructions(dtype) else [
        least for (name, baseline), least in TARGETS.items() if name == dtype and ratios.get(baseline, least) < least
    ]  # fmt: skip
    return f"  below {late[0]:g}" if late else ""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["f32", "bf16"])
    parser.add_argument("--threads", type=int, default=None, help="default: torch's")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"of each comparison; default: {SECONDS:g}")
    parser.add_argument("--quick", action="store_true", help="one small layer: to see it run")


def run(command: argparse.Namespace) -> int:
    seconds = 0.05 if command.quick else command.seconds
    with timer.threads(command.threads):
        print(f"{torch.get_num_threads()} threads; a step in ms, and the baselines' over it, medians of the rounds")
        print(f"{'':34}{'':6}{'ours':>9}{'loop':>8}{'torch':>8}")
        for layer, dtype, calls in comparisons(QUICK if command.quick else LAYERS, command.dtypes):
            times = timer.interleaved(calls, seconds)
            ours = times.pop("matmul_grad")
            ratios = {name: timer.ratio(found, ours) for name, found in times.items()}
            cells = "".join(f"{ratios[name]:8.2f}" if name in ratios else f"{'–':>8}" for name in ("loop", "torch"))
            print(
                f"{layer!s:34}{dtype:6}{sorted(ours)[len(ours) // 2] * 1e3:9.2f}{cells}{missed(dtype, ratios)}",
                flush=True,
            )
    return 0
