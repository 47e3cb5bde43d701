"""A result is correct before it is timed: exact on integers, within one error bound against float64 on normal values.

What stands beside operands of any size is small: nothing of float64 is ever as large as they are.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor

from .. import reference, testing
from . import baseline

PIECE = 1 << 22  # elements that are widened to float64 at a time
# An error is at most this many roundings of ‖row‖·‖column‖: for independent values of mean zero that holds
# for any length and order of the sum. Zen 4, n = 8-2048: 2.9 at most here, 2.0 in torch.
ROUNDINGS = 8
ROWS, COLUMNS = 8, 64  # of a result on normal values are judged, spread over all of it


def assert_correct(
    mm: baseline.Mm, m: int, n: int, k: int, dtype: torch.dtype, *, seed: int = 0, device: str = "cpu"
) -> None:
    """Forward, dgrad and wgrad: every bit on integers, the size of the error on normal operands.

    The error is not held against torch's here: at n = 256 torch may sum in several lanes, whose error is
    half of one chain's, and a check must not hang on that. `check` shows both errors.

    >>> assert_correct(torch.mm, 5, 6, 7, torch.float32)
    """
    whole = baseline.draw(m, n, k, dtype, seed=seed, device=device, values="integers")
    normal = baseline.draw(m, n, k, dtype, seed=seed, device=device)
    rows = ROWS if dtype == torch.float64 else None  # in float64 the expected values are slow
    for product in testing.PRODUCTS:
        what = f"{product} {testing.SHORT[dtype]} {m}x{n}x{k}"
        x, y = whole.of(product)
        testing.assert_same_bits(mm(x, y), reference.forward(x, y).to(dtype), f"{what}, integers")
        x, y = normal.of(product)
        assert_close(mm(x, y), x, y, what, rows, None)


def assert_exact(result: Tensor, x: Tensor, y: Tensor, what: str) -> None:
    """C·t = X·(Y·t) for a vector t of integers, none of them 0: one wrong element cannot hide.

    Several wrong ones of a row would have to cancel under weights that they do not know.

    >>> x, y = torch.ones(2, 3), torch.ones(3, 4)
    >>> assert_exact(x @ y, x, y, "ones")
    """
    shape = (len(x), y.shape[1])
    assert result.shape == shape, f"{what}: shape {tuple(result.shape)}, not {shape}"
    assert result.dtype == x.dtype, f"{what}: {result.dtype}, not {x.dtype}"
    generator = torch.Generator().manual_seed(y.shape[1])
    weights = torch.randint(1, 17, (y.shape[1],), generator=generator).double()
    signs = torch.randint(0, 2, (y.shape[1],), generator=generator).double()
    t = (weights * (1 - 2 * signs)).to(x.device)
    wrong = times(result, t) != times(x, times(y, t))
    if wrong.any():
        first, count = int(wrong.nonzero()[0]), int(wrong.sum())
        raise AssertionError(f"{what}: on integers {count} of {len(x)} rows are wrong, the first is {first}")


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
    result: Tensor, x: Tensor, y: Tensor, what: str, most_rows: int | None = ROWS, most_columns: int | None = COLUMNS
) -> None:
    """Up to ``most_rows`` × ``most_columns`` elements, corners among them: each within ROUNDINGS of ‖row‖·‖column‖.

    None is all of them.

    >>> x, y = torch.randn(9, 70), torch.randn(70, 80)
    >>> assert_close(x @ y, x, y, "normal")
    """
    if result.numel() == 0:
        return
    rows, columns = spread(len(x), most_rows or len(x)), spread(y.shape[1], most_columns or y.shape[1])
    truth, norms = exact(x, y, rows, columns)
    error = np.abs(result[rows][:, columns].cpu().double().numpy() - truth)
    limit = ROUNDINGS * torch.finfo(result.dtype).eps / 2 * norms
    if not (error <= limit).all():  # nor where it is NaN
        i, j = np.unravel_index(np.argmax(np.nan_to_num(error - limit, nan=np.inf)), error.shape)
        raise AssertionError(
            f"{what}: error {error[i, j]:.3g} at ({rows[i]}, {columns[j]}) > {ROUNDINGS} roundings of "
            f"‖row‖·‖column‖, {limit[i, j]:.3g}"
        )


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
        found.update(testing.bits(result[spread(len(result), ROWS)].cpu()).numpy().tobytes())
    return found.hexdigest()[:16]
