"""Formulas T1 to T18 of docs/transposed-convolution.md: the transposed convolution, its size, phases and gradients."""

from collections.abc import Iterator
from math import ceil, gcd

import torch
from torch import Tensor
from torch.nn import functional

from .tools import assert_equal, evaluated, formula, inner, integers, matrices
from .windows import LINES, Setting, at, every, filled, general

TAPS, INPUTS, IMAGE = integers(3), integers(2, seed=1), integers(5, seed=2)


def conv(x: Tensor, w: Tensor) -> Tensor:
    """In one direction with stride two, as on the page."""
    return functional.conv1d(x[None, None], w[None, None], stride=2)[0, 0]


def back(w: Tensor, x: Tensor, line: Setting, more: int = 0) -> Tensor:
    """The transposed convolution in one direction without channels."""
    return functional.conv_transpose1d(
        x[None, None], w[None, None], None, line.stride, line.padding, more, 1, line.dilation
    )[0, 0]  # fmt: skip


def length(line: Setting, inputs: int = 4) -> int:
    return line.stride * (inputs - 1) - 2 * line.padding + line.dilation * (line.taps - 1) + 1


SETTINGS = [line for line in LINES if length(line) > 0]


@formula(
    "T1",
    r"""\begin{bmatrix}\end{bmatrix} = M \begin{bmatrix}\end{bmatrix}, \qquad M = \begin{bmatrix}\end{bmatrix}""",
)
def _() -> None:
    values = {"x": IMAGE, "y": conv(IMAGE, TAPS), "w": TAPS}
    y, x, m = matrices("T1", lambda text: evaluated(text, **values))
    assert_equal(x[:, 0], IMAGE)
    assert_equal(y[:, 0], values["y"])
    assert_equal(m @ x, y)


@formula("T2", r"\frac{\partial L}{\partial x} = M^\top g = \begin{bmatrix}\end{bmatrix}")
def _() -> None:
    g = integers(2, seed=3)
    *_, m = matrices("T1", lambda text: evaluated(text, x=IMAGE, y=INPUTS, w=TAPS))
    (grad,) = matrices("T2", lambda text: evaluated(text, w=TAPS, g=g))
    x = IMAGE.clone().requires_grad_()
    (by_torch,) = torch.autograd.grad(conv(x, TAPS), x, g)
    assert_equal(grad[:, 0], by_torch)
    assert_equal(m.T @ g, by_torch)


@formula("T3", r"\langle M x, g \rangle = \langle x, M^\top g \rangle")
def _() -> None:
    for line in SETTINGS:
        z = back(w := integers(line.taps), g := integers(4, seed=1), line)
        x = integers(len(z), seed=2)
        mx = functional.conv1d(x[None, None], w[None, None], None, line.stride, line.padding, line.dilation)[0, 0]
        assert_equal(inner(mx, g), inner(x, z))


@formula(
    "T4",
    r"""z_{nfr} = \beta_f + \sum_{c} \sum_{\substack{i,\, a \\ si + da - p = r}} w_{cfa}\; x_{nci}""",
)
def _() -> None:
    for line in SETTINGS:
        x, w, bias = integers(2, 3, 4), integers(3, 2, line.taps, seed=1), integers(2, seed=2)
        z = functional.conv_transpose1d(x, w, bias, line.stride, line.padding, 0, 1, line.dilation)

        def element(
            n: int, f: int, r: int, x: Tensor = x, w: Tensor = w, b: Tensor = bias, line: Setting = line
        ) -> Iterator[Tensor]:
            yield b[f]
            for c, i, a in every(3, 4, line.taps):
                if line.place(i, a) == r:
                    yield w[c, f, a] * x[n, c, i]

        assert_equal(filled(z.shape, element), z)


@formula("T5", r"H = s\,(H' - 1) - 2p + d\,(K - 1) + 1 + o, \qquad 0 \le o < s")
def _() -> None:
    for line in SETTINGS:
        w, x = integers(line.taps), integers(4)
        returned = [n for n in range(1, 60) if line._replace(length=n).windows == 4]
        assert returned == [length(line) + o for o in range(line.stride)]
        assert [len(back(w, x, line, o)) for o in range(line.stride)] == returned


@formula(
    "T6",
    r"""\left\lfloor \frac{7 + 2 - 2 - 1}{2} \right\rfloor + 1
        = \left\lfloor \frac{8 + 2 - 2 - 1}{2} \right\rfloor + 1 = 4, \qquad 2 \cdot 3 - 2 + 2 + 1 + o = 7 + o""",
)
def _() -> None:
    seven, eight = Setting(7, 3, 2, 1), Setting(8, 3, 2, 1)
    assert (7 + 2 - 2 - 1) // 2 + 1 == (8 + 2 - 2 - 1) // 2 + 1 == seven.windows == eight.windows == 4
    for o in range(2):
        assert 2 * 3 - 2 + 2 + 1 + o == 7 + o == len(back(integers(3), integers(4), seven, o))


