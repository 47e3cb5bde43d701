"""The table of formulas, and what evaluates them.

A case is registered under the formula's id with the formula as the page states it, so that neither can change
alone. C is linear in each single element of A and of B: a difference over a whole step of one is its exact
derivative, which is how derivatives are taken here, independently of any gradient formula.
"""

import math
import re
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor

from matmul_grad import reference

DOCS = Path(__file__).parents[3] / "docs"
# The pages of the tutorial by the letter of their ids.
PAGES = {
    letter: DOCS / f"{name}.md" for letter, name in zip("DCT", ("derivation", "convolution", "transposed-convolution"))
}

SIZES = [(2, 4, 3), (1, 1, 1), (3, 1, 2), (5, 2, 7), (1, 6, 4)]  # (m, k, n)
example = reference.example()
A, B, C, G = example.a, example.b, example.c, example.grad_c
cases: dict[str, tuple[str, Callable[[], None]]] = {}


def formula(name: str, text: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
    def register(case: Callable[[], None]) -> Callable[[], None]:
        assert name not in cases, f"two cases for {name}"
        cases[name] = (squeezed(text), case)
        return case

    return register


def squeezed(text: str) -> str:
    return "".join(text.split())


def text_of(letter: str) -> str:
    return PAGES[letter].read_text(encoding="utf-8")


def stated(letter: str) -> dict[str, str]:
    """Each formula of a page by its id, without the matrices' numbers and without white space."""
    found = {}
    for block in re.findall(r"```math\n(.*?)\n```", text_of(letter), re.DOTALL):
        text, ids = re.subn(r"\\tag\{.*?\}", "", block), re.findall(r"\\tag\{(.*?)\}", block)
        assert len(ids) == 1, f"a formula needs one id: {block}"
        assert ids[0] not in found, f"two formulas are called {ids[0]}"
        found[ids[0]] = squeezed(re.sub(r"(\\begin\{bmatrix\}).*?(\\end\{bmatrix\})", r"\1\2", text[0]))
    return found


def matrices(name: str, entry: Callable[[str], float] | None = None) -> list[Tensor]:
    """The matrices in a formula, as the page states them; ``entry`` is the value of an element, by default a number."""
    block = re.search(rf"```math\n([^`]*?)\\tag\{{{name}\}}", text_of(name[0]))
    assert block, name
    value = entry or number
    return [
        torch.tensor([[value(x) for x in row.split("&")] for row in rows.split(r"\\")], dtype=torch.float64)
        for rows in re.findall(r"\\begin\{bmatrix\}(.*?)\\end\{bmatrix\}", block[1])
    ]


def evaluated(text: str, **values: Tensor) -> float:
    """A sum of products of indexed letters.

    >>> evaluated("w_2 g_0 + w_0", w=torch.tensor([5, 0, 3]), g=torch.tensor([2]))
    11.0
    """
    total = 0.0
    for term in text.replace("\\", "").split("+"):
        factors = re.findall(r"([a-z]+)_(\d)", term)
        assert factors or term.strip() == "0", term
        total += math.prod(float(values[letter][int(index)]) for letter, index in factors) if factors else 0.0
    return total


def number(text: str) -> float:
    return float(Fraction(re.sub(r"\\frac\{(-?\d+)\}\{(\d+)\}", r"\1/\2", text.strip())))


def assert_equal(actual: Tensor | float, expected: Tensor | float) -> None:
    torch.testing.assert_close(tensor(actual), tensor(expected), rtol=0, atol=0)


def assert_near(actual: Tensor | float, expected: Tensor | float) -> None:
    torch.testing.assert_close(tensor(actual), tensor(expected), rtol=0, atol=1e-13)


def tensor(x: Tensor | float) -> Tensor:
    return torch.as_tensor(x, dtype=torch.float64)


def integers(*shape: int, seed: int = 0) -> Tensor:
    """Small integers, none of them zero: all sums are exact, and a zero in a Jacobian is one of structure."""
    draw = torch.Generator().manual_seed(seed)
    signs = 2 * torch.randint(0, 2, shape, generator=draw) - 1
    return (signs * torch.randint(1, 10, shape, generator=draw)).double()


def unit(like: Tensor, row: int, column: int) -> Tensor:
    e = torch.zeros_like(like)
    e[row, column] = 1
    return e


def rate(f: Callable[[Tensor], Tensor], x: Tensor, row: int, column: int) -> Tensor:
    """∂f/∂x[row, column] of a function that is linear in that element, counted from zero."""
    return f(x + unit(x, row, column)) - f(x)


def slopes(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The gradient of a scalar function that is linear in each element of x."""
    rows, columns = x.shape
    return torch.stack([rate(f, x, r, c) for r in range(rows) for c in range(columns)]).reshape(rows, columns)


def jacobian(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    rows, columns = x.shape
    return torch.stack([rate(f, x, r, c).reshape(-1) for r in range(rows) for c in range(columns)], dim=1)


def inner(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sum()


def kron(x: Tensor, y: Tensor) -> Tensor:
    # Not torch.kron, which refuses some strides.
    (m, n), (p, q) = x.shape, y.shape
    return torch.einsum("ij,kl->ikjl", x, y).reshape(m * p, n * q)


def eye(size: int) -> Tensor:
    return torch.eye(size, dtype=torch.float64)


def mean(c: Tensor) -> Tensor:
    return c.mean()


def operands(m: int, k: int, n: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A, B, G and the directions U and V, for sizes m, k, n."""
    shapes = (m, k), (k, n), (m, n), (m, k), (k, n)
    a, b, g, u, v = (integers(*shape, seed=seed) for seed, shape in enumerate(shapes))
    return a, b, g, u, v
