"""Grouped products: one product whose rows, columns or steps of k are cut into groups, each a product of its own.

    rows       (m, k) · (g, k, n) → (m, n)      a group of rows has a matrix of its own, as the tokens of an expert
    columns    (g, m, k) · (k, n) → (m, n)      so has a group of columns
    steps      (m, k) · (k, n) → (g, m, n)      a sum for each group of steps, as the gradient of the experts' weights

Group i is the range from offs[i - 1], or 0, up to offs[i]. What belongs to no group is zero, and so is the sum of an
empty one. The gradients are grouped products again, with the same offs,

    dA = grouped(dC, Bᵀ),  dB = grouped(Aᵀ, dC)

so rows give rows and steps, columns steps and columns, steps columns and rows, and so on to any order. Two batches are
bmm. On a CPU each product is one call of the driver, and so are both gradients.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from . import autocast, fallback, sharding, strict_mode
from .autograd import _below_autograd, _Node, may_have_tangents, outer_levels_record, with_graph
from .flops import count_flops
from .ops import DTYPES, NAMESPACE, TAGS, _has_kernel, library, product, require_storage
from .vmap import Dims

SCHEMA = "(Tensor self, Tensor mat2, Tensor? offs=None, Tensor? bias=None, ScalarType? out_dtype=None) -> Tensor"
BACKWARD = "(Tensor grad, Tensor self, Tensor mat2, Tensor offs) -> (Tensor, Tensor)"


# --- what is supported, and torch's errors --------------------------------------------------------------------------


def _fits(self: Tensor, mat2: Tensor, offs: Tensor | None) -> bool:
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
    fits = _fits(self, mat2, offs) and _is_plain(self, mat2, offs)
    return fits and bias is None and out_dtype in (None, self.dtype)


def require(self: Tensor, mat2: Tensor, offs: Tensor | None, bias: Any = None, out_dtype: Any = None) -> None:
    """Raise torch's error for what is no grouped product, or one of this package where torch has none."""
    if is_grouped_product(self, mat2, offs, bias, out_dtype):
        return
    devices = {x.device for x in (self, mat2, offs, bias) if x is not None}
    if len(devices) == 1:
        torch.ops.aten._grouped_mm.default(*_aligned(self, mat2), offs, bias, out_dtype)
    raise RuntimeError(
        "matmul_grad.grouped_mm: expected two dense matrices, or batches of them, of one floating-point dtype on one "
        f"device, and offs of int32 there, got {tuple(self.shape)} of {self.dtype} on {self.device} and "
        f"{tuple(mat2.shape)} of {mat2.dtype} on {mat2.device}"
    )


