"""The switch on CUDA: aten's own products, by kernels in Python that launch those of this package.

As on CPU only the kernels under one key change, and those of ABOVE_AUTOGRAD under autograd. Unsupported calls fall back
to the kernels that PyTorch has there, with the arguments as they came: the same results, the same errors.
"""

from __future__ import annotations

import warnings
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import aten_override_kept, strict_mode
from .kernels.cpu.fork_safety import fork_safe_lock
from .kernels.native.op_table import ABOVE_AUTOGRAD, DOT, MATRICES, MATVEC, OVERLOADS, op_of
from .ops import accelerated, are_scales, can_be_added, compute, has_work
from .out_variants import can_write

RUN, FALLBACK, UNSUPPORTED = range(3)  # the outcome of a call

calls: defaultdict[tuple[str, str], Counter[str]] = defaultdict(Counter)  # by operator and outcome: how many of a dtype
_counting = fork_safe_lock()


class CudaOverride:
    """Kernels under aten's products for one dispatch key, while it is on."""

    def __init__(self, key: str = "CUDA") -> None:
        self.key = key
        self._library: Any = None

    def is_on(self) -> bool:
        return self._library is not None

    def install(self) -> None:
        """Install the kernels, for all of OVERLOADS or, where that fails, for none."""
        library = new_registrations()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch's, that a kernel is overridden
                for name in OVERLOADS:
                    torch_impl = torch.library.get_kernel(f"aten::{name}", self.key)
                    library.impl(name, self.key, make_kernel(name, torch_impl), True)
                above = f"Autograd{self.key}"
                for name in ABOVE_AUTOGRAD:
                    kernel = aten_override_kept.make_kernel(name, torch.library.get_kernel(f"aten::{name}", above))
                    library.impl(name, above, kernel, True)
        except BaseException:
            library.reset()
            raise
        self._library = library

    def uninstall(self) -> None:
        """Remove them: what ``install`` found is there again."""
        self._library = None


def new_registrations() -> Any:
    """Kernels of aten's operators, until nothing refers to it: ``impl(name, key, kernel, with_keyset)`` puts one there.

    ``torch.library.Library`` also keeps a list in Python, by which it refuses a second kernel of one operator. An
    interrupt can leave a kernel in it that is gone, and then no other can be registered in this process.
    """
    return torch._C._dispatch_library("IMPL", "aten", "", __file__)


def make_kernel(overload: str, torch_impl: Any) -> Callable[..., Tensor]:
    """The kernel for one of OVERLOADS; ``torch_impl`` is PyTorch's kernel."""
    op, in_place = op_of(overload), overload.endswith("_")

    def kernel(keys: Any, *operands: Tensor, beta: Any = 1, alpha: Any = 1, out: Tensor | None = None) -> Tensor:
        place = operands[0] if in_place else out
        *inputs, mat1, mat2 = operands if op.kind >= MATRICES else as_matrices(op.kind, operands)
        target = as_column(place) if op.kind == MATVEC and place is not None else place
        outcome = outcome_of(op.kind, inputs, mat1, mat2, beta, alpha, target)
        if outcome == RUN:
            count(op.name, "accelerated", mat1)
            result = compute(mat1, mat2, inputs[0] if inputs else None, beta, alpha, target)
            if place is not None or op.kind >= MATRICES:
                return result if place is None else place
            return result.view(result.shape[: op.kind])
        if outcome == UNSUPPORTED:
            strict_mode.note_fallback(mat1, mat2)
            count(op.name, "handed_over", mat1)
        scales = {"beta": beta, "alpha": alpha} if op.has_addend else {}
        return torch_impl.call_boxed(keys, *operands, **scales, **({} if out is None else {"out": out}))

    return kernel


def as_matrices(kind: int, operands: tuple[Tensor, ...]) -> list[Tensor]:
    """Views of the operands of a product with vectors; one of another rank gives no matrix, and torch raises."""
    *inputs, one, other = operands
    if kind == DOT and one.dim() > 0:
        one = one.unsqueeze(0)
    return [*map(as_column, inputs), one, as_column(other)]


def as_column(vector: Tensor) -> Tensor:
    return vector.unsqueeze(1) if vector.dim() > 0 else vector


def outcome_of(
    kind: int, inputs: list[Tensor], mat1: Tensor, mat2: Tensor, beta: Any, alpha: Any, target: Tensor | None
) -> int:
    """RUN, FALLBACK or UNSUPPORTED."""
    if (
        not mat1.dim() == mat2.dim() == max(kind, MATRICES)
        or mat1.shape[-1] != mat2.shape[-2]
        or mat1.shape[:-2] != mat2.shape[:-2]
    ):
        return FALLBACK
    shape = (*mat1.shape[:-1], mat2.shape[-1])
    if target is not None and (target.shape != shape or target.dtype != mat1.dtype or target.device != mat1.device):
        return FALLBACK
    if not accelerated(mat1, mat2) or not are_scales(beta, alpha):
        return UNSUPPORTED
    if not all(can_be_added(x, mat1, mat2) for x in inputs):
        return FALLBACK
    if not has_work(mat1, mat2, beta, alpha, is_vector=kind == MATVEC):
        return FALLBACK
    return RUN if target is None or can_write(target, (*inputs, mat1, mat2)) else UNSUPPORTED


def count(operator: str, outcome: str, operand: Tensor) -> None:
    with _counting:
        calls[operator, outcome][str(operand.dtype).removeprefix("torch.")] += 1
