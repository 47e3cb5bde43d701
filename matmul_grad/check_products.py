"""The parts of `check` that compare numbers: the worked example, and a table of products and gradients."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
from rich.console import Console
from torch import Tensor

from . import api, reference, testing
from .console import table, track

EXAMPLE_BUDGET = 1e-14  # sums of four numbers below 100 in float64, each rounded once

# What is drawn for A, B and dC; a gradient that is one value for all is what sum() and mean() hand down.
LAYOUTS = {
    "NN": ("row", "row", "row"),
    "NT": ("row", "column", "row"),
    "TN": ("column", "row", "row"),
    "TT": ("column", "column", "row"),
    "sliced": ("sliced", "sliced", "sliced"),
    "expanded": ("expanded_rows", "expanded_columns", "expanded"),
}
SHAPES = (
    (0, 3, 2), (3, 2, 0), (1, 1, 7), (5, 1, 9), (7, 65, 9), (31, 37, 41), (2, 257, 3), (3, 5, 1031),
    (97, 101, 103), (257, 129, 513),
)  # fmt: skip
BUDGET_LIMIT = 1 << 20  # multiply-adds: beyond, only exact, since the oracle of float64 takes 8 ns for each
DTYPES = {"cpu": ("f32", "f64"), "cuda": ("f16", "bf16", "f32", "f64")}


class Product(NamedTuple):
    """One result beside its factors: result = x · y."""

    name: str
    result: Tensor
    x: Tensor
    y: Tensor


class Row(NamedTuple):
    """A line of the table: what was tried, what disagreed, the worst errors in units of one rounding."""

    layout: str
    dtype: str
    tried: int
    exact: int
    ours: float
    torchs: float
    found: list[str]


def disagreement(what: str, check: Callable[[], object]) -> list[str]:
    """[] where ``check`` passes, else one line; an error raised by a kernel or by strict() counts as one."""
    try:
        check()
    except (AssertionError, RuntimeError) as error:
        message = (str(error) or type(error).__name__).splitlines()[0]
        return [message if message.startswith(what) else f"{what}: {message}"]
    return []


def example(console: Console, device: str) -> list[str]:
    """Manual gradients, this package and torch side by side, on the example of docs/derivation.md."""
    case = reference.example()
    manual = {"C": case.c, "L": case.loss, "dC": case.grad_c, "dA": case.grad_a, "dB": case.grad_b}
    try:
        ours, torchs = (through_autograd(mm, case, device) for mm in (api.mm, torch.mm))
    except RuntimeError as error:
        return [f"example: {str(error).splitlines()[0]}"]
    rows = []
    for name, expected in manual.items():
        columns = [lines(values[name]) for values in (manual, ours, torchs)]
        rows += [[name if i == 0 else "", *cells] for i, cells in enumerate(zip(*columns))]
        worst = max(difference(ours[name], expected), difference(ours[name], torchs[name]))
        rows[-1].append(f"{worst:.1e}")
    table(console, ["", "by hand", "matmul_grad", "torch", "largest difference"], rows)
    console.print("dC = 1/numel(C)   dA = dC·Bᵀ   dB = Aᵀ·dC")
    rivals = {"by hand": manual, "by torch": torchs}
    return [
        f"example: {name} differs from the one {by} by {off:.1e} > {EXAMPLE_BUDGET:.0e}"
        for name in manual
        for by, theirs in rivals.items()
        if not (off := difference(ours[name], theirs[name])) <= EXAMPLE_BUDGET
    ]


def through_autograd(
    mm: Callable[[Tensor, Tensor], Tensor], case: reference.Example, device: str
) -> dict[str, Tensor]:
    """The example's five quantities as autograd finds them."""
    a, b = (operand.to(device, copy=True).requires_grad_() for operand in (case.a, case.b))
    c = mm(a, b)
    loss = c.mean()
    grad_c, grad_a, grad_b = torch.autograd.grad(loss, (c, a, b))
    return {"C": c.detach(), "L": loss.detach(), "dC": grad_c, "dA": grad_a, "dB": grad_b}


def difference(x: Tensor, y: Tensor) -> float:
    return float((x.cpu() - y.cpu()).abs().max())


