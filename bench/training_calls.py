"""What `bench training` compares: steps of an MLP, and the process that forks.

{"step": {...}, "dtype": d, "threads": n}   → {"peak bytes": {backend: bytes}}, what the step returns included
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

import matmul_grad

from .. import activation_formulas, ops
from ..kernels.cpu import driver
from . import memory, worker
from .devices import reset_peak, status
from .workloads import TORCH

FUSED, UNFUSED = "fused", "unfused"
BACKENDS = (FUSED, UNFUSED, TORCH)
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16, "f64": torch.float64}


class Step(NamedTuple):
    """Forward and all gradients of two linear layers, width → hidden → width, with an activation between them.

    Where it is gated, another layer is activated, the first one multiplied with it, and there are no biases.
    """

    rows: int
    width: int
    hidden: int
    activation: str = "gelu"
    is_gated: bool = False

    def __str__(self) -> str:
        gate = " gate" if self.is_gated else ""
        return f"{self.activation}{gate}, {self.rows} × {self.width} → {self.hidden} → {self.width}"

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Of the parameters."""
        first, last = (self.hidden, self.width), (self.width, self.hidden)
        return [first, first, last] if self.is_gated else [first, first[:1], last, last[:1]]


MLP = Step(512, 768, 3072)
SWIGLU = Step(512, 768, 3072, "silu", True)
SMALL = Step(24, 32, 48)


def forward(name: str, step: Step) -> Callable[..., Tensor]:
    """Of x, then weight and bias of each layer, or the weights of the first layer, of its gate, and of the last one."""
    linear = functional.linear if name == TORCH else matmul_grad.linear
    activate = activation_formulas.BY_TORCH[step.activation]

    def fused(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        return matmul_grad.linear(matmul_grad.linear(x, w1, b1, step.activation), w2, b2)

    def unfused(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        return linear(activate(linear(x, w1, b1)), w2, b2)

    def gated(x: Tensor, w1: Tensor, gate: Tensor, w2: Tensor) -> Tensor:
        return matmul_grad.linear(matmul_grad.gated_linear(x, w1, gate, activation=step.activation), w2)

    def gated_unfused(x: Tensor, w1: Tensor, gate: Tensor, w2: Tensor) -> Tensor:
        return linear(activate(linear(x, gate)) * linear(x, w1), w2)

    return ((gated if step.is_gated else fused), (gated_unfused if step.is_gated else unfused))[name != FUSED]


def draw(step: Step, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """x, the parameters, and the gradient of the result. Weights as a layer begins with: results are of x's size.

    In place, since memory that a temporary has freed would be used by the step, whose peak is measured.
    """
    generator = torch.Generator().manual_seed(0)

    def normal(shape: tuple[int, ...], scale: float = 1.0) -> Tensor:
        return torch.empty(shape, dtype=dtype).normal_(generator=generator).mul_(scale)

    weights = [normal(shape, shape[1] ** -0.5 if len(shape) == 2 else 1.0) for shape in step.shapes]
    leaves = [x.requires_grad_() for x in (normal((step.rows, step.width)), *weights)]
    return *leaves, normal((step.rows, step.width))


def call_of(name: str, step: Step, operands: Sequence[Tensor]) -> Callable[[], tuple[Tensor, ...]]:
    """A step on operands that ``draw`` has made: the result and all gradients."""
    *leaves, grad = operands
    run = forward(name, step)

    def call() -> tuple[Tensor, ...]:
        result = run(*leaves)
        return result.detach(), *torch.autograd.grad(result, leaves, grad)

    return call


# --- memory ----------------------------------------------------------------------------------------------------------


def answer(task: worker.Message) -> worker.Message:
    """In a process that multiplies nothing: a child for each backend."""
    step, dtype = Step(*task["step"]), DTYPES[task["dtype"]]
    block = str(dtype).removeprefix("torch.")
    if not ops.native_status() and driver.supports(block):
        driver.load_all(driver.config(block))  # compiled or loaded here, once for all children
    measures = {name: functools.partial(peak, name, step, dtype, task["threads"]) for name in BACKENDS}
    return {"peak bytes": {name: memory.forked(measure)["peak bytes"] for name, measure in measures.items()}}


def peak(name: str, step: Step, dtype: torch.dtype, threads: int) -> worker.Message:
    """Bytes above what was there before the step, at its peak."""
    torch.set_num_threads(threads)
    warm = step._replace(rows=8, width=16, hidden=24)
    call_of(name, warm, draw(warm, dtype))()
    call = call_of(name, step, draw(step, dtype))
    if not reset_peak():
        raise AssertionError("the system does not reset a peak")
    before = status("VmRSS")
    result = call()
    found = status("VmHWM") - before
    del result
    return {"peak bytes": max(0, found)}


if __name__ == "__main__":
    worker.serve(answer)
