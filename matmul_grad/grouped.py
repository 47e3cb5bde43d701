"""Grouped products: one product whose rows, columns or steps of k are cut into groups, each a product of its own.

    rows       (m, k) · (g, k, n) → (m, n)      a group of rows has a matrix of its own, as the tokens of an expert
    columns    (g, m, k) · (k, n) → (m, n)      so has a group of columns
    steps      (m, k) · (k, n) → (g, m, n)      a sum for each group of steps, as the gradient of the experts' weights

Group i is the range from offs[i - 1], or 0, up to offs[i]. What belongs to no group is zero, and so is the sum of an
empty one. The gradients are grouped products again, with the same offs,

    dA = grouped(dC, Bᵀ),  dB = grouped(Aᵀ, dC)

so rows give rows and steps, columns steps and columns, steps columns and rows, and so on to any order. Two batches are
bmm. On a CPU each product is one call of the driver, and so are both gradients; on a GPU each is one launch, which
reads offs there.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from . import autocast, fallback, sharding, strict_mode
from .autograd import _below_autograd, _Node, may_have_tangents, outer_levels_record, with_graph
from .flops import count_flops
from .grouped_shapes import ascend, is_column_major, require, size_cut
from .ops import NAMESPACE, TAGS, _has_kernel, library, product, require_storage
from .vmap import Dims

SCHEMA = "(Tensor self, Tensor mat2, Tensor? offs=None, Tensor? bias=None, ScalarType? out_dtype=None) -> Tensor"
BACKWARD = "(Tensor grad, Tensor self, Tensor mat2, Tensor offs) -> (Tensor, Tensor)"


# --- kernels --------------------------------------------------------------------------------------------------------


def is_computed(self: Tensor) -> bool:
    """Whether the kernels of a CPU compute a product of this device and dtype."""
    return self.device.type == "cpu" and _has_kernel(self)


def is_on_gpu(x: Tensor) -> bool:
    return x.is_cuda


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
    for self, mat2, _ in products:
        require_storage(self, mat2)
    if not (is_on_gpu(offs) and _by_gpu(products, offs)):
        _fill_from_host(products, offs)


def _by_gpu(products: list[tuple[Tensor, Tensor, Tensor]], offs: Tensor) -> bool:
    """Whether the kernel of a GPU computes them, which reads offs there."""
    from .kernels.gpu import grouped, launch

    if not all(grouped.supports(self, mat2, offs, out) for self, mat2, out in products):
        return False
    try:
        for self, mat2, out in products:
            grouped.product(self, mat2, offs, out)
    except launch.CannotBuild:
        return False
    return True


def _fill_from_host(products: list[tuple[Tensor, Tensor, Tensor]], offs: Tensor) -> None:
    """By the driver of a CPU, else by a product of torch's for each group."""
    a, b, _ = products[0]
    ends, whole = offs.tolist(), size_cut(a, b)
    if not ascend(ends, whole):
        raise RuntimeError(f"offs has to be ascending, from 0 to {whole} at most, got {ends}")
    used = []
    for self, mat2, out in products:
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
    dtypes      as ``mm``. offs is int32, the end of each group, ascending
    aliasing    the result is new memory
    rounding    as ``mm``
    errors      torch.nn.functional.grouped_mm's, that for a bias or another out_dtype among them; on CPU RuntimeError
                for offs that descend or exceed the size that they cut. CUDA kernels read them on the device: there the
                result of such offs is not defined, and nothing outside of the operands is read or written
    determinism as ``mm``; no group changes the bits of another. On CPU a group has those that ``mm`` gives it alone
    source      kernels/cpu/groups.py, kernels/gpu/groups.py

    Group i begins where the one before it ends; it may be empty. What lies behind the last group is zero in the result
    and has no gradient.

    >>> import torch, matmul_grad
    >>> tokens, experts = torch.ones(4, 2), torch.tensor([1.0, 10.0, 100.0]).view(3, 1, 1).expand(3, 2, 1)
    >>> ends = torch.tensor([1, 1, 3], dtype=torch.int32)
    >>> matmul_grad.grouped_mm(tokens, experts, offs=ends).flatten().tolist()
    [2.0, 200.0, 200.0, 0.0]
    """
    others = [mat_b, *(x for x in (offs, bias) if x is not None)]
    is_dtype = out_dtype is None or isinstance(out_dtype, torch.dtype)
    if not is_dtype or any(fallback.is_needed(mat_a, x) for x in others):
        return torch.nn.functional.grouped_mm(mat_a, mat_b, offs=offs, bias=bias, out_dtype=out_dtype)
    result: Tensor = _grouped(mat_a, mat_b, offs, bias, out_dtype)
    return result
