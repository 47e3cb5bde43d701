"""A result is correct before it is timed: exact on integers, within one error bound against float64 on normal values.

What stands beside operands of any size is small: nothing of float64 is ever as large as they are.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import testing
from .backends import Library, Mm, call_of, products_of
from .inputs import Operands, assert_normal, draw
from .workloads import Workload

PIECE = 1 << 22  # elements that are widened to float64 at a time
# An error is at most this many roundings of ‖row‖·‖column‖: for independent values of mean zero that holds
# for any length and order of the sum. Zen 4, n = 8-2048: 2.9 at most here, 2.0 in torch.
ROUNDINGS = 8
TF32 = 2.0**-11  # what an operand of TF32 is off by, relative to itself
ROWS, COLUMNS = 8, 64  # of a result on normal values are judged, spread over all of it


class IncorrectResult(AssertionError):
    """A result that is not timed; the message is where it is wrong."""


def assert_correct(library: Library, workload: Workload, *, seed: int = 0, device: str = "cpu", name: str = "") -> None:
    """All products of a workload: every bit on integers, the size of the error on normal operands.

    The error is not held against another library's: at n = 256 torch may sum in several lanes, whose error is half of
    one chain's, and a check must not hang on that. `check` shows both errors.

    >>> from matmul_grad.bench.backends import OfTorch
    >>> assert_correct(OfTorch(torch.mm), Workload("step", "f32", "NN", 5, 6, 7))
    """
    for values in ("integers", "normal"):
        operands = draw(workload, values, device, seed)
        if values == "normal":
            assert_normal(operands)
        assert_products(library, workload, operands, call_of(library, workload, operands)(), values, name)


def assert_products(
    library: Library, workload: Workload, operands: Operands, result: Any, values: str, name: str = ""
) -> dict[str, Tensor]:
    """The products in a result of a call on ``operands``, if all are correct."""
    found = products_of(library, workload, result)
    for which, got in found.items():
        x, y = operands.of(which)
        what = ", ".join(filter(None, (name, workload.name, which)))
        if values == "integers":
            assert_exact(got, x, y, what)
        else:
            assert_close(got, x, y, what, precision=workload.precision)
    return found


def assert_exact(result: Tensor, x: Tensor, y: Tensor, what: str) -> None:
    """C·t = X·(Y·t) for a vector t of integers, none of them 0: one wrong element cannot hide.

    Several wrong ones of a row would have to cancel under weights that they do not know.

    >>> x, y = torch.ones(2, 3), torch.ones(3, 4)
    >>> assert_exact(x @ y, x, y, "ones")
    """
    shape = (*x.shape[:-1], y.shape[-1])
    if result.shape != shape:
        raise IncorrectResult(f"{what}: shape {tuple(result.shape)}, not {shape}")
    if result.dtype != x.dtype:
        raise IncorrectResult(f"{what}: {result.dtype}, not {x.dtype}")
    if x.dim() == 3:
        for index in range(len(x)):
            assert_exact(result[index], x[index], y[index], f"{what}, {index} of the batch")
        return
    generator = torch.Generator().manual_seed(y.shape[1])
    weights = torch.randint(1, 17, (y.shape[1],), generator=generator).double()
    signs = torch.randint(0, 2, (y.shape[1],), generator=generator).double()
    t = (weights * (1 - 2 * signs)).to(x.device)
    wrong = times(result, t) != times(x, times(y, t))
    if wrong.any():
        first, count = int(wrong.nonzero()[0]), int(wrong.sum())
        raise IncorrectResult(f"{what}: on integers {count} of {len(x)} rows are wrong, the first is {first}")


def times(x: Tensor, v: Tensor) -> Tensor:
    """x · v in float64, piece by piece."""
    m, k = x.shape
    total = torch.zeros(m, dtype=torch.float64, device=x.device)
    wide = max(1, min(k, PIECE))
    high = max(1, PIECE // wide)
    for top in range(0, m, high):
        for left in range(0, k, wide):
            total[top : top + high] += x[top : top + high, left : left + wide].double() @ v[left : left + wide]
    return total


def assert_close(
    result: Tensor, x: Tensor, y: Tensor, what: str, rows: int = ROWS, columns: int = COLUMNS, precision: str = "ieee"
) -> None:
    """Up to ``rows`` × ``columns`` elements, corners among them: each within ROUNDINGS of ‖row‖·‖column‖.

    Operands of TF32 keep 11 bits: each of the k terms of a sum may be off by as much, in either direction.

    >>> x, y = torch.randn(9, 70), torch.randn(70, 80)
    >>> assert_close(x @ y, x, y, "normal")
    """
    if result.numel() == 0:
        return
    if x.dim() == 3:
        for index in spread(len(x), rows):
            assert_close(result[index], x[index], y[index], f"{what}, {index} of the batch", rows, columns, precision)
        return
    judged = spread(len(x), rows), spread(y.shape[1], columns)
    truth, norms = exact(x, y, *judged)
    some = result[torch.tensor(judged[0])[:, None], torch.tensor(judged[1])]
    error = np.abs(some.cpu().double().numpy() - truth)
    operands = TF32 / x.shape[1] ** 0.5 if precision == "tf32" else 0.0
    limit = ROUNDINGS * (torch.finfo(result.dtype).eps / 2 + operands) * norms
    if not (error <= limit).all():  # nor where it is NaN
        i, j = map(int, np.unravel_index(np.argmax(np.nan_to_num(error - limit, nan=np.inf)), error.shape))
        raise IncorrectResult(
            f"{what}: error {error[i, j]:.3g} at ({judged[0][i]}, {judged[1][j]}) > {ROUNDINGS} roundings of "
            f"‖row‖·‖column‖, {limit[i, j]:.3g}"
        )


def assert_rows_alone(mm: Mm, a: Tensor, b: Tensor, what: str) -> None:
    """Rows have the same bits whatever m is, as the batch-invariant mode promises.

    >>> assert_rows_alone(lambda a, b: a * b[:1], torch.ones(5, 2), torch.ones(2, 2), "ones")
    """
    whole = mm(a, b)
    for rows in sorted({1, min(256, len(a)), max(1, len(a) - 1)}):
        different = int((mm(a[:rows], b) != whole[:rows]).any(dim=1).sum())
        if different:
            raise IncorrectResult(f"{what}: {different} of {rows} rows have other bits than with m = {len(a)}")


def spread(length: int, count: int) -> list[int]:
    """Up to ``count`` indices from the first to the last.

    >>> spread(9, 3), spread(2, 3)
    ([0, 4, 8], [0, 1])
    """
    return [i * (length - 1) // max(1, min(length, count) - 1) for i in range(min(length, count))]


def exact(x: Tensor, y: Tensor, rows: list[int], columns: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """x · y of some rows and columns, and the products of their norms: in float64, or for that in longdouble."""
    wide = np.longdouble if x.dtype == torch.float64 else np.float64
    total = np.zeros((len(rows), len(columns)), wide)
    squares = [np.zeros(len(rows)), np.zeros(len(columns))]
    step = max(1, PIECE // (len(rows) + len(columns)))
    for left in range(0, x.shape[1], step):
        some = slice(left, left + step)
        a = x[:, some][rows].cpu().double().numpy()
        b = y[some][:, columns].cpu().double().numpy()
        total += a.astype(wide) @ b.astype(wide)
        squares[0] += np.square(a).sum(axis=1)
        squares[1] += np.square(b).sum(axis=0)
    return total, np.sqrt(np.outer(*squares))


def digest(results: tuple[Tensor, ...]) -> str:
    """Of the bits of up to ROWS rows of each: two kernels that sum in different orders differ in it.

    >>> digest((torch.ones(2, 2),)) == digest((torch.ones(2, 2),)) != digest((torch.zeros(2, 2),))
    True
    """
    found = hashlib.sha256()
    for result in results:
        for row in spread(len(result), ROWS):  # one by one: of few rows they are the whole result
            found.update(testing.bits(result[row].cpu()).numpy().data)
    return found.hexdigest()[:16]