@formula("T7", r"z^{(p)}_r = z^{(0)}_{r+p}")
def _() -> None:
    for line in SETTINGS:
        w, x = integers(line.taps), integers(4, seed=1)
        cut, whole = back(w, x, line), back(w, x, line._replace(padding=0))
        for r in range(len(cut)):
            assert_equal(cut[r], whole[r + line.padding])
        # "the elements there follow (T4) like all others": the longer result holds what padding would have cut off.
        for o in range(1, line.stride):
            for r, z in enumerate(back(w, x, line, o)):
                assert_equal(z, at(whole, r + line.padding))


@formula("T8", r"z_{sq+\varphi-p} = \sum_{t} w_{\varphi+st}\; x_{q-t}")
def _() -> None:
    for line in [line for line in SETTINGS if line.dilation == 1]:
        w, x = integers(line.taps), integers(4, seed=1)
        z = back(w, x, line)
        for r in range(len(z)):
            q, phase = divmod(r + line.padding, line.stride)
            terms = [w[phase + line.stride * t] * at(x, q - t) for t in range(len(w[phase :: line.stride]))]
            assert_equal(z[r], sum(terms, start=torch.zeros(())))


@formula("T9", r"\sum_{\varphi=0}^{s-1} \left\lceil \frac{K - \varphi}{s} \right\rceil = K")
def _() -> None:
    for stride, taps in ((1 + s, k) for s, k in every(8, 12)):
        assert sum(ceil((taps - phase) / stride) for phase in range(stride)) == taps


