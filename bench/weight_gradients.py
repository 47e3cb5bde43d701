"""The part of `bench training` on weight gradients in float32, of a layer whose gradient is there already.

    G += dCᵀ · A

time      G += dCᵀ · A in the product, over dCᵀ · A into new memory, and over that and an addition, as torch has it
memory    what a step of forward and backward takes at its peak, beyond what was there
error     of G after microbatches, in float32 roundings of the sum of |products|: root mean square, and the worst

The targets are those of issue 15.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

import matmul_grad

from .. import ops, testing
from . import timer
from .devices import reset_peak, status

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
PARTS = (1, 16, 256)  # microbatches
MOST_TIME, MOST_ERROR = 1.05, 2.0


class Layer(NamedTuple):
    """A (rows, k) times the transpose of a weight (n, k)."""

    rows: int
    k: int
    n: int

    def __str__(self) -> str:
        return f"{self.rows}×{self.k}→{self.n}"


LAYERS = (Layer(512, 768, 3072), Layer(512, 3072, 768), Layer(2048, 768, 768), Layer(128, 768, 768))
QUICK = (Layer(64, 48, 80),)


def calls(layer: Layer, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """The weight gradient of a layer: alone, added in the product, and added afterwards."""
    a, grad = torch.randn(layer.rows, layer.k, dtype=dtype), torch.randn(layer.rows, layer.n, dtype=dtype)
    kept = torch.zeros(layer.n, layer.k)

    def plain() -> Tensor:
        return ops.compute(grad.t(), a, out=torch.empty_like(kept))

    return {
        "plain": plain,
        "accumulated": lambda: ops.accumulate(grad.t(), a, kept),
        "added": lambda: kept.add_(plain()),
    }


def error(layer: Layer, dtype: torch.dtype, parts: int, ours: bool) -> tuple[float, float]:
    """Of the gradient of so many microbatches, as ``testing.roundings_of_sums`` has it."""
    rows = max(1, layer.rows // parts) * parts
    a, grad = torch.randn(rows, layer.k, dtype=dtype), torch.randn(rows, layer.n, dtype=dtype)
    made = _layer(layer, dtype, ours)
    for x, dc in zip(a.chunk(parts), grad.chunk(parts), strict=True):
        made(x).backward(dc)
    assert made.weight.grad is not None
    return testing.roundings_of_sums(made.weight.grad, grad.t(), a)


def _layer(layer: Layer, dtype: torch.dtype, ours: bool) -> nn.Linear:
    made = (
        matmul_grad.Linear(layer.k, layer.n, bias=False, dtype=dtype, accumulate=True)
        if ours
        else nn.Linear(layer.k, layer.n, bias=False, dtype=dtype)
    )
    if dtype != torch.float32:
        made.weight.grad_dtype = torch.float32
    return made


def peak(layer: Layer, dtype: str, ours: bool) -> int:
    """Bytes that a step takes at its peak, in a process of its own; 0 where the system does not tell."""
    call = f"print(w.peak_here(w.Layer(*{tuple(layer)}), {dtype!r}, {ours}))"
    code = f"from matmul_grad.bench import weight_gradients as w; {call}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return int(done.stdout)


def peak_here(layer: Layer, dtype: str, ours: bool) -> int:
    torch.set_num_threads(1)
    peak = 0
    for each in (Layer(8, 8, 8), layer):  # the first loads what a step needs
        made = _layer(each, DTYPES[dtype], ours)
        made.weight.grad = torch.ones(each.n, each.k)
        a, grad = (torch.randn(each.rows, size, dtype=DTYPES[dtype]) for size in (each.k, each.n))
        if not reset_peak():
            return 0
        before = status("VmRSS")
        made(a).backward(grad)
        peak = max(0, status("VmHWM") - before)
    return peak


def row(layer: Layer, dtype: str, seconds: float) -> tuple[str, list[str]]:
    """A line of the table, and which targets it misses."""
    times = timer.interleaved(calls(layer, DTYPES[dtype]), seconds)
    ratio, saved = (timer.ratio(times[a], times[b]) for a, b in (("accumulated", "plain"), ("added", "accumulated")))
    errors = {ours: [error(layer, DTYPES[dtype], parts, ours) for parts in PARTS] for ours in (True, False)}
    peaks = [peak(layer, dtype, ours) for ours in (True, False)]
    missed = [f"time {ratio:.3f}"] * (ratio > MOST_TIME) + ["error"] * (max(errors[True])[0] > MOST_ERROR)
    missed += ["memory"] * (peaks[0] > peaks[1])
    milliseconds = timer.quartiles(times["accumulated"]).median * 1e3
    cells = [f"{layer!s:16}{dtype:6}{milliseconds:9.2f}{ratio:8.3f}{saved:8.3f}"]
    cells += ["".join(f"{x:8.2g}" for x, _ in errors[ours]) for ours in (True, False)]
    cells.append(f"{max(worst for _, worst in errors[True]):8.2g}")
    cells += [f"{x / 2**20:8.2f}" for x in peaks]
    return "".join(cells), missed


def show(dtypes: Sequence[str], seconds: float, quick: bool = False) -> None:
    """Print the table, a line for each layer and dtype."""
    torch.manual_seed(0)
    print(
        f"{torch.get_num_threads()} threads. ms: G += dCᵀ·A in the product; /plain: over dCᵀ·A alone; added: that and"
    )
    print(
        f"an addition, over it; medians of the rounds. errors: of {PARTS} microbatches, ours at worst. MiB: of a step."
    )
    print(f"{'':22}{'ms':>9}{'/plain':>8}{'added':>8}{'errors':>24}{'torch':>24}{'worst':>8}{'MiB':>8}{'torch':>8}")
    for dtype in dtypes:
        for layer in QUICK if quick else LAYERS:
            line, missed = row(layer, dtype, seconds)
            print(f"{line}{'  misses ' + ', '.join(missed) if missed else ''}", flush=True)
