"""docs/derivation.md, formula by formula: each has a case here that holds its text and evaluates it.

A case is registered under the formula's id with the formula as the page states it, so that neither can change
alone. C is linear in each single element of A and of B: a difference over a whole step of one is its exact
derivative, which is how derivatives are taken here, independently of any gradient formula.
"""

import re
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from matmul_grad import reference

PAGE = Path(__file__).parents[2] / "docs" / "derivation.md"
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


def stated() -> dict[str, str]:
    """Each formula of the page by its id, without the matrices' numbers and without white space."""
    found = {}
    for block in re.findall(r"```math\n(.*?)\n```", PAGE.read_text(encoding="utf-8"), re.DOTALL):
        text, ids = re.subn(r"\\tag\{.*?\}", "", block), re.findall(r"\\tag\{(.*?)\}", block)
        assert len(ids) == 1, f"a formula needs one id: {block}"
        assert ids[0] not in found, f"two formulas are called {ids[0]}"
        found[ids[0]] = squeezed(re.sub(r"(\\begin\{bmatrix\}).*?(\\end\{bmatrix\})", r"\1\2", text[0]))
    return found


def matrices(name: str) -> list[Tensor]:
    """The matrices of numbers in a formula, as the page states them."""
    block = re.search(rf"```math\n([^`]*?)\\tag\{{{name}\}}", PAGE.read_text(encoding="utf-8"))
    assert block, name
    return [
        torch.tensor([[number(x) for x in row.split("&")] for row in rows.split(r"\\")], dtype=torch.float64)
        for rows in re.findall(r"\\begin\{bmatrix\}(.*?)\\end\{bmatrix\}", block[1])
    ]


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


@formula("D1", r"A = \begin{bmatrix}\end{bmatrix}, \qquad B = \begin{bmatrix}\end{bmatrix}")
def _() -> None:
    a, b = matrices("D1")
    assert_equal(a, A)
    assert_equal(b, B)


@formula("D2", r"c_{ij} = \sum_{p=1}^{4} a_{ip}\, b_{pj}")
def _() -> None:
    for i in range(2):
        for j in range(3):
            assert_equal(C[i, j], sum(A[i, p] * B[p, j] for p in range(4)))
    assert_equal(reference.exact(A, B), C)


@formula(
    "D3",
    r"""c_{23} = a_{21} b_{13} + a_{22} b_{23} + a_{23} b_{33} + a_{24} b_{43}
        = 4 \cdot 3 + 7 \cdot 2 + (-9) \cdot 0 + 3 \cdot 1 = 29""",
)
def _() -> None:
    assert_equal(C[1, 2], A[1, 0] * B[0, 2] + A[1, 1] * B[1, 2] + A[1, 2] * B[2, 2] + A[1, 3] * B[3, 2])
    assert_equal(A[1], torch.tensor([4, 7, -9, 3]))
    assert_equal(B[:, 2], torch.tensor([3, 2, 0, 1]))
    assert_equal(C[1, 2], 4 * 3 + 7 * 2 + (-9) * 0 + 3 * 1)
    assert_equal(C[1, 2], 29)


@formula("D4", r"C = \begin{bmatrix}\end{bmatrix}")
def _() -> None:
    (c,) = matrices("D4")
    assert_equal(c, C)


@formula("D5", r"L = \frac{1}{6} \sum_{i=1}^{2} \sum_{j=1}^{3} c_{ij} = 24")
def _() -> None:
    assert_equal(C.sum() / 6, 24)
    assert_equal(example.loss, 24)


@formula("D6", r"g_{ij} = \frac{\partial L}{\partial c_{ij}} = \frac{1}{6}")
def _() -> None:
    sixths = torch.full((2, 3), 1 / 6, dtype=torch.float64)
    assert_near(slopes(mean, C), sixths)
    assert_equal(G, sixths)


@formula(
    "D7",
    r"""\frac{\partial c_{2j}}{\partial a_{23}} = b_{3j}, \qquad
        \frac{\partial c_{1j}}{\partial a_{23}} = 0""",
)
def _() -> None:
    moved = rate(lambda a: a @ B, A, 1, 2)
    assert_equal(moved[1], B[2])
    assert_equal(moved[0], torch.zeros(3))


@formula("D8", r"\frac{\partial c_{ij}}{\partial a_{rp}} = \delta_{ir}\, b_{pj}")
def _() -> None:
    for r in range(2):
        for p in range(4):
            moved = rate(lambda a: a @ B, A, r, p)
            assert_equal(moved, torch.stack([float(i == r) * B[p] for i in range(2)]))