@formula(
    "T10",
    r"""\#\{\varphi : \text{no tap}\} \ge s - \frac{s}{\gcd(s, d)}""",
)
def _() -> None:
    for s, d, taps in ((1 + s, 1 + d, 1 + taps) for s, d, taps in every(8, 6, 10)):
        reached = {phase for phase in range(s) for a in range(taps) if (phase - d * a) % s == 0}
        period = s // gcd(s, d)
        assert s - len(reached) >= s - period
        assert (s - len(reached) == s - period) == (taps >= period)
        assert [(d * a) % s for a in range(period, taps)] == [(d * a) % s for a in range(max(0, taps - period))]
    z = back(integers(3), integers(4), Setting(0, 3, 2, 0, 2))
    assert_equal(z[1::2], torch.zeros(len(z) // 2))  # without a bias


@formula(
    "T11",
    r"""z_r = \sum_{a} w_{K-1-a}\; \hat{x}_{r+da}, \qquad \hat{x}_{si+d(K-1)-p} = x_i""",
)
def _() -> None:
    for line in [line for line in SETTINGS if line.dilation * (line.taps - 1) >= line.padding]:
        w, x = integers(line.taps), integers(4, seed=1)
        z, border = back(w, x, line), line.dilation * (line.taps - 1) - line.padding
        apart = torch.zeros(line.stride * 3 + 1 + 2 * border, dtype=torch.float64)
        for i in range(4):
            apart[line.stride * i + border] = x[i]
        for r in range(len(z)):
            terms = [w[line.taps - 1 - a] * apart[r + line.dilation * a] for a in range(line.taps)]
            assert_equal(z[r], sum(terms, start=torch.zeros(())))


def counts(taps: int, stride: int) -> Tensor:
    """The terms of each element by its phase, away from the ends: a filter of ones on a row of ones."""
    line, inputs = Setting(0, taps, stride), taps + 2
    z = back(torch.ones(taps).double(), torch.ones(inputs).double(), line)
    return z[stride * taps : stride * (taps + 1)]


def tau(taps: int, stride: int) -> Tensor:
    return torch.tensor([ceil((taps - phase) / stride) for phase in range(stride)]).double()


@formula(
    "T12",
    r"\tau_\varphi = \left\lceil \frac{K - \varphi}{s} \right\rceil, \qquad 0 \le \varphi < s",
)
def _() -> None:
    for stride, taps in ((1 + s, 1 + k) for s, k in every(6, 9)):
        assert_equal(tau(taps, stride), counts(taps, stride))


@formula("T13", r"\begin{bmatrix}\end{bmatrix} = \begin{bmatrix}\end{bmatrix}")
def _() -> None:
    symbols, numbers = matrices("T13", lambda text: evaluated(text, tau=tau(3, 2)) if "tau" in text else float(text))
    assert_equal(symbols, numbers)
    z = functional.conv_transpose2d(torch.ones(1, 1, 6, 6), torch.ones(1, 1, 3, 3), stride=2)[0, 0]
    assert_equal(z[4:6, 4:6].double(), numbers)
    assert_equal(z[2:10, 2:10].double(), numbers.repeat(4, 4))  # "a checkerboard"


@formula("T14", r"\tau_0 = \tau_1 = \dots = \tau_{s-1} \quad \Longleftrightarrow \quad s \mid K")
def _() -> None:
    for stride, taps in ((1 + s, 1 + k) for s, k in every(6, 9)):
        assert (len(set(counts(taps, stride).tolist())) == 1) == (taps % stride == 0)


@formula("T15", r"K = s, \quad p = 0: \qquad z_{f,\,si+a} = \sum_{c} w_{cfa}\, x_{ci}")
def _() -> None:
    x, w, s = integers(3, 4), integers(3, 2, 3, seed=1), 3
    z = functional.conv_transpose1d(x[None], w, stride=s)[0]
    for f, i, a in every(2, 4, s):
        assert_equal(z[f, s * i + a], sum(w[c, f, a] * x[c, i] for c in range(3)))
    product = w.flatten(1).T @ x
    assert_equal(product.view(2, s, 4).mT.reshape(2, -1), z)  # "put in their places"


@formula(
    "T16",
    r"""\frac{\partial L}{\partial x_{nci}} = \sum_{f} \sum_{a} w_{cfa}\; g_{n,\,f,\;si+da-p}""",
)
def _() -> None:
    for line in SETTINGS:
        x, w, g = layer(line)
        grad_x, _ = gradients(line, x, w, g)

        def element(n: int, c: int, i: int, w: Tensor = w, g: Tensor = g, line: Setting = line) -> Iterator[Tensor]:
            for f, a in every(*w.shape[1:]):
                yield w[c, f, a] * at(g, n, f, line.place(i, a))

        assert_equal(filled(grad_x.shape, element), grad_x)


@formula(
    "T17",
    r"""\frac{\partial L}{\partial w_{cfa}} = \sum_{n} \sum_{i} x_{nci}\; g_{n,\,f,\;si+da-p}""",
)
def _() -> None:
    for line in SETTINGS:
        x, w, g = layer(line)
        _, grad_w = gradients(line, x, w, g)

        def element(c: int, f: int, a: int, x: Tensor = x, g: Tensor = g, line: Setting = line) -> Iterator[Tensor]:
            for n, i in every(2, 4):
                yield x[n, c, i] * at(g, n, f, line.place(i, a))

        assert_equal(filled(grad_w.shape, element), grad_w)


def layer(line: Setting) -> tuple[Tensor, Tensor, Tensor]:
    """Input, weight and what comes down, of a layer with one place of output padding where the stride allows it."""
    more = int(line.stride > 1)
    return integers(2, 3, 4), integers(3, 2, line.taps, seed=1), integers(2, 2, length(line) + more, seed=2)


def gradients(line: Setting, x: Tensor, w: Tensor, g: Tensor) -> tuple[Tensor, ...]:
    x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
    more = int(line.stride > 1)
    z = functional.conv_transpose1d(x, w, None, line.stride, line.padding, more, 1, line.dilation)
    return torch.autograd.grad(z, (x, w), g)


@formula(
    "T18",
    r"""\begin{aligned} Y &= W * X: & \frac{\partial L}{\partial X} &= W \mathbin{\tilde{*}} G, &
        \frac{\partial L}{\partial W} &= G \star X \\ Z &= W \mathbin{\tilde{*}} X: &
        \frac{\partial L}{\partial X} &= W * G, & \frac{\partial L}{\partial W} &= X \star G \end{aligned}""",
)
def _() -> None:
    for case in general():
        grad_x, grad_w, _ = case.gradients()
        stride, padding, dilation = zip(*(line[2:] for line in case[:2]))
        more = [n - length(line, line.windows) for n, line in zip(case.x.shape[2:], case[:2])]
        settings = stride, padding, more, 1, dilation
        assert_equal(functional.conv_transpose2d(case.g, case.w, None, *settings), grad_x)
        # Z of an input shaped as G, whose gradient that comes down is shaped as X.
        x, w = case.g.clone().requires_grad_(), case.w.clone().requires_grad_()
        z = functional.conv_transpose2d(x, w, None, *settings)
        for_x, for_w = torch.autograd.grad(z, (x, w), case.x)
        assert_equal(for_x, case.forward(case.x, case.w))
        assert_equal(for_w, grad_w)  # of the convolution with X as the image and G as what comes down
