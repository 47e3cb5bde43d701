"""This package and torch on the same operands: what `check` and the bench time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from .. import api, testing

__all__ = ["IMPLEMENTATIONS", "OURS", "STEP", "TORCH", "Operands", "draw", "flops", "work"]

Mm = Callable[[Tensor, Tensor], Tensor]
TORCH, OURS = "torch", "matmul_grad"
STEP = "step"  # forward and both gradients through autograd

# Looked up at each call, so that what is timed is what the package does now.
IMPLEMENTATIONS: Mapping[str, Mm] = {TORCH: lambda a, b: torch.mm(a, b), OURS: lambda a, b: api.mm(a, b)}


class Operands(NamedTuple):
    """a (m, k), b (k, n) and the gradient (m, n) of their product."""

    a: Tensor
    b: Tensor
    grad: Tensor

    def of(self, product: str) -> tuple[Tensor, Tensor]:
        """The two factors of forward, dgrad or wgrad: transposed by their strides."""
        views = {
            "forward": (self.a, self.b),
            "dgrad": (self.grad, self.b.mT),
            "wgrad": (self.a.mT, self.grad),
        }
        return views[product]


def draw(
    m: int, n: int, k: int, dtype: torch.dtype, *, seed: int = 0, device: str = "cpu", values: str = "normal"
) -> Operands:
    """Operands of one product and its gradients, row-major; ``values`` is normal or integers.

    >>> [tuple(operand.shape) for operand in draw(2, 3, 4, torch.float32)]
    [(2, 4), (4, 3), (2, 3)]
    """
    source = {"normal": testing.normal, "integers": testing.integers}[values]
    sizes = ((m, k), (k, n), (m, n))
    return Operands(*(source(*size, dtype, seed=3 * seed + i).to(device) for i, size in enumerate(sizes)))


def work(mm: Mm, product: str, operands: Operands) -> Callable[[], object]:
    """The call to time: one product, or the whole step with autograd's graph built and walked.

    >>> product = work(torch.mm, "dgrad", draw(2, 3, 4, torch.float32))()
    >>> grad_a, grad_b = work(torch.mm, STEP, draw(2, 3, 4, torch.float32))()
    >>> product.shape == grad_a.shape
    True
    """
    if product != STEP:
        x, y = operands.of(product)
        return lambda: mm(x, y)
    a, b = (operand.detach().requires_grad_() for operand in operands[:2])
    return lambda: torch.autograd.grad(mm(a, b), (a, b), operands.grad)


def flops(m: int, n: int, k: int, product: str) -> int:
    """Floating-point operations: a multiplication and an addition for each of m·n·k, thrice for a step.

    >>> flops(2, 3, 4, "wgrad"), flops(2, 3, 4, STEP)
    (48, 144)
    """
    return 2 * m * n * k * (3 if product == STEP else 1)