@formula(
    "D9",
    r"""\frac{\partial L}{\partial a_{rp}}
        = \sum_{i=1}^{2} \sum_{j=1}^{3} 
          \frac{\partial L}{\partial c_{ij}} \frac{\partial c_{ij}}{\partial a_{rp}}
        = \sum_{i=1}^{2} \sum_{j=1}^{3} g_{ij}\, \delta_{ir}\, b_{pj} = \sum_{j=1}^{3} g_{rj}\, b_{pj}""",
)
def _() -> None:
    for r in range(2):
        for p in range(4):
            derivative = rate(lambda a: mean(a @ B), A, r, p)
            assert_near(derivative, (slopes(mean, C) * rate(lambda a: a @ B, A, r, p)).sum())
            assert_near(derivative, sum(G[i, j] * (i == r) * B[p, j] for i in range(2) for j in range(3)))
            assert_near(derivative, sum(G[r, j] * B[p, j] for j in range(3)))


@formula(
    "D10",
    r"""\frac{\partial L}{\partial a_{23}} = g_{21} b_{31} + g_{22} b_{32} + g_{23} b_{33}
        = \frac{-1 - 5 + 0}{6} = -1""",
)
def _() -> None:
    assert_near(rate(lambda a: mean(a @ B), A, 1, 2), -1)
    assert_near(G[1, 0] * B[2, 0] + G[1, 1] * B[2, 1] + G[1, 2] * B[2, 2], -1)
    assert_equal(B[2], torch.tensor([-1, -5, 0]))


@formula(
    "D11",
    r"""\sum_{j=1}^{3} g_{rj}\, b_{pj} = \sum_{j=1}^{3} g_{rj}\, (B^\top)_{jp} = (G B^\top)_{rp}""",
)
def _() -> None:
    g = integers(2, 3)
    for r in range(2):
        for p in range(4):
            assert_equal(sum(g[r, j] * B[p, j] for j in range(3)), sum(g[r, j] * B.T[j, p] for j in range(3)))
            assert_equal(sum(g[r, j] * B[p, j] for j in range(3)), (g @ B.T)[r, p])


@formula("D12", r"\frac{\partial L}{\partial A} = G B^\top = \begin{bmatrix}\end{bmatrix}")
def _() -> None:
    (grad_a,) = matrices("D12")
    assert_near(slopes(lambda a: mean(a @ B), A), grad_a)
    assert_near(G @ B.T, grad_a)
    assert_near(example.grad_a, grad_a)


@formula(
    "D13",
    r"""\frac{\partial c_{i2}}{\partial b_{32}} = a_{i3}, \qquad
        \frac{\partial c_{i1}}{\partial b_{32}} = \frac{\partial c_{i3}}{\partial b_{32}} = 0""",
)
def _() -> None:
    moved = rate(lambda b: A @ b, B, 2, 1)
    assert_equal(moved[:, 1], A[:, 2])
    assert_equal(moved[:, [0, 2]], torch.zeros(2, 2))


@formula("D14", r"\frac{\partial c_{ij}}{\partial b_{ps}} = \delta_{js}\, a_{ip}")
def _() -> None:
    for p in range(4):
        for s in range(3):
            moved = rate(lambda b: A @ b, B, p, s)
            assert_equal(moved, torch.stack([float(j == s) * A[:, p] for j in range(3)], dim=1))


@formula(
    "D15",
    r"""\frac{\partial L}{\partial b_{ps}} = \sum_{i=1}^{2} \sum_{j=1}^{3} g_{ij}\, \delta_{js}\, a_{ip}
        = \sum_{i=1}^{2} a_{ip}\, g_{is}""",
)
def _() -> None:
    for p in range(4):
        for s in range(3):
            derivative = rate(lambda b: mean(A @ b), B, p, s)
            assert_near(derivative, sum(G[i, j] * (j == s) * A[i, p] for i in range(2) for j in range(3)))
            assert_near(derivative, sum(A[i, p] * G[i, s] for i in range(2)))


@formula(
    "D16",
    r"""\frac{\partial L}{\partial b_{32}} = a_{13} g_{12} + a_{23} g_{22} = \frac{3 - 9}{6} = -1""",
)
def _() -> None:
    assert_near(rate(lambda b: mean(A @ b), B, 2, 1), -1)
    assert_near(A[0, 2] * G[0, 1] + A[1, 2] * G[1, 1], -1)
    assert_equal(A[:, 2], torch.tensor([3, -9]))


