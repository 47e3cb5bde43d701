"""Autograd for mm, bmm, addmm, baddbmm: what is saved for backward and which gradients are computed.

    C  = A · B        saves B where A needs a gradient, A where B does
    dA = dC · Bᵀ      dgrad, only where A needs it
    dB = Aᵀ · dC      wgrad, only where B needs it

Where something is added, C = beta · input + alpha · (A · B): the last two are multiplied by alpha, and

    dinput = beta · dC      summed over what input was expanded by

Batches are the same lines, item by item. The backward calls the differentiable operators, so that every further
derivative comes from the same lines.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

from . import cuda, strict_mode
from .dispatch_state import is_plain
from .fallback import PLAIN
from .gradient_dtypes import NEITHER, is_kept_in_float32, kept_dtype
from .gradients import OF_ATEN, addend_gradient, gradients, is_column_major
from .ops import (
    DTYPES,
    SCHEMAS,
    Once,
    addition,
    backward_by_compiled_code,
    both_gradients,
    by_compiled_code,
    eager,
    gradients_status,
    graph,
    library,
    make_kernel,
    native_status,
    product,
    rank_of,
    torch_impl_of,
)

_mm_backward = torch.ops.matmul_grad.mm_backward.default
_below_autograd = torch._C._AutoDispatchBelowAutograd
_mm, _bmm = eager(torch.ops.matmul_grad.mm.default), eager(torch.ops.matmul_grad.bmm.default)


def forward_only(self: Tensor, mat2: Tensor) -> Tensor:
    """The operator below autograd: no graph is recorded."""
    with _below_autograd():
        return _bmm(self, mat2) if self.dim() == 3 else _mm(self, mat2)


def addition_forward_only(input: Tensor, self: Tensor, mat2: Tensor, beta: float, alpha: float) -> Tensor:
    """As ``forward_only``."""
    with _below_autograd():
        return addition(input, self, mat2, beta, alpha)


@contextlib.contextmanager
def outer_levels_record() -> Iterator[None]:
    """A Function's forward and jvp run with recording off; the functorch levels around its own still record."""
    with _below_autograd(), torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
        yield


def may_have_tangents() -> bool:
    """Whether forward mode may be on. Compiled code enters the level of a transform without forward_ad."""
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def fused_gradients(
    grad: Tensor,
    self: Tensor | None,
    mat2: Tensor | None,
    needs: tuple[bool, bool],
    column_major: bool = False,
    in_float32: tuple[bool, bool] = NEITHER,
) -> tuple[Tensor | None, Tensor | None]:
    """``gradients``, both in one call where ``mm_backward`` supports them."""
    alike = self is not None and mat2 is not None and type(grad) is type(self) is type(mat2) is Tensor
    if not alike or grad.dim() != 2 or True in in_float32:
        return gradients(grad, self, mat2, needs, column_major, in_float32)
    return _mm_backward(grad, self, mat2, [True, True])


def save_operands(ctx: Any, self: Tensor, mat2: Tensor, needs_self: bool, needs_mat2: bool, *others: Tensor) -> None:
    """Save the operands that the gradients use, and ``others``; of one that is not used, its memory order."""
    if needs_self and needs_mat2:
        ctx.save_for_backward(self, mat2, *others)
        ctx.column_major = False
    else:
        ctx.save_for_backward(self if needs_mat2 else None, mat2 if needs_self else None, *others)
        ctx.column_major = is_column_major(self if needs_self else mat2)


class _Node(_SingleLevelFunction):
    """The base class of the nodes. Its ``apply`` records at the current functorch level, as torch's transforms do.

    ``torch.autograd.Function.apply`` starts at the outermost level and requires ``setup_context``. Only that class
    has the key under which compiled autograd caches a graph.
    """

    _compiled_autograd_key = staticmethod(torch.autograd.Function._compiled_autograd_key)


