"""The rules of vmap: a batch of products is one product, of a taller matrix, a wider one, or of one batch more.

A batched, B not     the batch joins m
B batched, A not     it joins n
both                 bmm; a batch of batches is one longer batch
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .ops import NAMESPACE, addition, library, product

Dims = Sequence[int | None]


def mm_rule(info: Any, in_dims: Dims, self: Tensor, mat2: Tensor) -> tuple[Tensor, int]:
    self_dim, mat2_dim = in_dims
    if mat2_dim is None and self_dim is not None:
        items = self.movedim(self_dim, 0)
        return product(items.flatten(0, 1), mat2).unflatten(0, items.shape[:2]), 0
    if self_dim is None and mat2_dim is not None:
        columns = mat2.movedim(mat2_dim, 1)
        wide = product(self, columns.flatten(1, 2))
        return wide.unflatten(1, columns.shape[1:]), 1
    return product(self.movedim(self_dim or 0, 0), mat2.movedim(mat2_dim or 0, 0)), 0


def bmm_rule(info: Any, in_dims: Dims, self: Tensor, mat2: Tensor) -> tuple[Tensor, int]:
    self_dim, mat2_dim = in_dims
    if mat2_dim is None and self_dim is not None:
        rows = self.movedim(self_dim, 1)
        return product(rows.flatten(1, 2), mat2).unflatten(1, rows.shape[1:3]), 1
    if self_dim is None and mat2_dim is not None:
        columns = mat2.movedim(mat2_dim, 2)
        return product(self, columns.flatten(2, 3)).unflatten(2, columns.shape[2:]), 2
    a, b = self.movedim(self_dim or 0, 0), mat2.movedim(mat2_dim or 0, 0)
    return product(a.flatten(0, 1), b.flatten(0, 1)).unflatten(0, a.shape[:2]), 0


def in_front(tensor: Tensor, dim: int | None, count: int, rank: int) -> Tensor:
    """The batch first, the items of ``rank`` with leading ones; what has no batch is expanded, not copied."""
    whole = tensor.movedim(dim, 0) if dim is not None else tensor.expand(count, *tensor.shape)
    return whole[(slice(None), *[None] * (rank + 1 - whole.dim()))]


def addmm_rule(
    info: Any, in_dims: Dims, self: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1
) -> tuple[Tensor, int]:
    operands = zip((self, mat1, mat2), in_dims, strict=False)
    input, a, b = (in_front(tensor, dim, info.batch_size, 2) for tensor, dim in operands)
    return addition(input, a, b, beta, alpha), 0


def baddbmm_rule(
    info: Any, in_dims: Dims, self: Tensor, batch1: Tensor, batch2: Tensor, *, beta: float = 1, alpha: float = 1
) -> tuple[Tensor, int]:
    operands = zip((self, batch1, batch2), in_dims, strict=False)
    input, a, b = (in_front(tensor, dim, info.batch_size, 3) for tensor, dim in operands)
    input = input.expand(*a.shape[:2], *input.shape[2:])
    long = addition(input.flatten(0, 1), a.flatten(0, 1), b.flatten(0, 1), beta, alpha)
    return long.unflatten(0, a.shape[:2]), 0


RULES: dict[str, Callable[..., Any]] = {"mm": mm_rule, "bmm": bmm_rule, "addmm": addmm_rule, "baddbmm": baddbmm_rule}


def register() -> None:
    for name, rule in RULES.items():
        torch.library.register_vmap(f"{NAMESPACE}::{name}", rule, lib=library)