@formula("D17", r"\frac{\partial L}{\partial B} = A^\top G = \begin{bmatrix}\end{bmatrix}")
def _() -> None:
    (grad_b,) = matrices("D17")
    assert_near(slopes(lambda b: mean(A @ b), B), grad_b)
    assert_near(A.T @ G, grad_b)
    assert_near(example.grad_b, grad_b)


@formula(
    "D18",
    r"""\underbrace{\frac{\partial L}{\partial A}}_{m \times k}
        = \underbrace{G}_{m \times n} \, \underbrace{B^\top}_{n \times k}, \qquad
        \underbrace{\frac{\partial L}{\partial B}}_{k \times n}
        = \underbrace{A^\top}_{k \times m} \, \underbrace{G}_{m \times n}""",
)
def _() -> None:
    for m, k, n in SIZES:
        a, b, g, _, _ = operands(m, k, n)
        grad_a, grad_b = reference.gradients(a, b, g)
        assert_equal(grad_a, slopes(lambda a, b=b, g=g: inner(g, a @ b), a))
        assert_equal(grad_b, slopes(lambda b, a=a, g=g: inner(g, a @ b), b))
        assert_equal(grad_a, g @ b.T)
        assert_equal(grad_b, a.T @ g)
        # Not only for a linear L: here g depends on C.
        a.requires_grad_(), b.requires_grad_()
        c = a @ b
        grad_c, grad_a, grad_b = torch.autograd.grad(c.pow(2).sum(), (c, a, b))
        assert_equal(grad_c, 2 * c)
        assert_equal(torch.cat([grad_a, grad_b.T]), torch.cat([grad_c @ b.T, (a.T @ grad_c).T]))


@formula(
    "D19",
    r"""\langle X, Y \rangle = \sum_{i} \sum_{j} x_{ij}\, y_{ij} = \operatorname{tr}(X^\top Y)""",
)
def _() -> None:
    x, y = integers(3, 5), integers(3, 5, seed=1)
    assert_equal(inner(x, y), sum(x[i, j] * y[i, j] for i in range(3) for j in range(5)))
    assert_equal(inner(x, y), torch.trace(x.T @ y))


@formula(
    "D20",
    r"""(A + \varepsilon U)(B + \varepsilon V) = A B + \varepsilon\,(U B + A V) + \varepsilon^2\, U V""",
)
def _() -> None:
    for sizes in SIZES:
        a, b, _, u, v = operands(*sizes)
        for e in (1, -3, 1 / 1024):
            assert_equal((a + e * u) @ (b + e * v), a @ b + e * (u @ b + a @ v) + e**2 * (u @ v))


@formula(
    "D21",
    r"""\langle G, U B \rangle = \langle G B^\top, U \rangle, \qquad
        \langle G, A V \rangle = \langle A^\top G, V \rangle""",
)
def _() -> None:
    for sizes in SIZES:
        a, b, g, u, v = operands(*sizes)
        assert_equal(inner(g, u @ b), inner(g @ b.T, u))
        assert_equal(inner(g, a @ v), inner(a.T @ g, v))


@formula(
    "D22",
    r"\underbrace{2mnk}_{A B} + \underbrace{2mnk}_{G B^\top} + \underbrace{2mnk}_{A^\top G} = 6mnk",
)
def _() -> None:
    for m, k, n in SIZES:
        a, b, g, _, _ = operands(m, k, n)
        for x, y in ((a, b), (g, b.T), (a.T, g)):
            with FlopCounterMode(display=False) as one:
                x @ y
            assert_equal(one.get_total_flops(), 2 * m * n * k)
        with FlopCounterMode(display=False) as step:
            (a.requires_grad_() @ b.requires_grad_()).backward(g)
        assert_equal(step.get_total_flops(), 6 * m * n * k)


@formula(
    "D23",
    r"""G = \frac{1}{mn}\, \mathbf{1}_m \mathbf{1}_n^\top \quad \Longrightarrow \quad
        G B^\top = \frac{1}{mn}\, \mathbf{1}_m (B \mathbf{1}_n)^\top, \qquad
        A^\top G = \frac{1}{mn}\, (A^\top \mathbf{1}_m)\, \mathbf{1}_n^\top""",
)
def _() -> None:
    for m, k, n in SIZES:
        a, b, _, _, _ = operands(m, k, n)
        ones_m, ones_n = torch.ones(m, 1, dtype=torch.float64), torch.ones(n, 1, dtype=torch.float64)
        g = ones_m @ ones_n.T / (m * n)
        assert_near(slopes(mean, a @ b), g)
        assert_near(g @ b.T, ones_m @ (b @ ones_n).T / (m * n))
        assert_near(a.T @ g, (a.T @ ones_m) @ ones_n.T / (m * n))


