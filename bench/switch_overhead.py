"""What the switch costs and gains: torch with it on against torch with it off, in one process, flipped in every round.

At 8 × 8 all is overhead. The two models are training steps: there it is the kernels that count.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn

import matmul_grad

from . import timer

KIND = "switch"
HELP = "torch's products and training steps with the switch on, over the same with it off"
T = TypeVar("T")
SECONDS = 4.0  # of each comparison


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"of each comparison; default: {SECONDS:g}")
    parser.add_argument("--no-models", dest="models", action="store_false", help="the overhead at 8 × 8 alone")


def run(command: argparse.Namespace) -> int:
    print(f"{torch.get_num_threads()} threads; medians of a call in µs, and of the ratios of the rounds")
    print(f"{'':24}{'off':>12}{'on':>12}{'on / off':>10}")
    for name, call in (small() | (models() if command.models else {})).items():
        times = timer.time_interleaved({"off": flipped(call, False), "on": flipped(call, True)}, command.seconds)
        ratio = timer.ratio(times["on"], times["off"])
        off, on = (statistics.median(times[side]) * 1e6 for side in ("off", "on"))
        print(f"{name:24}{off:12.2f}{on:12.2f}{ratio:10.3f}")
    return 0


def flipped(call: Callable[[], object], on: bool) -> timer.Batch:
    """A batch with the switch set; a call to get warm, and the flip, are not timed."""

    def switched(do: Callable[[], T]) -> T:
        (matmul_grad.enable if on else matmul_grad.disable)()
        try:
            return do()
        finally:
            matmul_grad.disable()

    batch = switched(lambda: timer.batch_of(call))
    return lambda: switched(batch)


def small() -> dict[str, Callable[[], object]]:
    a, b, bias, out = torch.randn(8, 8), torch.randn(8, 8), torch.randn(8), torch.empty(8, 8)
    batch, x, y = torch.randn(4, 8, 8), torch.randn(8, 8, requires_grad=True), torch.randn(8, 8, requires_grad=True)
    grad = torch.randn(8, 8)

    def step() -> None:
        x.grad = y.grad = None
        torch.mm(x, y).backward(grad)

    return {
        "mm 8": lambda: torch.mm(a, b),
        "mm 8, out": lambda: torch.mm(a, b, out=out),
        "addmm 8": lambda: torch.addmm(bias, a, b),
        "bmm 4 × 8": lambda: torch.bmm(batch, batch),
        "mm 8, whole step": step,
    }


def models() -> dict[str, Callable[[], object]]:
    mlp = nn.Sequential(nn.Linear(1024, 4096), nn.GELU(), nn.Linear(4096, 1024))
    block = nn.TransformerEncoderLayer(512, 8, 2048, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
    mask = nn.Transformer.generate_square_subsequent_mask(256)
    rows, tokens = torch.randn(512, 1024), torch.randn(8, 256, 512)

    def step(model: nn.Module, call: Callable[[], torch.Tensor]) -> Callable[[], object]:
        optimiser = torch.optim.SGD(model.parameters(), 1e-6)

        def one() -> None:
            optimiser.zero_grad()
            call().square().mean().backward()
            optimiser.step()

        return one

    return {
        "MLP, a step": step(mlp, lambda: mlp(rows)),
        "GPT block, a step": step(block, lambda: block(tokens, mask, is_causal=True)),
    }