def _aligned(*operands: Tensor) -> list[Tensor]:
    """Operands of these sizes with strides and a dtype that torch takes, so that another error of its comes first."""
    if not all(x.layout == torch.strided and x.dim() in (2, 3) for x in operands):
        return list(operands)
    to_float = all(x.dtype == torch.float64 for x in operands)
    found = []
    for x in operands:
        *front, last = x.shape
        padded = x.new_empty((*front, (last + 7) // 8 * 8 or 8), dtype=torch.float32 if to_float else x.dtype)
        found.append(padded[..., :last])
    return found


def _whole(self: Tensor, mat2: Tensor) -> int:
    """The size that is cut into groups."""
    return mat2.shape[-1] if self.dim() > mat2.dim() else self.shape[-1 if self.dim() == mat2.dim() else 0]


def _ascend(ends: list[int], whole: int) -> bool:
    return all(begin <= end for begin, end in zip([0, *ends], [*ends, whole], strict=True))


def are_groups(self: Tensor, mat2: Tensor, offs: Tensor | None) -> bool:
    """Whether offs ascend, from 0 to the size that they cut at most."""
    return offs is None or _ascend(offs.tolist(), _whole(self, mat2))


def is_computed(self: Tensor) -> bool:
    """Whether these kernels compute a product of this device and dtype."""
    return self.device.type == "cpu" and _has_kernel(self)


def is_column_major(x: Tensor) -> bool:
    """Whether a gradient of its shape is computed with adjacent rows, as its operand has them."""
    return bool(x.stride(-2) == 1 and x.stride(-1) == x.shape[-2] != 1)


# --- kernels --------------------------------------------------------------------------------------------------------


def _shape(self: Tensor, mat2: Tensor, offs: Tensor | None) -> tuple[int, ...]:
    groups = [] if offs is None or self.dim() != mat2.dim() else [offs.shape[0]]
    return (*groups, self.shape[-2], mat2.shape[-1])


def _parts(self: Tensor, mat2: Tensor, out: Tensor, ends: list[int]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """The products of the groups, and for those that are zero their results."""
    ranges = [slice(begin, end) for begin, end in zip([0, *ends], ends, strict=False)]
    if self.dim() == 3:
        return [(self[i], mat2[:, part], out[:, part]) for i, part in enumerate(ranges)]
    if mat2.dim() == 3:
        return [(self[part], mat2[i], out[part]) for i, part in enumerate(ranges)]
    return [(self[:, part], mat2[part], out[i]) for i, part in enumerate(ranges)]


def _by_torch(products: list[tuple[Tensor, Tensor, Tensor]], ends: list[int]) -> None:
    """A product of torch's for each group."""
    for self, mat2, out in products:
        for one, other, result in _parts(self, mat2, out, ends):
            result.copy_(torch.ops.aten.mm.default(one, other))


def _fill(products: list[tuple[Tensor, Tensor, Tensor]], offs: Tensor) -> None:
    """Compute one or two products into their results, whose memory is new."""
    a, b, _ = products[0]
    ends, whole = offs.tolist(), _whole(a, b)
    if not _ascend(ends, whole):
        raise RuntimeError(f"offs has to be ascending, from 0 to {whole} at most, got {ends}")
    used = []
    for self, mat2, out in products:
        require_storage(self, mat2)
        _zero_rest(self, mat2, out, ends)
        if self.numel() and mat2.numel() and ends:
            used.append((self, mat2, out))
    if not used:
        return
    if is_computed(a):
        from .kernels.native import grouped

        grouped.product(used, ends)
    else:
        strict_mode.note_fallback(a, b)
        _by_torch(used, ends)


def _zero_rest(self: Tensor, mat2: Tensor, out: Tensor, ends: list[int]) -> None:
    """Where no group writes."""
    last = ends[-1] if ends else 0
    if self.numel() == 0 or mat2.numel() == 0 or last == 0:
        out.zero_()
    elif self.dim() == 3:
        out[:, last:].zero_()
    elif mat2.dim() == 3:
        out[last:].zero_()
    else:
        for group, (begin, end) in enumerate(zip([0, *ends], ends, strict=False)):
            if begin == end:
                out[group].zero_()


def forward(self: Tensor, mat2: Tensor, offs: Tensor | None = None, bias: Any = None, out_dtype: Any = None) -> Tensor:
    """Below autograd, on every device."""
    require(self, mat2, offs, bias, out_dtype)
    if offs is None:
        return product(self, mat2)
    out = self.new_empty(_shape(self, mat2, offs))
    _fill([(self, mat2, out)], offs)
    return out


def _empty_like(x: Tensor, columns: bool) -> Tensor:
    """A gradient of ``x``: contiguous, or with adjacent rows."""
    return x.new_empty(x.mT.shape).mT if columns else x.new_empty(x.shape)


def _backward(grad: Tensor, self: Tensor, mat2: Tensor, offs: Tensor) -> tuple[Tensor, Tensor]:
    """Both gradients in one call."""
    require(grad, mat2.mT, offs)
    require(self.mT, grad, offs)
    dself, dmat2 = _empty_like(self, is_column_major(self)), _empty_like(mat2, is_column_major(mat2))
    _fill([(grad, mat2.mT, dself), (self.mT, grad, dmat2)], offs)
    return dself, dmat2


def _fake_forward(
    self: Tensor, mat2: Tensor, offs: Tensor | None = None, bias: Any = None, out_dtype: Any = None
) -> Tensor:
    require(self, mat2, offs, bias, out_dtype)
    return self.new_empty(_shape(self, mat2, offs))


def _fake_backward(grad: Tensor, self: Tensor, mat2: Tensor, offs: Tensor) -> tuple[Tensor, Tensor]:
    return _empty_like(self, is_column_major(self)), _empty_like(mat2, is_column_major(mat2))


# --- autograd -------------------------------------------------------------------------------------------------------


def gradients(
    grad: Tensor, self: Tensor | None, mat2: Tensor | None, offs: Tensor, columns: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """dA from mat2 and dB from self, by the differentiable operator; ``columns``: which have adjacent rows."""
    dself = dmat2 = None
    if mat2 is not None:
        dself = _grouped(mat2, grad.mT, offs).mT if columns[0] else _grouped(grad, mat2.mT, offs)
    if self is not None:
        dmat2 = _grouped(grad.mT, self, offs).mT if columns[1] else _grouped(self.mT, grad, offs)
    return dself, dmat2


class GroupedMm(_Node):
    """``grouped_mm`` with offs as a node of the graph."""

    @staticmethod
    def forward(ctx: Any, self: Tensor, mat2: Tensor, offs: Tensor) -> Tensor:
        needs_self, needs_mat2, _ = ctx.needs_input_grad
        ctx.save_for_backward(self if needs_mat2 else None, mat2 if needs_self else None, offs)
        ctx.columns = is_column_major(self), is_column_major(mat2)
        if may_have_tangents():
            ctx.save_for_forward(self, mat2, offs)
        levels = torch._C._are_functorch_transforms_active()
        with outer_levels_record() if levels else _below_autograd():
            return _grouped(self, mat2, offs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        self, mat2, offs = ctx.saved_tensors
        if self is not None and mat2 is not None and type(grad) is type(self) is type(mat2) is Tensor:
            return *_grouped_backward(grad, self, mat2, offs), None
        return *gradients(grad, self, mat2, offs, ctx.columns), None

    @staticmethod
    def jvp(ctx: Any, dself: Tensor | None, dmat2: Tensor | None, _: Any) -> Tensor:
        """dC = grouped(dA, B) + grouped(A, dB)"""
        self, mat2, offs = ctx.saved_tensors
        functorch = torch._C._are_functorch_transforms_active()
        with outer_levels_record() if functorch else contextlib.nullcontext():
            terms = [] if dself is None else [_grouped(dself, mat2, offs)]
            if dmat2 is not None:
                terms.append(_grouped(self, dmat2, offs))
            return sum(terms[1:], terms[0])


_record: Any = GroupedMm.apply  # type: ignore[attr-defined]  # which torch adds to the base


def _is_recorded(*tensors: Tensor) -> bool:
    return (torch.is_grad_enabled() and any(x.requires_grad for x in tensors)) or may_have_tangents()


def _autograd(
    self: Tensor, mat2: Tensor, offs: Tensor | None = None, bias: Any = None, out_dtype: Any = None
) -> Tensor:
    require(self, mat2, offs, bias, out_dtype)
    if offs is None:
        return product(self, mat2)
    if _is_recorded(self, mat2):
        return with_graph(_record, self, mat2, offs)
    with _below_autograd():
        return _grouped(self, mat2, offs)


def _backward_autograd(grad: Tensor, self: Tensor, mat2: Tensor, offs: Tensor) -> tuple[Any, Any]:
    if _is_recorded(grad, self, mat2):
        return gradients(grad, self, mat2, offs, (is_column_major(self), is_column_major(mat2)))
    with _below_autograd():
        both: tuple[Tensor, Tensor] = _grouped_backward(grad, self, mat2, offs)
        return both


# --- vmap, registration, the public function ------------------------------------------------------------------------


def _items(info: Any, in_dims: Dims, tensors: tuple[Any, ...]) -> list[list[Any]]:
    """The arguments of each item of a batch."""

    def item(x: Any, dim: int | None, index: int) -> Any:
        return x.select(dim, index) if dim is not None else x

    return [[item(x, dim, index) for x, dim in zip(tensors, in_dims)] for index in range(info.batch_size)]


def _rule(info: Any, in_dims: Dims, *arguments: Any) -> tuple[Tensor, int]:
    """Item by item, as torch's: each has groups of its own."""
    return torch.stack([_grouped(*item) for item in _items(info, in_dims, arguments)]), 0


def _backward_rule(info: Any, in_dims: Dims, *arguments: Any) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    both = [_grouped_backward(*item) for item in _items(info, in_dims, arguments)]
    return (torch.stack([one for one, _ in both]), torch.stack([other for _, other in both])), (0, 0)


def _flops(self: Any, mat2: Any, *_: Any) -> int:
    """The sizes of a result's element and of k belong to one group."""
    m, k = self[-2:]
    return 2 * int(m) * int(k) * int(mat2[-1]) * (self[0] if len(self) == len(mat2) == 3 else 1)


def _backward_flops(_: Any, self: Any, mat2: Any, *__: Any) -> int:
    return 2 * _flops(self, mat2)


def _register(name: str, schema: str, *kernels: Any) -> Any:
    """kernels: of every device, of Autograd, of tracing, of vmap; and the count of FLOPs."""
    composite, recorded, fake, rule, flops = kernels
    library.define(f"{name}{schema}", tags=TAGS)
    library.impl(name, composite, "CompositeExplicitAutograd")
    library.impl(name, recorded, "Autograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=library)
    torch.library.register_vmap(f"{NAMESPACE}::{name}", rule, lib=library)
    count_flops(getattr(torch.ops.matmul_grad, name), flops)
    return getattr(torch.ops.matmul_grad, name).default


_grouped = _register("grouped_mm", SCHEMA, forward, _autograd, _fake_forward, _rule, _flops)
_grouped_backward = _register(
    "_grouped_mm_backward", BACKWARD, _backward, _backward_autograd, _fake_backward, _backward_rule, _backward_flops
)
for _device, _key in autocast.DEVICES.items():
    library.impl("grouped_mm", autocast.make_cast("grouped_mm", _device), _key)
sharding.register(sharding.register_grouped_with)


def grouped_mm(
    mat_a: Tensor,
    mat_b: Tensor,
    *,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Matrix products of groups of rows, of columns or of steps of k, differentiable to any order.

    C[r, :] = A[r, :] · B[i]  for each row r of group i,  dA = grouped(dC, Bᵀ),  dB = grouped(Aᵀ, dC)

    shapes      mat_a (m, k), mat_b (g, k, n) → (m, n), groups of rows; (g, m, k), (k, n) → (m, n), of columns;
                (m, k), (k, n) → (g, m, n), of steps of k; (g, m, k), (g, k, n) → (g, m, n), without offs
    strides     any, read as they are; the result is contiguous
    dtypes      as ``mm`` on CPU; on CUDA a loop of torch.mm. offs is int32, the end of each group, ascending
    aliasing    the result is new memory
    rounding    as ``mm``
    errors      torch.nn.functional.grouped_mm's, that for a bias or another out_dtype among them; RuntimeError for offs
                that descend or exceed the size that they cut
    determinism as ``mm``: a group has the bits that ``mm`` gives it alone
    source      kernels/cpu/groups.py

    Group i begins where the one before it ends; it may be empty. What lies behind the last group is zero in the result
    and has no gradient.

    >>> import torch, matmul_grad
    >>> tokens, experts = torch.ones(4, 2), torch.tensor([1.0, 10.0, 100.0]).view(3, 1, 1).expand(3, 2, 1)
    >>> ends = torch.tensor([1, 1, 3], dtype=torch.int32)
    >>> matmul_grad.grouped_mm(tokens, experts, offs=ends).flatten().tolist()
    [2.0, 200.0, 200.0, 0.0]
    """
    others = [mat_b, *(x for x in (offs, bias) if x is not None)]
    if any(fallback.is_needed(mat_a, x) for x in others):
        return torch.nn.functional.grouped_mm(mat_a, mat_b, offs=offs, bias=bias, out_dtype=out_dtype)
    result: Tensor = _grouped(mat_a, mat_b, offs, bias, out_dtype)
    return result