@formula(
    "D24",
    r"""\operatorname{vec}(C) = (I_m \otimes B^\top)\, \operatorname{vec}(A)
        = (A \otimes I_n)\, \operatorname{vec}(B)""",
)
def _() -> None:
    for m, k, n in SIZES:
        a, b, _, _, _ = operands(m, k, n)
        assert_equal((a @ b).reshape(-1), kron(eye(m), b.T) @ a.reshape(-1))
        assert_equal((a @ b).reshape(-1), kron(a, eye(n)) @ b.reshape(-1))


@formula(
    "D25",
    r"""J_A = \frac{\partial \operatorname{vec}(C)}{\partial \operatorname{vec}(A)} = I_2 \otimes B^\top
        = \begin{bmatrix}\end{bmatrix}""",
)
def _() -> None:
    (stated_jacobian,) = matrices("D25")
    assert_equal(stated_jacobian, kron(eye(2), B.T))
    assert_equal(stated_jacobian, jacobian(lambda a: a @ B, A))


@formula(
    "D26",
    r"""J_B = \frac{\partial \operatorname{vec}(C)}{\partial \operatorname{vec}(B)} = A \otimes I_3
        = \begin{bmatrix}\end{bmatrix}""",
)
def _() -> None:
    (stated_jacobian,) = matrices("D26")
    assert_equal(stated_jacobian, kron(A, eye(3)))
    assert_equal(stated_jacobian, jacobian(lambda b: A @ b, B))


@formula(
    "D27",
    r"""\operatorname{nnz}(J_A) \le mnk \ \text{ of } \ m^2 n k, \qquad
        \operatorname{nnz}(J_B) \le mnk \ \text{ of } \ m n^2 k""",
)
def _() -> None:
    for m, k, n in SIZES:
        a, b, _, _, _ = operands(m, k, n)
        for j, entries in (
            (jacobian(lambda a, b=b: a @ b, a), m**2 * n * k),
            (jacobian(lambda b, a=a: a @ b, b), m * n**2 * k),
        ):
            assert_equal(j.numel(), entries)
            assert_equal(j.count_nonzero(), m * n * k)
    assert jacobian(lambda a: a @ B, A).count_nonzero() < 2 * 3 * 4
    assert jacobian(lambda b: A @ b, B).count_nonzero() < 2 * 3 * 4


@formula(
    "D28",
    r"""\operatorname{zeros}(J_A) \ge 1 - \frac{1}{m}, \qquad
        \operatorname{zeros}(J_B) \ge 1 - \frac{1}{n}""",
)
def _() -> None:
    for m, k, n in SIZES:
        a, b, _, _, _ = operands(m, k, n)
        assert_near(zeros(jacobian(lambda a, b=b: a @ b, a)), 1 - 1 / m)
        assert_near(zeros(jacobian(lambda b, a=a: a @ b, b)), 1 - 1 / n)
    assert zeros(jacobian(lambda a: a @ B, A)) > 1 - 1 / 2
    assert zeros(jacobian(lambda b: A @ b, B)) > 1 - 1 / 3


def zeros(x: Tensor) -> float:
    return 1 - x.count_nonzero().item() / x.numel()


@formula(
    "D29",
    r"""48 \left(1 - \tfrac{1}{2}\right) = 24, \qquad 72 \left(1 - \tfrac{1}{3}\right) = 48""",
)
def _() -> None:
    a, b = integers(2, 4), integers(4, 3)
    for j, entries, empty in ((jacobian(lambda a: a @ b, a), 48, 24), (jacobian(lambda b: a @ b, b), 72, 48)):
        assert_equal(j.numel(), entries)
        assert_equal(entries - j.count_nonzero(), empty)


@formula("D30", r"4\, m^2 n k = 4 \cdot 2^{40}, \qquad 4\, m k = 4 \cdot 2^{20}")
def _() -> None:
    m = n = k = 1024
    size = torch.float32.itemsize
    assert_equal(size * (m * n) * (m * k), 4 * 2**40)
    assert_equal(size * m * k, 4 * 2**20)


