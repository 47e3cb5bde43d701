"""This package and torch on the same operands: what `check` and the bench time, and check before."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from .. import api, reference, testing

__all__ = ["IMPLEMENTATIONS", "OURS", "STEP", "TORCH", "Operands", "assert_correct", "draw", "flops", "work"]

Mm = Callable[[Tensor, Tensor], Tensor]
TORCH, OURS = "torch", "matmul_grad"
STEP = "step"  # forward and both gradients through autograd
# An error is at most this many roundings of ‖row‖·‖column‖: for independent values of mean zero that holds
# for any length and order of the sum. Zen 4, n = 8-2048: 2.9 at most here, 2.0 in torch.
ROUNDINGS = 8
ROWS = 8  # of a float64 result are judged so: its oracle is slow

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


def assert_correct(mm: Mm, m: int, n: int, k: int, dtype: torch.dtype, *, seed: int = 0, device: str = "cpu") -> None:
    """Forward, dgrad and wgrad: every bit on integers, the size of the error on normal operands.

    The error is not held against torch's here: at n = 256 torch may sum in several lanes, whose error is
    half of one chain's, and a check must not hang on that. `check` shows both errors.

    >>> assert_correct(torch.mm, 5, 6, 7, torch.float32)
    """
    whole = draw(m, n, k, dtype, seed=seed, device=device, values="integers")
    normal = draw(m, n, k, dtype, seed=seed, device=device)
    for product in testing.PRODUCTS:
        what = f"{product} {testing.SHORT[dtype]} {m}x{n}x{k}"
        x, y = whole.of(product)
        testing.assert_same_bits(mm(x, y), reference.forward(x, y).to(dtype), f"{what}, integers")
        x, y = normal.of(product)
        assert_small_error(mm(x, y), x, y, what)


def assert_small_error(result: Tensor, x: Tensor, y: Tensor, what: str = "") -> None:
    """The worst error is within ROUNDINGS of ‖row‖·‖column‖; for operands of mean zero that do not repeat.

    >>> operands = draw(5, 6, 7, torch.float32)
    >>> assert_small_error(torch.mm(operands.a, operands.b), operands.a, operands.b)
    """
    if result.numel() == 0:
        return
    if result.dtype == torch.float64:
        rows = torch.linspace(0, len(x) - 1, min(ROWS, len(x)), device=x.device).long()
        x, result = x[rows], result[rows]
    result, x, y = result.cpu(), x.cpu(), y.cpu()
    norms = float(x.double().norm(dim=1).max() * y.double().norm(dim=0).max())
    error, limit = testing.worst_error(result, x, y), ROUNDINGS * torch.finfo(result.dtype).eps / 2 * norms
    assert error <= limit, f"{what}: error {error:.3e} > {ROUNDINGS} roundings of ‖row‖·‖column‖, {limit:.3e}"


def flops(m: int, n: int, k: int, product: str) -> int:
    """Floating-point operations: a multiplication and an addition for each of m·n·k, thrice for a step.

    >>> flops(2, 3, 4, "wgrad"), flops(2, 3, 4, STEP)
    (48, 144)
    """
    return 2 * m * n * k * (3 if product == STEP else 1)
