"""The parts of `check` that compare numbers: the worked example, and a table of products and gradients."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from . import api, machine, ops, reference, testing
from .console import Console, table, track

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
# Held against torch's error: results of many elements, so that torch's worst is no stroke of luck, and
# sums that torch too runs in one chain. In all layouts but the expanded one, whose elements repeat.
BUDGETED = ((31, 37, 41), (97, 101, 103))


class Product(NamedTuple):
    """One result beside its factors: result = x · y."""

    name: str
    result: Tensor
    x: Tensor
    y: Tensor


@dataclass
class Row:
    """A line of the table: how many agree, the worst errors in units of one rounding, what disagrees."""

    layout: str
    dtype: str
    exact: int = 0
    close: int = 0
    ours: float = 0.0
    theirs: float = 0.0
    found: list[str] = field(default_factory=list)


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
        ours, theirs = (through_autograd(mm, case, device) for mm in (api.mm, torch.mm))
    except RuntimeError as error:
        return [f"example: {str(error).splitlines()[0]}"]
    rows = []
    for name, expected in manual.items():
        columns = [lines(values[name]) for values in (manual, ours, theirs)]
        rows += [[name if i == 0 else "", *cells] for i, cells in enumerate(zip(*columns))]
        worst = max(difference(ours[name], expected), difference(ours[name], theirs[name]))
        rows[-1].append(f"{worst:.1e}")
    table(console, ["", "by hand", "matmul_grad", "torch", "apart by"], rows)
    console.print("dC = 1/numel(C)   dA = dC·Bᵀ   dB = Aᵀ·dC")
    rivals = {"by hand": manual, "by torch": theirs}
    return [
        f"example: {name} differs from the one {by} by {off:.1e} > {EXAMPLE_BUDGET:.0e}"
        for name in manual
        for by, theirs in rivals.items()
        if not (off := difference(ours[name], theirs[name])) <= EXAMPLE_BUDGET
    ]


def through_autograd(mm: Callable[[Tensor, Tensor], Tensor], case: reference.Example, device: str) -> dict[str, Tensor]:
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
    cells = [[f"{round(x, 12) + 0.0:.3g}" for x in row] for row in rows]  # + 0.0: no negative zero
    width = max(len(cell) for row in cells for cell in row)
    return [" ".join(cell.rjust(width) for cell in row) for row in cells]


def table_of_products(console: Console, device: str, seed: int) -> list[str]:
    """Forward, dgrad and wgrad of every layout, dtype and shape: exact integers, then the error budget."""
    kinds = list(itertools.product(LAYOUTS, dtypes(device)))
    rows = [one_row(layout, dtype, device, seed) for layout, dtype in track(console, "checking", kinds, len(kinds))]
    shown = []
    for row in rows:
        errors = [f"{row.ours:.1f}", f"{row.theirs:.1f}"] if row.close else ["", ""]
        agree = f"NO, {len(row.found)}" if row.found else "yes"
        shown.append([row.layout, row.dtype, f"{row.exact}", f"{row.close}", *errors, agree])
    columns = ["layout", "dtype", "exact", "close", "error", "torch's", "agree"]
    table(console, columns, shown, left=2)
    console.print(
        "Each size in forward, dgrad and wgrad. exact: integers, every bit; close: normal\n"
        "values, the worst error in roundings of the largest element ≤ 2 × (torch's + 1)."
    )
    console.print(f"m×n×k: {names(SHAPES)}\nclose: {names(BUDGETED)}")
    for note in machine.left_to_torch() if device == "cpu" else ():
        console.print(note)
    return [line for row in rows for line in row.found]


def dtypes(device: str) -> list[str]:
    """The dtypes whose products these kernels compute there."""
    kernels = {getattr(torch, name) for name in machine.cpu_dtypes()}
    return [testing.SHORT[dtype] for dtype in ops.DTYPES if device != "cpu" or dtype in kernels]


def names(shapes: tuple[tuple[int, int, int], ...]) -> str:
    return " ".join("×".join(map(str, shape)) for shape in shapes)


def one_row(layout: str, dtype: str, device: str, seed: int) -> Row:
    row = Row(layout, dtype)
    for shape in SHAPES:
        for draw in (testing.integers, testing.normal):
            if draw is testing.normal and (shape not in BUDGETED or layout == "expanded"):
                continue
            name = f"{dtype}-{layout}-{'x'.join(map(str, shape))}"
            try:
                products = three_products(draw, layout, testing.DTYPES[dtype], shape, device, seed)
            except RuntimeError as error:
                row.found.append(f"{name}: {str(error).splitlines()[0]}")
                continue
            for product in products:
                judge(product, f"{product.name}-{name}", draw is testing.integers, row)
    return row


def judge(product: Product, what: str, integers: bool, row: Row) -> None:
    """One result, written into its row."""
    if integers:
        found = disagreement(what, lambda: assert_exact(product, what))
        row.exact += not found
    else:
        found = disagreement(what, lambda: assert_close(product, what))
        row.close += not found
        row.ours = max(row.ours, roundings(product, product.result))
        row.theirs = max(row.theirs, roundings(product, torch.mm(product.x, product.y)))
    row.found += found


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
    # float64 holds every sum of these integers exactly, and multiplies a hundred times as fast as int64.
    expected = reference.forward(product.x, product.y).to(product.result.dtype) + 0.0  # a zero of a sum has no sign
    testing.assert_same_bits(product.result, expected, what)


def assert_close(product: Product, what: str) -> None:
    testing.assert_within_budget(product.result, product.x, product.y, what)


def roundings(product: Product, result: Tensor) -> float:
    """The worst error in units of one rounding of the largest element."""
    unit = torch.finfo(result.dtype).eps / 2 * float(result.abs().max())
    return testing.worst_error(result, product.x, product.y) / unit