@formula(
    "D31",
    r"""J_A^\top \operatorname{vec}(G) = (I_m \otimes B)\, \operatorname{vec}(G)
        = \operatorname{vec}(G B^\top)""",
)
def _() -> None:
    for m, k, n in SIZES:
        a, b, g, _, _ = operands(m, k, n)
        expected = (g @ b.T).reshape(-1)
        assert_equal(jacobian(lambda a, b=b: a @ b, a).T @ g.reshape(-1), expected)
        assert_equal(kron(eye(m), b) @ g.reshape(-1), expected)


@formula(
    "D32",
    r"""J_B^\top \operatorname{vec}(G) = (A^\top \otimes I_n)\, \operatorname{vec}(G)
        = \operatorname{vec}(A^\top G)""",
)
def _() -> None:
    for m, k, n in SIZES:
        a, b, g, _, _ = operands(m, k, n)
        expected = (a.T @ g).reshape(-1)
        assert_equal(jacobian(lambda b, a=a: a @ b, b).T @ g.reshape(-1), expected)
        assert_equal(kron(a.T, eye(n)) @ g.reshape(-1), expected)


def second(a: Tensor, b: Tensor, g: Tensor, u: Tensor, v: Tensor) -> Tensor:
    return inner(u, g @ b.T) + inner(v, a.T @ g)


@formula("D33", r"S = \langle U, G B^\top \rangle + \langle V, A^\top G \rangle")
def _() -> None:
    for sizes in SIZES:
        a, b, g, u, v = operands(*sizes)
        grad_a, grad_b = reference.gradients(a, b, g)
        assert_equal(second(a, b, g, u, v), inner(u, grad_a) + inner(v, grad_b))
        # With U and V coming down to dA and dB, the gradients of S are torch's double backward.
        leaves = a, b, g = [x.requires_grad_() for x in (a, b, g)]
        once = torch.autograd.grad(a @ b, (a, b), g, create_graph=True)
        twice = torch.autograd.grad(once, leaves, (u, v))
        for actual, expected in zip(twice, torch.autograd.grad(second(*leaves, u, v), leaves), strict=True):
            assert_equal(actual, expected)


@formula("D34", r"\frac{\partial S}{\partial G} = U B + A V")
def _() -> None:
    for sizes in SIZES:
        a, b, g, u, v = operands(*sizes)
        assert_equal(slopes(lambda g, a=a, b=b, u=u, v=v: second(a, b, g, u, v), g), u @ b + a @ v)


@formula(
    "D35",
    r"\frac{\partial S}{\partial A} = G V^\top, \qquad \frac{\partial S}{\partial B} = U^\top G",
)
def _() -> None:
    for sizes in SIZES:
        a, b, g, u, v = operands(*sizes)
        assert_equal(slopes(lambda a, b=b, g=g, u=u, v=v: second(a, b, g, u, v), a), g @ v.T)
        assert_equal(slopes(lambda b, a=a, g=g, u=u, v=v: second(a, b, g, u, v), b), u.T @ g)


@formula(
    "D36",
    r"""\operatorname{address}\big((B^\top)_{jp}\big) = \operatorname{address}(b_{pj})
        = \beta + (p - 1)\, s_0 + (j - 1)\, s_1""",
)
def _() -> None:
    storage = integers(20, 30)
    for b in (storage, storage.T, storage[2:7, 3:9], storage[::2, ::3], storage[:1].expand(5, 30)):
        s0, s1 = b.stride()
        assert b.T.stride() == (s1, s0)
        for p in range(1, b.shape[0] + 1):
            for j in range(1, b.shape[1] + 1):
                elements = ((p - 1) * s0 + (j - 1) * s1) * b.element_size()
                assert b[p - 1 :, j - 1 :].data_ptr() == b.data_ptr() + elements
                assert b.T[j - 1 :, p - 1 :].data_ptr() == b.data_ptr() + elements


def test_page_and_cases_have_the_same_ids() -> None:
    assert list(stated()) == [f"D{i}" for i in range(1, len(stated()) + 1)]
    assert set(stated()) == set(cases)


def test_page_refers_only_to_ids_that_it_has() -> None:
    assert set(re.findall(r"\((D\d+)\)", PAGE.read_text(encoding="utf-8"))) <= set(stated())


def test_page_states_nothing_without_an_id() -> None:
    prose = re.sub(r"```math\n.*?\n```", "", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert "$$" not in prose
    relations = [inline for inline in re.findall(r"\$([^$]+)\$", prose) if re.search(r"=|<|>|\\[lg]e\b", inline)]
    assert not relations


@pytest.mark.parametrize("name", list(cases))
def test_formula(name: str) -> None:
    text, case = cases[name]
    assert stated()[name] == text, "the page and this case state different formulas"
    case()