class Mm(_Node):
    """``mm`` or ``bmm`` as a node of the graph. One call makes output and context, which costs least in eager mode.

    Both gradients are computed where both inputs need one, even if ``torch.autograd.grad`` was asked for one of
    them: torch passes that to its C++ nodes and not to a Function in Python.
    """

    @staticmethod
    def forward(ctx: Any, self: Tensor, mat2: Tensor) -> Tensor:
        needs_self, needs_mat2 = ctx.needs_input_grad
        save_operands(ctx, self, mat2, needs_self, needs_mat2)
        ctx.in_float32 = is_kept_in_float32(self), is_kept_in_float32(mat2)
        if may_have_tangents():
            ctx.save_for_forward(self, mat2)
        if not torch._C._are_functorch_transforms_active():
            return forward_only(self, mat2)
        with outer_levels_record():
            return product(self, mat2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        self, mat2 = ctx.saved_tensors
        return fused_gradients(grad, self, mat2, ctx.needs_input_grad, ctx.column_major, ctx.in_float32)

    @staticmethod
    def jvp(ctx: Any, dself: Tensor | None, dmat2: Tensor | None) -> Tensor:
        """dC = dA · B + A · dB"""
        self, mat2 = ctx.saved_tensors
        functorch = torch._C._are_functorch_transforms_active()
        with outer_levels_record() if functorch else contextlib.nullcontext():
            terms = [product(dself, mat2)] if dself is not None else []
            if dmat2 is not None:
                terms.append(product(self, dmat2))
            return sum(terms[1:], terms[0])


class Addmm(_Node):
    """``addmm`` or ``baddbmm`` as a node of the graph."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, self: Tensor, mat2: Tensor, beta: float, alpha: float) -> Tensor:
        _, needs_self, needs_mat2, *_ = ctx.needs_input_grad
        save_operands(ctx, self, mat2, needs_self, needs_mat2)
        ctx.input_shape, ctx.kept_input, ctx.beta, ctx.alpha = input.shape, kept_dtype(input), beta, alpha
        ctx.in_float32 = is_kept_in_float32(self), is_kept_in_float32(mat2)
        if may_have_tangents():
            ctx.save_for_forward(self, mat2)
        if not torch._C._are_functorch_transforms_active():
            return addition_forward_only(input, self, mat2, beta, alpha)
        with outer_levels_record():
            return addition(input, self, mat2, beta, alpha)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        self, mat2 = ctx.saved_tensors
        needs_input, *needs = ctx.needs_input_grad[:3]
        dinput = None
        if needs_input:
            dinput = addend_gradient(scaled(grad, ctx.beta), ctx.input_shape, ctx.kept_input)
        both = fused_gradients(grad, self, mat2, tuple(needs), ctx.column_major, ctx.in_float32)
        dself, dmat2 = (None if one is None else scaled(one, ctx.alpha) for one in both)
        return dinput, dself, dmat2, None, None

    @staticmethod
    def jvp(ctx: Any, dinput: Tensor | None, dself: Tensor | None, dmat2: Tensor | None, *_: Any) -> Tensor:
        """dC = beta · dinput + alpha · (dA · B + A · dB)"""
        self, mat2 = ctx.saved_tensors
        functorch = torch._C._are_functorch_transforms_active()
        with outer_levels_record() if functorch else contextlib.nullcontext():
            terms = [] if dinput is None else [scaled(dinput, ctx.beta)]
            if dself is not None:
                terms.append(scaled(product(dself, mat2), ctx.alpha))
            if dmat2 is not None:
                terms.append(scaled(product(self, dmat2), ctx.alpha))
            return sum(terms[1:], terms[0]).expand(*self.shape[:-1], mat2.shape[-1])


def scaled(tensor: Tensor, by: float) -> Tensor:
    return tensor if by == 1 else tensor * by


_record: Callable[..., Tensor] = Mm.apply  # type: ignore[attr-defined]  # which torch adds to the base
_record_addition: Callable[..., Tensor] = Addmm.apply  # type: ignore[attr-defined]  # likewise


def with_graph(record: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """The product, recorded for backward and forward mode.

    This runs inside the dispatcher, under the Autograd key of one functorch level, where torch's formulas run
    too. ``_Node`` records at this level.
    """
    if not torch._C._are_functorch_transforms_active():
        return record(*arguments)
    with enable_single_level_autograd_function():
        return record(*arguments)


def has_own_graph(self: Tensor | None, mat2: Tensor | None) -> bool:
    """Dense real matrices of one dtype; any other product, its gradient and its errors are torch's."""
    return (
        self is not None
        and mat2 is not None
        and self.dtype == mat2.dtype
        and self.dtype in DTYPES
        and self.layout == mat2.layout == torch.strided
        and not (self.is_nested or mat2.is_nested)
    )


def record_by_torch(result: Tensor) -> None:
    """After a product on CPU, have compiled code record the next ones, where this torch allows: see ``graph.py``."""
    global _is_recording_tried
    if result.device.type == "cpu" and not gradients_status() and graph.can_be_tried():
        _is_recording_tried = True
        _recording.result()


def _enable_recording() -> None:
    if not graph.reason():
        for key in graph.VMAP:
            for name, kernel in OF_ATEN.items():
                aten.impl(name, kernel, key)
        graph.enable()


_is_recording_tried = False
_recording = Once(_enable_recording)
aten = torch.library.Library("aten", "IMPL")


def is_seen_below_autograd(*tensors: Tensor) -> bool:
    """Whether the dispatcher has more to do with a product below autograd than to call the kernel in Python.

    It has with subclasses, modes, and tensors whose memory does not hold their elements. Else a call of it is saved.
    """
    if torch._C._len_torch_dispatch_stack():
        return True
    for x in tensors:  # noqa: SIM110  # a generator costs a microsecond
        if type(x) not in PLAIN or x.is_neg() or x._is_zerotensor():
            return True
    return False


def make_autograd_kernel(name: str) -> Callable[..., Tensor]:
    """An operator's kernel under the Autograd key of every device; a compiled one replaces it for the CPU."""
    rank, torch_impl, kernel = rank_of(name), torch_impl_of(name), make_kernel(name)

    def product_autograd(self: Tensor, mat2: Tensor) -> Tensor:
        if not has_own_graph(self, mat2):
            strict_mode.note_fallback(self, mat2)
            return torch_impl(self, mat2)
        if not self.dim() == mat2.dim() == rank:
            return torch_impl(self, mat2)  # which raises
        is_dispatched = True
        if self.device.type == "cpu":
            native_status()
        elif self.is_cuda:
            is_dispatched = not cuda.status() or is_seen_below_autograd(self, mat2)
        recorded = torch.is_grad_enabled() and (self.requires_grad or mat2.requires_grad)
        if not recorded and not may_have_tangents():
            return forward_only(self, mat2) if is_dispatched else kernel(self, mat2)
        result = with_graph(_record, self, mat2)
        if not _is_recording_tried:
            record_by_torch(result)
        return result

    def addition_autograd(self: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
        if not has_own_graph(mat1, mat2) or not has_own_graph(self, mat1):
            strict_mode.note_fallback(mat1, mat2)
            return torch_impl(self, mat1, mat2, beta=beta, alpha=alpha)
        if not mat1.dim() == mat2.dim() == rank:
            return torch_impl(self, mat1, mat2)
        if self.device.type == "cpu":
            native_status()
        recorded = torch.is_grad_enabled() and (self.requires_grad or mat1.requires_grad or mat2.requires_grad)
        if not recorded and not may_have_tangents():
            if self.is_cuda and not is_seen_below_autograd(self, mat1, mat2):
                return kernel(self, mat1, mat2, beta=beta, alpha=alpha)
            return addition_forward_only(self, mat1, mat2, beta, alpha)
        result = with_graph(_record_addition, self, mat1, mat2, beta, alpha)
        if not _is_recording_tried:
            record_by_torch(result)
        return result

    return addition_autograd if "add" in name else product_autograd


def mm_backward(
    grad: Tensor, self: Tensor, mat2: Tensor, output_mask: list[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Both gradients, composed of differentiable products, until the compiled kernel takes the CPU's place."""
    if self.device.type == "cpu":
        gradients_status()
    column_major = is_column_major(self) or is_column_major(mat2)
    if all(output_mask) and not column_major and is_plain(grad, self, mat2):
        both = both_gradients(grad, self, mat2)
        if both is not None:
            return both
    return gradients(grad, self, mat2, (output_mask[0], output_mask[1]))


for name in SCHEMAS:
    kernel = make_autograd_kernel(name)
    library.impl(name, kernel, "Autograd")
    by_compiled_code(f"_{name}_in_python", SCHEMAS[name], kernel, "CompositeImplicitAutograd")
    library.define(f"_{name}_recorded{SCHEMAS[name]}")  # for the test of what compiled code records
    library.impl(f"_{name}_recorded", kernel, "CompositeImplicitAutograd")
library.impl("mm_backward", mm_backward, "CompositeImplicitAutograd")
for batched in ("FuncTorchBatched", "Batched"):  # a composite still under vmap, where the CPU has its own kernel
    library.impl("mm_backward", mm_backward, batched)
backward_by_compiled_code("mm", mm_backward)
for name in ("matmul", "linear", "addmm"):
    backward_by_compiled_code(name, OF_ATEN["mkldnn_linear_backward" if name == "addmm" else f"{name}_backward"])
