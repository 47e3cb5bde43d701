"""The part of `check` about convolutions: both gradients by hand, by this package and by torch, on small integers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from . import api, convolution, convolution_ops, testing
from .check_products import difference, disagreement, dtypes, lines
from .console import Console, table, track

Results = tuple[Tensor, Tensor, Tensor]  # Y, dX, dW
NAMES = ("Y", "dX", "dW")
OPERATIONS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "conv2d": (lambda *given, **how: convolution.conv2d(*given, **how), functional.conv2d),
    "transposed": (lambda *given, **how: convolution.conv_transpose2d(*given, **how), functional.conv_transpose2d),
}


class Layer(NamedTuple):
    """One layer on two images of 11 × 12; ``weight`` is its filter's shape."""

    name: str
    weight: tuple[int, int, int, int]
    how: dict[str, Any]
    operation: str = "conv2d"
    memory_format: torch.memory_format = torch.contiguous_format

    @property
    def channels(self) -> int:
        return self.weight[0] if self.operation == "transposed" else self.weight[1] * int(self.how.get("groups", 1))


LAYERS = (
    Layer("3×3", (9, 7, 3, 3), {"padding": 1}),
    Layer("3×3, stride 2", (9, 7, 3, 3), {"stride": 2, "padding": 1}),
    Layer("3×2, stride 1×3, dilation 2", (5, 8, 3, 2), {"stride": (1, 3), "padding": (2, 0), "dilation": 2}),
    Layer("3×3, 2 groups", (6, 4, 3, 3), {"groups": 2}),
    Layer("3×3, channels last", (9, 7, 3, 3), {"padding": 1}, memory_format=torch.channels_last),
    Layer("1×1", (9, 7, 1, 1), {}),
    Layer("patches of 2×3", (9, 3, 2, 3), {"stride": (2, 3)}),
    Layer("transposed 4×4, stride 2", (7, 5, 4, 4), {"stride": 2, "padding": 1}, "transposed"),
    Layer("transposed 3×3, stride 2", (7, 5, 3, 3), {"stride": 2, "output_padding": 1}, "transposed"),
)


def by_hand(x: Tensor, w: Tensor, g: Tensor, stride: Any = 1, padding: Any = 0, dilation: Any = 1) -> Results:
    """A convolution and its gradients, given dY = ``g``: three products, (C25) of docs/convolution.md.

    >>> import torch
    >>> y, dx, dw = by_hand(torch.ones(1, 1, 2, 2), torch.ones(1, 1, 2, 1), torch.ones(1, 1, 1, 2))
    >>> y.tolist(), dw.tolist()
    ([[[[2.0, 2.0]]]], [[[[2.0], [2.0]]]])
    """
    window = {"kernel_size": w.shape[2:], "stride": stride, "padding": padding, "dilation": dilation}
    patches = functional.unfold(x, **window)  # (n, channels · taps, outputs)
    filters, gradient = w.flatten(1).expand(len(x), -1, -1), g.flatten(2)
    y = api.bmm(filters, patches).view_as(g)
    dw = api.bmm(gradient, patches.mT).sum(0).view_as(w)
    dx = functional.fold(api.bmm(filters.mT, gradient), x.shape[2:], **window)
    return y, dx, dw


def through_autograd(function: Callable[..., Tensor], x: Tensor, w: Tensor, g: Tensor, **how: Any) -> Results:
    x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
    y = function(x, w, **how)
    dx, dw = torch.autograd.grad(y, (x, w), g)
    return y.detach(), dx, dw


def run(console: Console, device: str) -> list[str]:
    """The example, then a table of layers; on a GPU by hand and by torch alone where no kernel convolves."""
    return example(console, device) + table_of_layers(console, device)


