"""Which operands a grouped product takes, and torch's errors for the others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from .ops import DTYPES


def fits(self: Tensor, mat2: Tensor, offs: Tensor | None) -> bool:
    """Whether ranks and sizes are those of a grouped product, and offs is there where it is needed."""
    if self.dim() not in (2, 3) or mat2.dim() not in (2, 3) or self.shape[-1] != mat2.shape[-2]:
        return False
    batches = [x.shape[0] for x in (self, mat2) if x.dim() == 3]
    if len(batches) == 2:
        return offs is None and batches[0] == batches[1]
    if offs is None or offs.dim() != 1 or offs.dtype != torch.int32:
        return False
    return all(groups == offs.shape[0] for groups in batches)


def _is_plain(self: Tensor, mat2: Tensor, offs: Tensor | None) -> bool:
    """Dense real operands of one dtype on one device."""
    return (
        self.dtype == mat2.dtype
        and self.dtype in DTYPES
        and all(x.layout == torch.strided and not x.is_nested for x in (self, mat2))
        and all(x.device == self.device for x in (mat2, offs) if x is not None)
    )


def is_grouped_product(
    self: Tensor, mat2: Tensor, offs: Tensor | None, bias: Any = None, out_dtype: Any = None
) -> bool:
    """Whether the operator computes it."""
    is_cut = fits(self, mat2, offs) and _is_plain(self, mat2, offs)
    return is_cut and bias is None and out_dtype in (None, self.dtype)


def require(self: Tensor, mat2: Tensor, offs: Tensor | None, bias: Any = None, out_dtype: Any = None) -> None:
    """Raise torch's error for what is no grouped product, or one of this package where torch has none."""
    if is_grouped_product(self, mat2, offs, bias, out_dtype):
        return
    devices = {x.device for x in (self, mat2, offs, bias) if x is not None}
    if len(devices) == 1:
        stand_ins = _stand_ins(self, mat2)
        swapped = {self.dtype: stand_ins[0].dtype, stand_ins[0].dtype: self.dtype}
        torch.ops.aten._grouped_mm.default(*stand_ins, offs, bias, swapped.get(out_dtype, out_dtype))
    raise RuntimeError(
        "matmul_grad.grouped_mm: expected two dense matrices, or batches of them, of one floating-point dtype on one "
        f"device, and offs of int32 there, got {tuple(self.shape)} of {self.dtype} on {self.device} and "
        f"{tuple(mat2.shape)} of {mat2.dtype} on {mat2.device}"
    )


def _stand_ins(*operands: Tensor) -> list[Tensor]:
    """Operands of these sizes with strides and a dtype that torch takes, so that another error of its comes first.

    Its CPU kernel takes all dtypes but float64, and what traces it bfloat16 alone.
    """
    if not all(x.layout == torch.strided and not x.is_nested for x in operands):
        return list(operands)
    dtypes = [x.dtype for x in operands]
    if dtypes == [torch.float64] * 2:
        dtypes = [torch.float32] * 2
    if dtypes[0] == dtypes[1] in DTYPES and any(x.is_meta or isinstance(x, FakeTensor) for x in operands):
        dtypes = [torch.bfloat16] * 2
    found = []
    for x, dtype in zip(operands, dtypes, strict=True):
        *front, last = x.shape or (1,)
        padded = x.new_empty((*front, (last + 7) // 8 * 8 or 8), dtype=dtype)[..., :last]
        found.append(padded if x.shape else padded[0])
    return found


def size_cut(self: Tensor, mat2: Tensor) -> int:
    """The size that is cut into groups."""
    return mat2.shape[-1] if self.dim() > mat2.dim() else self.shape[-1 if self.dim() == mat2.dim() else 0]


def ascend(ends: list[int], whole: int) -> bool:
    return all(begin <= end for begin, end in zip([0, *ends], [*ends, whole], strict=True))


def are_groups(self: Tensor, mat2: Tensor, offs: Tensor | None) -> bool:
    """Whether offs ascend, from 0 to the size that they cut at most."""
    return offs is None or ascend(offs.tolist(), size_cut(self, mat2))


def is_column_major(x: Tensor) -> bool:
    """Whether a gradient of its shape is computed with adjacent rows, as its operand has them."""
    return bool(x.stride(-2) == 1 and x.stride(-1) == x.shape[-2] != 1)