def lines(values: Tensor) -> list[str]:
    """A matrix as text, a row a line."""
    rows = values.reshape(-1, values.shape[-1] if values.dim() else 1).tolist()
    return ["  ".join(f"{round(x, 12) + 0.0:.4g}" for x in row) for row in rows]


def table_of_products(console: Console, device: str, seed: int) -> list[str]:
    """Forward, dgrad and wgrad of every layout, dtype and shape: exact integers, then the error budget."""
    kinds = list(itertools.product(LAYOUTS, DTYPES[device]))
    rows = [one_row(layout, dtype, device, seed) for layout, dtype in track(console, "checking", kinds)]
    shown = [
        [row.layout, row.dtype, f"{row.tried}", f"{row.exact}", f"{row.ours:.2f}", f"{row.torchs:.2f}"]
        + ["yes" if not row.found else f"NO, {len(row.found)}"]
        for row in rows
    ]
    columns = ["layout", "dtype", "products", "bits exact", "error", "torch's", "agree"]
    table(console, columns, shown, left=2)
    console.print("sizes m×n×k: " + ", ".join(f"{m}×{n}×{k}" for m, n, k in SHAPES))
    console.print(
        "each forward, dgrad, wgrad. Exact: integers, every bit. Error: the worst element's, in roundings of the\n"
        "largest, on normal values; it may be twice (torch's + one rounding)."
    )
    return [line for row in rows for line in row.found]


def one_row(layout: str, dtype: str, device: str, seed: int) -> Row:
    found, tried, exact = [], 0, 0
    ours, torchs = [0.0], [0.0]
    for shape in SHAPES:
        name = f"{dtype}-{layout}-{'x'.join(str(size) for size in shape)}"
        for draw in (testing.integers, testing.normal):
            if draw is testing.normal and shape[0] * shape[1] * shape[2] > BUDGET_LIMIT:
                continue
            try:
                products = three_products(draw, layout, testing.DTYPES[dtype], shape, device, seed)
            except RuntimeError as error:
                found.append(f"{name}: {str(error).splitlines()[0]}")
                continue
            for product in products:
                what = f"{product.name}-{name}"
                if draw is testing.integers:
                    lines_found = disagreement(what, lambda p=product, w=what: assert_exact(p, w))
                    exact += not lines_found
                else:
                    lines_found = disagreement(what, lambda p=product, w=what: assert_close(p, w))
                    ours.append(roundings(product, product.result))
                    torchs.append(roundings(product, torch.mm(product.x, product.y)))
                tried += 1
                found += lines_found
    return Row(layout, dtype, tried, exact, max(ours), max(torchs), found)


def three_products(
    draw: Callable[..., Tensor],
    layout: str,
    dtype: torch.dtype,
    shape: tuple[int, int, int],
    device: str,
    seed: int,
) -> list[Product]:
    """The product by ``matmul_grad.mm`` and both gradients by autograd; results and factors on the CPU."""
    m, n, k = shape
    sizes = ((m, k), (k, n), (m, n))
    a, b, grad = (
        testing.lay_out(draw(*size, dtype, seed=3 * seed + i).to(device), striding).detach()
        for i, (size, striding) in enumerate(zip(sizes, LAYOUTS[layout]))
    )
    a.requires_grad_()
    b.requires_grad_()
    c = api.mm(a, b)
    grad_a, grad_b = torch.autograd.grad(c, (a, b), grad)
    c, a, b, grad = (tensor.detach().cpu() for tensor in (c, a, b, grad))
    return [
        Product("forward", c, a, b),
        Product("dgrad", grad_a.cpu(), grad, b.t()),
        Product("wgrad", grad_b.cpu(), a.t(), grad),
    ]


def assert_exact(product: Product, what: str) -> None:
    testing.assert_same_bits(product.result, testing.exact_product(product.x, product.y), what)


def assert_close(product: Product, what: str) -> None:
    testing.assert_within_budget(product.result, product.x, product.y, what)


def roundings(product: Product, result: Tensor) -> float:
    """The worst error in units of one rounding of the largest element."""
    if result.numel() == 0 or product.x.shape[1] == 0:
        return 0.0
    unit = torch.finfo(result.dtype).eps / 2 * float(result.abs().max())
    return testing.worst_error(result, product.x, product.y) / unit
