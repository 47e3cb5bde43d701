"""The part of `check` on weight gradients kept in float32: a bfloat16 layer over microbatches, beside torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import testing
from .console import Console, table
from .nn import Linear

ROWS, K, N = 8, 96, 80  # of a microbatch
PARTS = (1, 16, 256)
BUDGET = 2.0  # float32 roundings of the sum of |products|, root mean square


def run(console: Console, device: str, seed: int) -> list[str]:
    """The errors of both, and what is not within the budget."""
    if not hasattr(Tensor, "grad_dtype"):
        console.print("this torch keeps gradients in the dtype of their parameter")
        return []
    rows, found = [], []
    for parts in PARTS:
        generator = torch.Generator().manual_seed(seed + parts)
        a, grad = (torch.randn(parts * ROWS, size, generator=generator).bfloat16() for size in (K, N))
        ours, theirs = (error(a, grad, layer(accumulates, device)) for accumulates in (True, False))
        good = ours[0] <= BUDGET
        cells = [f"{x:.2g}" for x in (*ours, *theirs)]
        rows.append([f"{parts}", *cells, "yes" if good else "NO"])
        if not good:
            found.append(f"weight gradient of {parts} microbatches: {ours[0]:.2g} roundings, allowed {BUDGET:g}")
    table(console, ["microbatches", "error", "worst", "torch's", "worst", "agree"], rows)
    console.print(
        f"{ROWS} rows a microbatch, {K} → {N}; dW += dCᵀ·A in the product, and torch's float32 gradient.\n"
        f"error: root mean square, in float32 roundings of the sum of |products|; allowed {BUDGET:g}"
    )
    return found


def layer(accumulates: bool, device: str) -> nn.Linear:
    named: dict[str, Any] = {"bias": False, "device": device, "dtype": torch.bfloat16}
    made = Linear(K, N, accumulate=True, **named) if accumulates else nn.Linear(K, N, **named)
    made.weight.grad_dtype = torch.float32
    return made


def error(a: Tensor, grad: Tensor, made: nn.Linear) -> tuple[float, float]:
    """Of the gradient of a layer after all microbatches, beside the sum of products in float64."""
    device = made.weight.device
    for x, dc in zip(a.split(ROWS), grad.split(ROWS), strict=True):
        made(x.to(device)).backward(dc.to(device))
    assert made.weight.grad is not None
    return testing.roundings_of_sums(made.weight.grad.cpu(), grad.t(), a)
