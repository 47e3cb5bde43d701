"""Formulas C1 to C29 of docs/convolution.md: the convolution as a product, and its two gradients."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from .tools import assert_equal, formula, inner, integers, matrices, rate, slopes
from .windows import LINES, Case, Setting, at, every, filled, general

X = torch.tensor([[1, 2, 0], [3, -1, 4], [2, 5, -2]], dtype=torch.float64)
W = torch.tensor([[2, -1], [1, 3]], dtype=torch.float64)
G = torch.tensor([[1, 2], [3, 1]], dtype=torch.float64)


def conv(x: Tensor, w: Tensor) -> Tensor:
    return functional.conv2d(x[None, None], w[None, None])[0, 0]


def loss(x: Tensor, w: Tensor) -> Tensor:
    return inner(G, conv(x, w))


def patches(x: Tensor) -> Tensor:
    return functional.unfold(x[None, None], 2)[0]


Y, P = conv(X, W), patches(X)
PLACES = list(every(2, 2))


@formula("C1", r"X = \begin{bmatrix}\end{bmatrix}, \qquad W = \begin{bmatrix}\end{bmatrix}")
def _() -> None:
    x, w = matrices("C1")
    assert_equal(x, X)
    assert_equal(w, W)


@formula("C2", r"y_{ij} = \sum_{a=0}^{1} \sum_{b=0}^{1} w_{ab}\, x_{i+a,\,j+b}")
def _() -> None:
    for i, j in PLACES:
        assert_equal(Y[i, j], sum(W[a, b] * X[i + a, j + b] for a, b in PLACES))


@formula(
    "C3",
    r"""y_{01} = w_{00} x_{01} + w_{01} x_{02} + w_{10} x_{11} + w_{11} x_{12}
        = 2 \cdot 2 + (-1) \cdot 0 + 1 \cdot (-1) + 3 \cdot 4 = 15""",
)
def _() -> None:
    assert_equal(W.flatten(), torch.tensor([2, -1, 1, 3]))
    assert_equal(torch.stack([X[0, 1], X[0, 2], X[1, 1], X[1, 2]]), torch.tensor([2, 0, -1, 4]))
    assert_equal(Y[0, 1], W[0, 0] * X[0, 1] + W[0, 1] * X[0, 2] + W[1, 0] * X[1, 1] + W[1, 1] * X[1, 2])
    assert_equal(Y[0, 1], 2 * 2 + (-1) * 0 + 1 * (-1) + 3 * 4)
    assert_equal(Y[0, 1], 15)


@formula("C4", r"Y = \begin{bmatrix}\end{bmatrix}, \qquad G = \begin{bmatrix}\end{bmatrix}")
def _() -> None:
    y, g = matrices("C4")
    assert_equal(y, Y)
    assert_equal(g, G)


@formula(
    "C5",
    r"""L = \sum_{i=0}^{1} \sum_{j=0}^{1} g_{ij}\, y_{ij} = 95, \qquad
        \frac{\partial L}{\partial y_{ij}} = g_{ij}""",
)
def _() -> None:
    assert_equal(sum(G[i, j] * Y[i, j] for i, j in PLACES), 95)
    assert_equal(loss(X, W), 95)
    assert_equal(slopes(lambda y: inner(G, y), Y), G)


@formula("C6", r"P = \begin{bmatrix}\end{bmatrix}")
def _() -> None:
    (p,) = matrices("C6")
    assert_equal(p, P)


@formula("C7", r"p_{2a+b,\;2i+j} = x_{i+a,\,j+b}")
def _() -> None:
    (p,) = matrices("C6")
    for (a, b), (i, j) in [(tap, output) for tap in PLACES for output in PLACES]:
        assert_equal(p[2 * a + b, 2 * i + j], X[i + a, j + b])


@formula("C8", r"\operatorname{vec}(Y)^\top = \operatorname{vec}(W)^\top P")
def _() -> None:
    assert_equal(Y.flatten(), W.flatten() @ P)
    for seed in range(3):
        x, w = integers(3, 3, seed=seed), integers(2, 2, seed=seed + 9)
        assert_equal(conv(x, w).flatten(), w.flatten() @ patches(x))


@formula("C9", r"\frac{\partial y_{ij}}{\partial w_{ab}} = x_{i+a,\,j+b}")
def _() -> None:
    for a, b in PLACES:
        moved = rate(lambda w: conv(X, w), W, a, b)
        for i, j in PLACES:
            assert_equal(moved[i, j], X[i + a, j + b])


@formula(
    "C10",
    r"""\frac{\partial L}{\partial w_{ab}} = \sum_{i=0}^{1} \sum_{j=0}^{1} g_{ij}\, x_{i+a,\,j+b}""",
)
def _() -> None:
    for a, b in PLACES:
        assert_equal(rate(lambda w: loss(X, w), W, a, b), sum(G[i, j] * X[i + a, j + b] for i, j in PLACES))
    assert_equal(slopes(lambda w: loss(X, w), W), conv(X, G))  # "(C2) with G in the place of the filter"


@formula(
    "C11",
    r"""\frac{\partial L}{\partial w_{01}} = g_{00} x_{01} + g_{01} x_{02} + g_{10} x_{11} + g_{11} x_{12}
        = 1 \cdot 2 + 2 \cdot 0 + 3 \cdot (-1) + 1 \cdot 4 = 3""",
)
def _() -> None:
    derivative = rate(lambda w: loss(X, w), W, 0, 1)
    assert_equal(derivative, G[0, 0] * X[0, 1] + G[0, 1] * X[0, 2] + G[1, 0] * X[1, 1] + G[1, 1] * X[1, 2])
    assert_equal(G.flatten(), torch.tensor([1, 2, 3, 1]))
    assert_equal(derivative, 1 * 2 + 2 * 0 + 3 * (-1) + 1 * 4)
    assert_equal(derivative, 3)


@formula(
    "C12",
    r"""\operatorname{vec}\Big(\frac{\partial L}{\partial W}\Big)^\top = \operatorname{vec}(G)^\top P^\top, \qquad
        \frac{\partial L}{\partial W} = \begin{bmatrix}\end{bmatrix}""",
)
def _() -> None:
    (grad_w,) = matrices("C12")
    assert_equal(slopes(lambda w: loss(X, w), W), grad_w)
    assert_equal(G.flatten() @ P.T, grad_w.flatten())


@formula(
    "C13",
    r"""\frac{\partial y_{00}}{\partial x_{11}} = w_{11}, \qquad
        \frac{\partial y_{01}}{\partial x_{11}} = w_{10}, \qquad
        \frac{\partial y_{10}}{\partial x_{11}} = w_{01}, \qquad
        \frac{\partial y_{11}}{\partial x_{11}} = w_{00}""",
)
def _() -> None:
    moved = rate(lambda x: conv(x, W), X, 1, 1)
    assert_equal(moved, torch.stack([W[1, 1], W[1, 0], W[0, 1], W[0, 0]]).reshape(2, 2))


@formula(
    "C14",
    r"""\frac{\partial L}{\partial x_{11}} = g_{00} w_{11} + g_{01} w_{10} + g_{10} w_{01} + g_{11} w_{00}
        = 1 \cdot 3 + 2 \cdot 1 + 3 \cdot (-1) + 1 \cdot 2 = 4""",
)
def _() -> None:
    derivative = rate(lambda x: loss(x, W), X, 1, 1)
    assert_equal(derivative, G[0, 0] * W[1, 1] + G[0, 1] * W[1, 0] + G[1, 0] * W[0, 1] + G[1, 1] * W[0, 0])
    assert_equal(derivative, 1 * 3 + 2 * 1 + 3 * (-1) + 1 * 2)
    assert_equal(derivative, 4)


@formula("C15", r"\frac{\partial y_{ij}}{\partial x_{rq}} = w_{r-i,\,q-j}")
def _() -> None:
    for r, q in every(3, 3):
        moved = rate(lambda x: conv(x, W), X, r, q)
        for i, j in PLACES:
            assert_equal(moved[i, j], at(W, r - i, q - j))


@formula(
    "C16",
    r"""\frac{\partial L}{\partial x_{rq}} = \sum_{i=0}^{1} \sum_{j=0}^{1} g_{ij}\, w_{r-i,\,q-j}
        = \sum_{a=0}^{1} \sum_{b=0}^{1} w_{ab}\, g_{r-a,\,q-b}""",
)
def _() -> None:
    for r, q in every(3, 3):
        derivative = rate(lambda x: loss(x, W), X, r, q)
        assert_equal(derivative, sum(G[i, j] * at(W, r - i, q - j) for i, j in PLACES))
        assert_equal(derivative, sum(W[a, b] * at(G, r - a, q - b) for a, b in PLACES))


@formula("C17", r"\frac{\partial L}{\partial X} = \begin{bmatrix}\end{bmatrix}")
def _() -> None:
    (grad_x,) = matrices("C17")
    assert_equal(slopes(lambda x: loss(x, W), X), grad_x)


@formula(
    "C18",
    r"""\bar{w}_{ab} = w_{1-a,\,1-b}, \qquad \bar{g}_{i+1,\,j+1} = g_{ij}, \qquad
        \frac{\partial L}{\partial x_{rq}}
        = \sum_{a=0}^{1} \sum_{b=0}^{1} \bar{w}_{ab}\, \bar{g}_{r+a,\,q+b}""",
)
def _() -> None:
    rotated, bordered = torch.zeros(2, 2, dtype=torch.float64), torch.zeros(4, 4, dtype=torch.float64)
    for i, j in PLACES:
        rotated[i, j], bordered[i + 1, j + 1] = W[1 - i, 1 - j], G[i, j]
    for r, q in every(3, 3):
        derivative = rate(lambda x: loss(x, W), X, r, q)
        assert_equal(derivative, sum(rotated[a, b] * bordered[r + a, q + b] for a, b in PLACES))
    assert_equal(slopes(lambda x: loss(x, W), X), conv(bordered, rotated))  # "is a convolution too"


@formula(
    "C19",
    r"""\frac{\partial L}{\partial P} = \operatorname{vec}(W) \operatorname{vec}(G)^\top, \qquad
        \frac{\partial L}{\partial x_{rq}} = \sum_{\substack{i + a = r \\ j + b = q}}
        \Big(\frac{\partial L}{\partial P}\Big)_{2a+b,\;2i+j}""",
)
def _() -> None:
    grad_p = slopes(lambda p: inner(G.flatten(), W.flatten() @ p), P)
    assert_equal(grad_p, W.reshape(4, 1) @ G.reshape(1, 4))
    for r, q in every(3, 3):
        copies = [
            grad_p[2 * a + b, 2 * i + j] for a, b in PLACES for i, j in PLACES if (i + a, j + b) == (r, q)
        ]  # fmt: skip
        assert_equal(rate(lambda x: loss(x, W), X, r, q), sum(copies))


@formula("C20", r"H' = \left\lfloor \frac{H + 2p - d\,(K - 1) - 1}{s} \right\rfloor + 1")
def _() -> None:
    for line in LINES:
        y = functional.conv1d(torch.ones(1, 1, line.length), torch.ones(1, 1, line.taps), None, *line[2:])
        assert y.shape[-1] == (line.length + 2 * line.padding - line.dilation * (line.taps - 1) - 1) // line.stride + 1


@formula(
    "C21",
    r"""y_{nfij} = \beta_f + \sum_{c} \sum_{a} \sum_{b} w_{fcab}\; x_{n,\,c,\;si+da-p,\;sj+db-p}""",
)
def _() -> None:
    for case in general():
        y = case.forward(case.x, case.w, case.bias)

        def element(n: int, f: int, i: int, j: int, case: Case = case) -> Iterator[Tensor]:
            yield case.bias[f]
            for c, a, b in every(*case.w.shape[1:]):
                yield case.w[f, c, a, b] * at(case.x, n, c, case.rows.place(i, a), case.columns.place(j, b))

        assert_equal(filled(y.shape, element), y)


@formula(
    "C22",
    r"""\frac{\partial L}{\partial w_{fcab}}
        = \sum_{n} \sum_{i} \sum_{j} g_{nfij}\; x_{n,\,c,\;si+da-p,\;sj+db-p}, \qquad
        \frac{\partial L}{\partial \beta_f} = \sum_{n} \sum_{i} \sum_{j} g_{nfij}""",
)
def _() -> None:
    for case in general():
        _, grad_w, grad_bias = case.gradients()

        def element(f: int, c: int, a: int, b: int, case: Case = case) -> Iterator[Tensor]:
            for n, i, j in every(len(case.g), *case.g.shape[2:]):
                yield case.g[n, f, i, j] * at(case.x, n, c, case.rows.place(i, a), case.columns.place(j, b))

        assert_equal(filled(grad_w.shape, element), grad_w)
        assert_equal(case.g.sum((0, 2, 3)), grad_bias)


def outputs(line: Setting, r: int) -> list[tuple[int, int]]:
    """The taps under which element r is met, and the output of each, by division."""
    offsets = [(a, r + line.padding - line.dilation * a) for a in range(line.taps)]
    return [(a, offset // line.stride) for a, offset in offsets if offset % line.stride == 0]


@formula(
    "C23",
    r"""\frac{\partial L}{\partial x_{ncrq}} = \sum_{f} \sum_{\substack{a \\ s \,\mid\, r+p-da}} \;
        \sum_{\substack{b \\ s \,\mid\, q+p-db}} w_{fcab}\; g_{n,\,f,\;(r+p-da)/s,\;(q+p-db)/s}""",
)
def _() -> None:
    for case in general():
        grad_x, _, _ = case.gradients()

        def element(n: int, c: int, r: int, q: int, case: Case = case) -> Iterator[Tensor]:
            for f in range(len(case.w)):
                for a, i in outputs(case.rows, r):
                    for b, j in outputs(case.columns, q):
                        yield case.w[f, c, a, b] * at(case.g, n, f, i, j)

        assert_equal(filled(grad_x.shape, element), grad_x)


@formula(
    "C24",
    r"""y_{nfij} = \sum_{c=0}^{C/\gamma-1} \sum_{a} \sum_{b}
        w_{fcab}\; x_{n,\;\lfloor f \gamma / F \rfloor\, C/\gamma \,+\, c,\;si+da-p,\;sj+db-p}""",
)
def _() -> None:
    groups = 2
    for case in general(groups):
        y = case.forward(case.x, case.w, groups=groups)
        assert case.w.shape[1] == case.x.shape[1] // groups

        def element(n: int, f: int, i: int, j: int, case: Case = case) -> Iterator[Tensor]:
            filters, width = case.w.shape[:2]
            for c, a, b in every(*case.w.shape[1:]):
                channel = f * groups // filters * width + c
                yield case.w[f, c, a, b] * at(case.x, n, channel, case.rows.place(i, a), case.columns.place(j, b))

        assert_equal(filled(y.shape, element), y)
        small = [case.forward(x, w) for x, w in zip(case.x.chunk(groups, 1), case.w.chunk(groups))]
        assert_equal(torch.cat(small, 1), y)  # "small ones beside each other"


def unfolded(case: Case) -> Tensor:
    sizes, strides, paddings, dilations = zip(*((s.taps, s.stride, s.padding, s.dilation) for s in case[:2]))
    return functional.unfold(case.x, sizes, dilations, paddings, strides)


@formula(
    "C25",
    r"""\underbrace{Y}_{F \times H'V'} = \underbrace{W}_{F \times CK^2} \, \underbrace{P}_{CK^2 \times H'V'}, \qquad
        \underbrace{\frac{\partial L}{\partial W}}_{F \times CK^2}
        = \underbrace{G}_{F \times H'V'} \, \underbrace{P^\top}_{H'V' \times CK^2}, \qquad
        \underbrace{\frac{\partial L}{\partial P}}_{CK^2 \times H'V'}
        = \underbrace{W^\top}_{CK^2 \times F} \, \underbrace{G}_{F \times H'V'}""",
)
def _() -> None:
    for case in general():
        grad_x, grad_w, _ = case.gradients()
        filters, p, g = case.w.flatten(1), unfolded(case), case.g.flatten(2)
        assert_equal(filters @ p, case.forward(case.x, case.w).flatten(2))
        assert_equal((g @ p.mT).sum(0), grad_w.flatten(1))
        sizes, strides, paddings, dilations = zip(*((s.taps, s.stride, s.padding, s.dilation) for s in case[:2]))
        folded = functional.fold(filters.T @ g, case.x.shape[2:], sizes, dilations, paddings, strides)
        assert_equal(folded, grad_x)


@formula(
    "C26",
    r"""\underbrace{2 N F C K^2 H' V'}_{Y} + \underbrace{2 N F C K^2 H' V'}_{\partial L / \partial W}
        + \underbrace{2 N F C K^2 H' V'}_{\partial L / \partial X} = 6 N F C K^2 H' V'""",
)
def _() -> None:
    x, w = integers(2, 3, 9, 8).requires_grad_(), integers(5, 3, 3, 3, seed=1).requires_grad_()
    with FlopCounterMode(display=False) as forward:
        y = functional.conv2d(x, w, None, 2)
    one = 2 * 2 * 5 * 3 * 3**2 * y.shape[2] * y.shape[3]
    assert forward.get_total_flops() == one
    for leaves, products in ((w, 1), (x, 1), ((x, w), 2)):
        with FlopCounterMode(display=False) as backward:
            torch.autograd.grad(y, leaves, torch.ones_like(y), retain_graph=True)
        assert backward.get_total_flops() == products * one


@formula("C27", r"\frac{C K^2 H' V'}{C H V} \approx \frac{K^2}{s^2}")
def _() -> None:
    for taps, stride, padding in ((3, 1, 1), (3, 2, 1), (7, 2, 3), (1, 1, 0), (4, 4, 0)):
        image = torch.zeros(1, 2, 224, 224)
        ratio = functional.unfold(image, taps, 1, padding, stride).numel() / image.numel()
        assert abs(ratio - taps**2 / stride**2) <= 0.02 * ratio


@formula(
    "C28",
    r"""K = s, \quad p = 0, \quad d = 1, \quad K \mid H: \qquad P_{(c,a),\,i} = x_{c,\,Ki+a}""",
)
def _() -> None:
    x, k = integers(2, 12), 3
    view = x.view(2, 4, k).permute(0, 2, 1)  # (channel, tap, output) without a copy
    p = functional.unfold(x[None, :, None], (1, k), stride=(1, k))[0]
    assert_equal(view.reshape(2 * k, 4), p)
    for c, a, i in every(2, k, 4):
        assert_equal(p[c * k + a, i], x[c, k * i + a])
    assert_equal(functional.unfold(x[None, :, None], 1)[0], x)  # "P is the image itself"


@formula(
    "C29",
    r"""S = \left\langle U, \frac{\partial L}{\partial X} \right\rangle
        + \left\langle V, \frac{\partial L}{\partial W} \right\rangle \quad \Longrightarrow \quad
        \frac{\partial S}{\partial G} = W * U + V * X""",
)
def _() -> None:
    for case in general():
        u, v = integers(*case.x.shape, seed=5), integers(*case.w.shape, seed=6)
        x, w, g = (leaf.clone().requires_grad_() for leaf in (case.x, case.w, case.g))
        grad_x, grad_w = torch.autograd.grad(case.forward(x, w), (x, w), g, create_graph=True)
        for_g, for_x, for_w = torch.autograd.grad(inner(u, grad_x) + inner(v, grad_w), (g, x, w))
        assert_equal(for_g, case.forward(u, case.w) + case.forward(case.x, v))
        assert_equal(for_x, case._replace(w=v).gradients()[0])  # "the gradient of an image with V as the filter"
        assert_equal(for_w, case._replace(x=u).gradients()[1])  # "the gradient of a filter with U as the image"
