"""The switch for torch's grouped product: a kernel in Python under ``aten::_grouped_mm`` for the CPU.

torch has one kernel of it for all devices, so nothing is replaced: a kernel of the CPU alone is preferred while it is
there. Forward and torch's own backward reach it, with gradients of any strides. Other calls go to torch's kernel, wrong
ones among them, and offs that descend, for which torch has no error.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import strict_mode
from .aten_override_cuda import count, new_registrations
from .grouped import forward, is_computed
from .grouped_shapes import are_groups, is_grouped_product

NAME = "_grouped_mm"


class GroupedOverride:
    """The kernel, while it is on, or suspended: then it calls torch's."""

    def __init__(self) -> None:
        self._library: Any = None
        self._torch_impl: Any = None
        self._is_on = False

    def install(self) -> None:
        """Nothing where this torch has no such operator, or not as it is known."""
        if self._library is None and hasattr(torch.ops.aten, NAME):
            library = new_registrations()
            try:
                self._torch_impl = torch.library.get_kernel(f"aten::{NAME}", "CPU")
                library.impl(NAME, "CPU", self._kernel, True)
            except BaseException:
                library.reset()
                raise
            self._library = library
        self._is_on = True

    def uninstall(self, for_good: bool) -> None:
        """Remove it, or leave it there to call torch's."""
        self._is_on = False
        if for_good:
            self._library = None

    def _kernel(
        self,
        keys: Any,
        mat_a: Tensor,
        mat_b: Tensor,
        offs: Tensor | None = None,
        bias: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        if self._is_on and is_grouped_product(mat_a, mat_b, offs, bias, out_dtype):
            if is_computed(mat_a) and are_groups(mat_a, mat_b, offs):
                count("grouped_mm", "accelerated", mat_a)
                return forward(mat_a, mat_b, offs)
            strict_mode.note_fallback(mat_a, mat_b)
            count("grouped_mm", "handed_over", mat_a)
        result: Tensor = self._torch_impl.call_boxed(keys, mat_a, mat_b, offs, bias, out_dtype)
        return result
