"""Formulas D24 to D36 of docs/derivation.md: Jacobians, the second derivative, and views."""

import torch
from torch import Tensor

from matmul_grad import reference

from .tools import (
    SIZES,
    A,
    B,
    assert_equal,
    assert_near,
    eye,
    formula,
    inner,
    integers,
    jacobian,
    kron,
    matrices,
    operands,
    slopes,
)


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