def example(console: Console, device: str) -> list[str]:
    """The example of docs/convolution.md: small integers, so every result is exact."""
    rows = (
        torch.tensor([[1, 2, 0], [3, -1, 4], [2, 5, -2]]), torch.tensor([[2, -1], [1, 3]]),
        torch.tensor([[1, 2], [3, 1]]),
    )  # fmt: skip
    x, w, g = (matrix[None, None].double().to(device) for matrix in rows)
    ours, theirs = OPERATIONS["conv2d"]
    found = {"by hand": by_hand, "torch": lambda *given: through_autograd(theirs, *given)}
    if kernels(device):
        found["matmul_grad"] = lambda *given: through_autograd(ours, *given)
    try:
        results = {who: function(x, w, g) for who, function in found.items()}
    except RuntimeError as error:
        return [f"convolution: {str(error).splitlines()[0]}"]
    shown = []
    for position, name in enumerate(NAMES):
        values = [of[position].squeeze() for of in results.values()]
        shown += [[name if i == 0 else "", *cells] for i, cells in enumerate(zip(*map(lines, values)))]
    table(console, ["", *results], shown)
    console.print("P: the patches of X   Y = W·P   dW = dY·Pᵀ   dX: Wᵀ·dY, added up where patches overlap")
    return [
        f"convolution: {name} {who} differs from torch's"
        for who, of in results.items()
        for name, value, expected in zip(NAMES, of, results["torch"])
        if difference(value, expected) != 0
    ]


def table_of_layers(console: Console, device: str) -> list[str]:
    """Each layer in each dtype against torch in float64, every bit."""
    names, found, shown = kernels(device), [], []
    for layer in track(console, "checking", LAYERS, len(LAYERS)):
        bad = {"by hand": manual_layer(layer, device)} if "groups" not in layer.how else {}
        bad |= {dtype: one_layer(layer, dtype, device) for dtype in names}
        cells = ["" if who not in bad else "NO" if bad[who] else "exact" for who in ("by hand", *names)]
        shown.append([layer.name, *cells])
        found += [line for lines_of in bad.values() for line in lines_of]
    table(console, ["layer", "by hand", *names], shown, left=1)
    console.print("Y, dX and dW of each: integers, every bit of torch's results in float64.")
    return found


def kernels(device: str) -> list[str]:
    """The dtypes that this package's kernels convolve there."""
    found = convolution_ops.kernels_for(device == "cuda")
    if found is None:
        return []
    images = {name: torch.zeros(1, 1, 1, dtype=testing.DTYPES[name], device=device) for name in dtypes(device)}
    return [name for name, image in images.items() if found.supports(image, image)]


def operands(layer: Layer, device: str) -> tuple[Results, Results]:
    """X, W and dY, integers in float64, and torch's results."""
    theirs = OPERATIONS[layer.operation][1]
    shapes = (2, layer.channels, 11, 12), layer.weight
    x, w = (integers(shape, seed).to(device) for seed, shape in enumerate(shapes))
    g = integers(theirs(x, w, **layer.how).shape, 2).to(device)
    return (x, w, g), through_autograd(theirs, x, w, g, **layer.how)


def integers(shape: tuple[int, ...], seed: int) -> Tensor:
    return testing.integers(shape[0], torch.Size(shape[1:]).numel(), torch.float64, seed).view(shape)


def one_layer(layer: Layer, dtype: str, device: str) -> list[str]:
    """What disagrees with torch in this package's results."""
    (x, w, g), expected = operands(layer, device)
    cast = [tensor.to(testing.DTYPES[dtype]) for tensor in (x, w, g)]
    cast[0] = cast[0].contiguous(memory_format=layer.memory_format)
    ours = OPERATIONS[layer.operation][0]
    return compare(f"{layer.name}, {dtype}", lambda: through_autograd(ours, *cast, **layer.how), expected)


def manual_layer(layer: Layer, device: str) -> list[str]:
    """The same of the results by hand. A transposed convolution is the gradient of one, and its gradient that one."""
    (x, w, g), expected = operands(layer, device)
    if layer.operation == "conv2d":
        return compare(f"{layer.name}, by hand", lambda: by_hand(x, w, g, **layer.how), expected)
    how = {name: value for name, value in layer.how.items() if name != "output_padding"}

    def transposed() -> Results:
        dx, y, dw = by_hand(g, w, x, **how)  # the image is as large as Y, and X is as large as its convolution
        return y, dx, dw

    return compare(f"{layer.name}, by hand", transposed, expected)


def compare(what: str, results: Callable[[], Results], expected: Results) -> list[str]:
    what = f"convolution {what}"

    def same() -> None:
        for name, value, right in zip(NAMES, results(), expected):
            testing.assert_same_bits(value + 0.0, right.to(value.dtype) + 0.0, f"{what}, {name}")

    return disagreement(what, same)
