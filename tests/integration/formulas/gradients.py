"""Formulas D1 to D23 of docs/derivation.md: the product, its two gradients, and what they cost."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from matmul_grad import reference

from .tools import (
    SIZES,
    A,
    B,
    C,
    G,
    assert_equal,
    assert_near,
    example,
    formula,
    inner,
    integers,
    matrices,
    mean,
    operands,
    rate,
    slopes,
)


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
