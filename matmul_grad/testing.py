"""What the tests and the bench share: the list of cases, operands in every layout, and the error budget.

One list feeds CPU, GPU, interpreter and bench, so that a shape that once broke one of them is tried on all.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from . import reference

DTYPES = {"f32": torch.float32, "f64": torch.float64, "f16": torch.float16, "bf16": torch.bfloat16}
SHORT = {dtype: name for name, dtype in DTYPES.items()}
PRODUCTS = ("forward", "dgrad", "wgrad")
LAYOUTS = ("NN", "NT", "TN", "TT")
# How one operand lies in memory: rows together, columns together, every second element of a larger matrix,
# a narrow view of a wider one, one row or column or element for all.
STRIDINGS = ("row", "column", "sliced", "narrow", "expanded_rows", "expanded_columns", "expanded")

# (m, n, k): empty, one, around a tile, primes, skinny each way, and the odd one of the design.
SHAPES = (
    (0, 3, 2), (3, 0, 2), (3, 2, 0), (1, 1, 1), (1, 1, 7), (1, 64, 5), (5, 1, 9), (6, 64, 8), (7, 65, 9),
    (5, 63, 7), (12, 32, 31), (13, 33, 17), (31, 37, 41), (64, 64, 64), (97, 101, 103), (2, 257, 3),
    (257, 2, 3), (3, 5, 1031), (257, 129, 513),
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One product to try. Its id reads ``wgrad-f32-TN-257x129x513``."""

    product: str
    dtype: torch.dtype
    layout: str
    m: int
    n: int
    k: int

    @property
    def id(self) -> str:
        return f"{self.product}-{SHORT[self.dtype]}-{self.layout}-{self.m}x{self.n}x{self.k}"


def cases(
    dtypes: tuple[str, ...],
    shapes: tuple[tuple[int, int, int], ...] = SHAPES,
    products: tuple[str, ...] = PRODUCTS,
    layouts: tuple[str, ...] = LAYOUTS,
) -> Iterator[Case]:
    """Every product, dtype, layout and shape of the list."""
    for product, dtype, layout, shape in itertools.product(products, dtypes, layouts, shapes):
        yield Case(product, DTYPES[dtype], layout, *shape)


def lay_out(values: Tensor, striding: str, poison: float = float("nan")) -> Tensor:
    """The same matrix, with the strides of ``striding``; elements between its own are ``poison``.

    The expanded ones repeat their first row, column or element, so their values differ from ``values``.
    """
    m, n = values.shape
    if striding == "column":
        return values.t().contiguous().t()
    if striding == "sliced":
        whole = values.new_full((2 * m + 1, 2 * n + 1), poison)
        whole[1::2, 1::2] = values
        return whole[1::2, 1::2]
    if striding == "narrow":
        whole = values.new_full((m + 2, n + 3), poison)
        whole[1 : m + 1, 2 : n + 2] = values
        return whole[1 : m + 1, 2 : n + 2]
    if striding == "expanded_rows":
        return values[:1].contiguous().expand(m, n)
    if striding == "expanded_columns":
        return values[:, :1].contiguous().expand(m, n)
    if striding == "expanded":
        return values[:1, :1].contiguous().expand(m, n)
    if striding != "row":
        raise ValueError(f"striding must be one of {', '.join(STRIDINGS)}, got {striding}")
    return values.contiguous()


def integers(m: int, n: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Integers of [-4, 4]: every partial sum of a product is exact for k ≤ 2^20 in float32, k ≤ 100 in float16."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + m * 1009 + n)
    return torch.randint(-4, 5, (m, n), generator=generator).to(dtype)


def normal(m: int, n: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Standard normal values, drawn in float64 and rounded once."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + m * 1009 + n)
    return torch.randn(m, n, generator=generator, dtype=torch.float64).to(dtype)


def operands(case: Case, draw: Callable[..., Tensor] = normal) -> tuple[Tensor, Tensor]:
    """(a, b) of ``case`` with a (m, k) and b (k, n), each row-major (N) or column-major (T)."""
    striding = {"N": "row", "T": "column"}
    a = lay_out(draw(case.m, case.k, case.dtype, seed=1), striding[case.layout[0]])
    b = lay_out(draw(case.k, case.n, case.dtype, seed=2), striding[case.layout[1]])
    return a, b


def bits(tensor: Tensor) -> Tensor:
    """The elements as integers, so that equality is equality of bits (NaN equals itself, 0 differs from -0)."""
    return tensor.contiguous().view({8: torch.int64, 4: torch.int32, 2: torch.int16}[tensor.element_size()])


def assert_same_bits(actual: Tensor, expected: Tensor, what: str = "") -> None:
    """Same shape, dtype and bits."""
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)} != {tuple(expected.shape)}"
    assert actual.dtype == expected.dtype, f"{what}: {actual.dtype} != {expected.dtype}"
    different = bits(actual) != bits(expected)
    if different.any():
        at = tuple(different.nonzero()[0].tolist())
        raise AssertionError(
            f"{what}: {int(different.sum())} of {actual.numel()} elements differ, "
            f"first at {at}: {actual[at].item()!r} != {expected[at].item()!r}"
        )


