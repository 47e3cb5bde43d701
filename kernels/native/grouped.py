"""Grouped products by the driver: all groups of one product, or of the two of a backward pass, in one call."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch

from ..cpu import driver
from ..cpu.config import BlockConfig
from ..cpu.gemm_args import A_BS, ALPHA, B_BS, BATCH, C_BS, GEMM_ARGS, GROUPS, ONE, WIDE
from ..cpu.groups import BY_COLUMNS, BY_ROWS, BY_STEPS, COUNT, DIMENSION, END, GROUP_WORDS, HEADER
from .direct import CALL
from .torch_layout import const_data_ptr, has_thread_pool

Product = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
DIMENSIONS = {(2, 3): BY_ROWS, (3, 2): BY_COLUMNS, (2, 2): BY_STEPS}  # by the ranks of the operands


def multiply(block: BlockConfig, products: Sequence[Product], ends: Sequence[int], threads: int = 1) -> None:
    """out = a · b for each of one or two products (a, b, out), group by group; see kernels/cpu/groups.py.

    a (m, k) or a batch of it, b (k, n) or a batch of it, not both a batch; sizes > 0. out (m, n) with its elements
    apart, or a batch of it where neither is one; of the dtype of ``block``, or float32 where that has 16 bits. The ends
    of the groups do not decrease and lie within the size that is cut. What belongs to no group, or to a group without
    steps of k, is not written.
    """
    args, tables = (ctypes.c_int64 * (GEMM_ARGS * len(products)))(), []
    for index, (a, b, out) in enumerate(products):
        if out.stride(-1) != 1 and out.stride(-2) == 1:  # as its transpose, whose columns are adjacent
            a, b, out = b.mT, a.mT, out.mT
        tables.append(_table(DIMENSIONS[a.dim(), b.dim()], ends))
        operands = (x for tensor in (a, b) for x in (const_data_ptr(tensor), *tensor.stride()[-2:]))
        words = a.shape[-2], b.shape[-1], a.shape[-1], *operands, out.data_ptr(), *out.stride()[-2:]
        at = index * GEMM_ARGS
        args[at : at + len(words)] = list(words)
        args[at + BATCH], args[at + ALPHA], args[at + WIDE] = 1, ONE, int(out.dtype != a.dtype)
        for word, tensor in ((A_BS, a), (B_BS, b), (C_BS, out)):
            args[at + word] = tensor.stride(0) if tensor.dim() == 3 else 0
        args[at + GROUPS] = ctypes.addressof(tables[-1])
    if CALL(driver.gemm_address(block))(ctypes.addressof(args), len(products), threads):
        raise MemoryError("matmul_grad: the packing buffers cannot be allocated")


def _table(dimension: int, ends: Sequence[int]) -> ctypes.Array[ctypes.c_int64]:
    table = (ctypes.c_int64 * (HEADER + GROUP_WORDS * len(ends)))()
    table[COUNT], table[DIMENSION] = len(ends), dimension
    table[HEADER + END :: GROUP_WORDS] = list(ends)
    return table


def product(products: Sequence[Product], ends: Sequence[int]) -> None:
    """``multiply`` with the configuration of a dtype; threads where torch lends its pool."""
    block = driver.config(str(products[0][0].dtype).removeprefix("torch."))
    multiply(block, products, ends, torch.get_num_threads() if has_thread_pool() else 1)
