"""Products of batches that are broadcast: folded into fewer, larger products, so that no operand is copied larger.

    C[i, j, l, m, n] = Σ_k A[i, j, 1, m, k] · B[i, 1, l, k, n]

    shared  i   both have it                 a batch of the product
    left    j   A alone has it               joins m
    right   l   B alone has it               joins n

The product is one ``bmm`` over i, of j·m by l·n, or its transpose, whichever lies in memory as C does. Where neither
does, the batches are expanded with a stride of 0, if no gradient would then have to be summed over what is expanded.
Else what is folded is copied, which takes at most the memory of the operand and once more that of the result.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from .fallback import unsafe_view
from .ops import product

Dims = list[int]


class Folding(NamedTuple):
    """Dimensions of the batch by who has them."""

    shared: Dims
    left: Dims
    right: Dims


def is_broadcastable(one: Sequence[int], other: Sequence[int]) -> bool:
    return all(x == y or x == 1 or y == 1 for x, y in zip(reversed(one), reversed(other), strict=False))


def broadcast_product(a: Tensor, b: Tensor) -> tuple[tuple[int, ...], Tensor]:
    """The batch, and the product (…, m, n), contiguous and of any sizes, of a (…, m, k) and b (…, k, n)."""
    rank = max(a.dim(), b.dim())
    a, b = a[(None,) * (rank - a.dim())], b[(None,) * (rank - b.dim())]
    folding = Folding([], [], [])
    for dim in range(rank - 2):
        group = folding.left if b.shape[dim] == 1 else folding.right if a.shape[dim] == 1 else folding.shared
        group.append(dim)
    batch = tuple(a.shape[dim] if b.shape[dim] == 1 else b.shape[dim] for dim in range(rank - 2))
    return batch, _product(a, b, folding, batch)


def _product(a: Tensor, b: Tensor, folding: Folding, batch: tuple[int, ...]) -> Tensor:
    shared, left, right = folding
    m, n = a.dim() - 2, a.dim() - 1  # as dimensions of the result
    sizes = (*batch, a.shape[m], b.shape[n])
    straight, transposed = [*shared, *left, m, *right, n], [*shared, *right, n, *left, m]
    is_view = all(_merges(a, dims) for dims in (shared, [*left, m])) and all(
        _merges(b, dims) for dims in (shared, [*right, n])
    )
    is_straight, is_transposed = _is_in_order(straight, sizes), _is_in_order(transposed, sizes)
    if not (is_view and (is_straight or is_transposed)):
        summed = (bool(right) and a.requires_grad) or (bool(left) and b.requires_grad)
        wide = a.expand(*batch, *a.shape[-2:]), b.expand(*batch, *b.shape[-2:])
        if not summed and all(_merges(x, list(range(m))) for x in wide):
            return product(*(x.flatten(0, -3) for x in wide))
    rows, columns = _folded(a, b, folding)
    result = product(columns.mT, rows.mT) if is_transposed and not is_straight else product(rows, columns)
    if is_straight or is_transposed:
        return result
    return unsafe_view(result, [sizes[dim] for dim in straight]).permute(_inverse(straight)).contiguous()


def _folded(a: Tensor, b: Tensor, folding: Folding) -> tuple[Tensor, Tensor]:
    """Two matrices, or batches of them; of a, what is right has size 1, and of b, what is left."""
    shared, left, right = folding
    m, n = a.dim() - 2, a.dim() - 1
    rows = a.permute(*shared, *right, *left, m, n).flatten(len(shared), -2)
    columns = b.permute(*shared, m, *left, *right, n).flatten(len(shared) + 1, -1)
    return (rows.flatten(0, -3), columns.flatten(0, -3)) if shared else (rows, columns)


def _merges(x: Tensor, dims: Dims) -> bool:
    """Whether dimensions, in this order, can be seen as one without a copy."""
    seen = [(x.stride(dim), x.shape[dim]) for dim in dims if x.shape[dim] != 1]
    return x.numel() == 0 or all(outer == inner * size for (outer, _), (inner, size) in itertools.pairwise(seen))


def _is_in_order(dims: Dims, sizes: tuple[int, ...]) -> bool:
    """Whether a contiguous tensor of these dimensions has its elements in the order of the result."""
    seen = [dim for dim in dims if sizes[dim] != 1]
    return 0 in sizes or seen == sorted(seen)


def _inverse(order: Dims) -> Dims:
    return sorted(range(len(order)), key=order.__getitem__)
