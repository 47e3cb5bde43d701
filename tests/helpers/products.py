"""Operands of each product, its exact value, and this package's function beside torch's."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import matmul_grad
from matmul_grad.testing import assert_same_bits, integers

DOUBLE = torch.float64
SCALES: list[dict[str, Any]] = [{}, {"beta": 2}, {"alpha": -1}, {"beta": 0.5, "alpha": 2}, {"beta": 0, "alpha": 0.5}]
PRODUCTS = ("mm", "bmm", "addmm", "baddbmm")


def batch_of(draw: Callable[..., Tensor], batch: int, m: int, n: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.stack([draw(m, n, dtype, seed=seed * 100 + item) for item in range(batch)])


def exact(a: Tensor, b: Tensor, source: Tensor | None = None, beta: float = 1, alpha: float = 1) -> Tensor:
    """By NumPy, without any rounding but the last."""
    product = alpha * torch.from_numpy(a.double().numpy() @ b.double().numpy())
    return (product if source is None or beta == 0 else product + beta * source.double()).to(a.dtype)


def assert_exact(actual: Tensor, expected: Tensor, what: str = "") -> None:
    assert_same_bits(actual + 0.0, expected + 0.0, what)  # 0 and -0 are one


def places(shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(name, where to write, the buffer of NaN around it) for each layout of a result."""
    *batch, m, n = shape
    front = [size + 2 for size in batch]
    inner = tuple(slice(1, 1 + size) for size in batch)
    for name, size, part in (
        ("rows", (m + 2, n + 3), lambda whole: whole[(*inner, slice(1, m + 1), slice(2, n + 2))]),
        ("columns", (n + 2, m + 3), lambda whole: whole[(*inner, slice(1, n + 1), slice(2, m + 2))].mT),
        ("sliced", (2 * m + 1, 3 * n + 1), lambda whole: whole[(*inner, slice(1, None, 2), slice(1, None, 3))]),
    ):
        whole = torch.full((*front, *size), float("nan"), dtype=dtype)
        yield name, part(whole), whole


def operands(name: str, dtype: torch.dtype = torch.float32, draw: Callable[..., Tensor] = integers) -> list[Tensor]:
    """What one of PRODUCTS is called with, without scales."""
    if "bmm" in name:
        found = [batch_of(draw, 3, 5, 7, dtype, 1), batch_of(draw, 3, 7, 4, dtype, 2)]
        return [batch_of(draw, 3, 5, 4, dtype, 3), *found] if "add" in name else found
    found = [draw(5, 7, dtype, seed=1), draw(7, 4, dtype, seed=2)]
    return [draw(5, 4, dtype, seed=3), *found] if "add" in name else found


def pair_of(name: str) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """This package's function and torch's."""
    return getattr(matmul_grad, name), torch.nn.functional.linear if name == "linear" else getattr(torch, name)