def exact_product(a: Tensor, b: Tensor) -> Tensor:
    """The product of integer-valued operands without any rounding but the last, in their dtype."""
    return (a.to(torch.int64) @ b.to(torch.int64)).to(a.dtype)


def worst_error(actual: Tensor, a: Tensor, b: Tensor) -> float:
    """Largest |actual - a·b|: the product in float64, or for float64 itself in NumPy's longdouble."""
    if actual.numel() == 0:
        return 0.0
    if actual.dtype != torch.float64:
        return float((actual.to(torch.float64) - reference.forward(a, b)).abs().max())
    truth = a.numpy().astype(np.longdouble) @ b.numpy().astype(np.longdouble)
    return float(np.abs(actual.numpy() - truth).max())


def assert_within_budget(actual: Tensor, a: Tensor, b: Tensor, what: str = "") -> None:
    """Worst error at most 2 × (torch's worst error + one rounding of the largest element)."""
    error, theirs = worst_error(actual, a, b), worst_error(torch.mm(a, b), a, b)
    rounding = torch.finfo(actual.dtype).eps / 2 * float(actual.abs().max()) if actual.numel() else 0.0
    budget = 2 * (theirs + rounding)
    assert error <= budget, f"{what}: error {error:.3e} > 2 × (torch's {theirs:.3e} + rounding {rounding:.3e})"


def roundings_of_sums(actual: Tensor, a: Tensor, b: Tensor) -> tuple[float, float]:
    """Error of a sum of products a·b in float32 roundings of Σ|a|·|b|: root mean square of the elements, and the worst.

    |actual − a·b| / (2⁻²⁴ · |a|·|b|), the products in float64. A sum in float32 makes roundings of its partial sums,
    which may be larger than what is left of them at the end, and never larger than Σ|a|·|b|.

    >>> import torch
    >>> a = torch.tensor([[1.0, 1.0]])
    >>> roundings_of_sums(torch.tensor([[1.0]]), a, torch.tensor([[1.0], [2.0**-23]]))[1] < 2
    True
    """
    a, b = a.double(), b.double()
    found = (actual.double() - a @ b).abs() / (2.0**-24 * (a.abs() @ b.abs()))
    return float(found.square().mean().sqrt()), float(found.max())


def assert_model_within_budget(
    ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], truth: Mapping[str, Tensor], what: str = ""
) -> None:
    """What a model gives (outputs, loss, gradients) on these kernels, beside torch's kernels and float64.

    Of each tensor the norm of the error is at most 2 × (that of torch's + one rounding of the tensor). Errors of
    a model are those of many roundings, which norms average and a worst element does not. Where torch's is as
    large as an eighth of the tensor, nothing was computed that could be judged. A gradient that is zero in truth
    (the bias of attention's keys) is all rounding: there the one rounding is that of a typical tensor.
    """
    assert ours.keys() == theirs.keys() == truth.keys(), f"{what}: {ours.keys() ^ truth.keys()}"
    typical = statistics.median(float(exact.norm()) / exact.numel() ** 0.5 for exact in truth.values())
    for name, exact in truth.items():
        assert ours[name].dtype == theirs[name].dtype and ours[name].shape == exact.shape, f"{what}: {name}"
        error, torch_error = (float((x[name].double() - exact).norm()) for x in (ours, theirs))
        eps, size, typical_size = torch.finfo(ours[name].dtype).eps, float(exact.norm()), typical * exact.numel() ** 0.5
        if size < 1e-9 * typical_size:
            size = typical_size
        assert torch_error <= size / 8, f"{what}: {name}: torch's error is {torch_error:.1e} of {size:.1e}"
        budget = 2 * (torch_error + eps / 2 * size)
        assert error <= budget, f"{what}: {name}: {error:.2e} > {budget:.2e} = 2 × ({torch_error:.2e} + one rounding)"
