r"""The only oracle: the product and its two gradients in float64, and exactly.

    C  = A · B            (m,k)·(k,n)
    dA = dC · Bᵀ          (m,n)·(n,k)
    dB = Aᵀ · dC          (k,m)·(m,n)

:func:`forward` and :func:`gradients` are torch's float64, for operands of any size. :func:`exact` is
rational arithmetic, element by element, for tiny ones: float64 itself is judged by it. :func:`example` is the
worked example of docs/derivation.md.
"""

from __future__ import annotations

from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Example", "exact", "example", "forward", "gradients"]


def forward(a: Tensor, b: Tensor) -> Tensor:
    """C = A · B in float64.

    Operands of any real dtype are widened first, on the device where they are; no graph is kept.

    >>> import torch
    >>> forward(torch.tensor([[1, 2]], dtype=torch.int8), torch.tensor([[3.0], [4.0]], dtype=torch.float16))
    tensor([[11.]], dtype=torch.float64)
    """
    return torch.mm(_widened(a), _widened(b))


def gradients(a: Tensor, b: Tensor, grad_c: Tensor) -> tuple[Tensor, Tensor]:
    """dA = dC · Bᵀ and dB = Aᵀ · dC in float64, given dC = ∂L/∂C for some scalar L.

    >>> import torch
    >>> a, b = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0], [4.0]])
    >>> grad_a, grad_b = gradients(a, b, torch.tensor([[10.0]]))
    >>> grad_a.tolist(), grad_b.tolist()
    ([[30.0, 40.0]], [[10.0], [20.0]])
    """
    grad_c = _widened(grad_c)
    return torch.mm(grad_c, _widened(b).t()), torch.mm(_widened(a).t(), grad_c)


def exact(a: Tensor, b: Tensor) -> Tensor:
    """C = A · B with no rounding but the last: each element is a sum of fractions, rounded once to float64.

    A plain triple loop in Python, so for tiny sizes and finite values.

    >>> import torch
    >>> a = torch.tensor([[1e17, 1.0, -1e17]], dtype=torch.float64)
    >>> exact(a, torch.ones(3, 1)).item()
    1.0
    """
    if a.shape[1] != b.shape[0]:
        raise ValueError(f"shapes {tuple(a.shape)} and {tuple(b.shape)} cannot be multiplied")
    rows = [[Fraction(x) for x in row] for row in a.tolist()]
    columns = [[Fraction(x) for x in column] for column in b.t().tolist()]
    c = torch.empty(a.shape[0], b.shape[1], dtype=torch.float64)
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            c[i, j] = float(sum((x * y for x, y in zip(row, column, strict=True)), Fraction(0)))
    return c


class Example(NamedTuple):
    """The worked example: operands, product, loss L = mean(C) and the three gradients of L, all float64."""

    a: Tensor
    b: Tensor
    c: Tensor
    loss: Tensor
    grad_c: Tensor
    grad_a: Tensor
    grad_b: Tensor


def example() -> Example:
    """The example of docs/derivation.md: A is 2×4, B is 4×3, L = mean(C), hence dC = 1 / numel(C) everywhere.

    >>> case = example()
    >>> case.c.tolist(), case.loss.item()
    ([[-5.0, -17.0, 4.0], [50.0, 83.0, 29.0]], 24.0)
    >>> case.grad_a.round(decimals=9).tolist()
    [[1.0, 2.0, -1.0, 0.0], [1.0, 2.0, -1.0, 0.0]]
    """
    a = torch.tensor([[2, -1, 3, 0], [4, 7, -9, 3]], dtype=torch.float64)
    b = torch.tensor([[1, 2, 3], [4, 6, 2], [-1, -5, 0], [3, -4, 1]], dtype=torch.float64)
    c = forward(a, b)
    grad_c = torch.full_like(c, 1 / c.numel())
    return Example(a, b, c, c.mean(), grad_c, *gradients(a, b, grad_c))


def _widened(x: Tensor) -> Tensor:
    return x.detach().to(torch.float64)
