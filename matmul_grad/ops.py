"""The operators ``torch.ops.matmul_grad.*``: schemas, kernels, shapes for tracing, vmap rule, FLOP counts.

    key                          kernel                                        from
    AutogradCPU                  mm_autograd, compiled; mm_backward's too      the first CPU call on
    CPU                          mm and mm_backward, compiled                  the first CPU call on
    Autograd                     Python, in autograd.py: every other device    import
    CompositeExplicitAutograd    Python, here: every other device              import
    CompositeImplicitAutograd    mm_backward in Python: two products           import

The compiled kernels are more specific than those in Python, so nothing is overridden. Where torch's C ABI is not
to be had the Python kernels stay and call the same drivers.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor

from . import sharding, strictness
from .flops import count_flops
from .kernels.cpu.state import raised as raised

NAMESPACE = "matmul_grad"
library = torch.library.Library(NAMESPACE, "DEF")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

_lock = threading.Lock()
_native: str | None = None  # None: not tried; "": registered; else why not


def native_status() -> str:
    """Register the compiled CPU kernels if that was not tried yet; "" when they are, else why they are not."""
    global _native
    if _native is None:
        with _lock:
            if _native is None:
                from .kernels.cpu import native

                try:
                    native.register()
                    _native = ""
                except native.Unavailable as reason:
                    _native = str(reason)
    return _native


def product(self: Tensor, mat2: Tensor) -> Tensor:
    """The differentiable operator."""
    return torch.ops.matmul_grad.mm.default(self, mat2)


def accelerated(self: Tensor, mat2: Tensor) -> bool:
    """Whether these kernels take the product: dense matrices that fit, of one dtype with a kernel, on one device."""
    return (
        self.device == mat2.device
        and self.dtype == mat2.dtype
        and self.layout == mat2.layout == torch.strided
        and self.dim() == mat2.dim() == 2
        and self.shape[1] == mat2.shape[0]
        and _has_kernel(self)
    )


def _has_kernel(tensor: Tensor) -> bool:
    if tensor.is_cuda:
        from .kernels.gpu import launch

        return launch.supports(tensor)
    if tensor.device.type != "cpu" or tensor.dtype not in DTYPES:
        return False
    from .kernels.cpu import native

    return native.supports(tensor.dtype)


def _mm_python(self: Tensor, mat2: Tensor) -> Tensor:
    """Every backend without a compiled kernel of its own."""
    if not accelerated(self, mat2):
        strictness.hand_over(self, mat2)
        return torch.ops.aten.mm.default(self, mat2)
    if self.is_cuda:
        from .kernels.gpu import launch

        return launch.mm(self, mat2)
    from .kernels.cpu import native

    return native.mm(self, mat2)


def both_gradients(grad: Tensor, self: Tensor, mat2: Tensor) -> tuple[Tensor | None, Tensor | None] | None:
    """Both gradients from one launch on a GPU, or None where nothing but two products will do: see ``autograd.py``."""
    if not (grad.is_cuda and accelerated(self, mat2) and accelerated(grad, mat2.t())):
        return None
    from .kernels.gpu import launch

    return launch.mm_backward(grad, self, mat2)


def _scaled_mm(
    self: Tensor, mat2: Tensor, scale_a: Tensor, scale_b: Tensor, out_dtype: torch.dtype | None = None
) -> Tensor:
    """Every device: these kernels on a GPU that has 8-bit matrix units, else torch's own."""
    result = self.dtype if out_dtype is None else out_dtype
    if self.is_cuda:
        from .kernels.gpu import launch

        if launch.takes_scaled(self, mat2, scale_a, scale_b, result):
            return launch.scaled_mm(self, mat2, scale_a, scale_b, result)
    strictness.hand_over(self, mat2)
    return torch._scaled_mm(self, mat2, scale_a, scale_b, out_dtype=out_dtype)


def _scaled_mm_fake(
    self: Tensor, mat2: Tensor, scale_a: Tensor, scale_b: Tensor, out_dtype: torch.dtype | None = None
) -> Tensor:
    return torch._scaled_mm(self, mat2, scale_a, scale_b, out_dtype=out_dtype)


def _mm_fake(self: Tensor, mat2: Tensor) -> Tensor:
    """Shape and errors are torch's own."""
    return torch.ops.aten.mm.default(self, mat2)


def _mm_vmap(info: Any, in_dims: tuple[int | None, int | None], self: Tensor, mat2: Tensor) -> tuple[Tensor, int]:
    """One product where one operand is batched (its batch joins m or n); a product an item where both are."""
    self_dim, mat2_dim = in_dims
    if mat2_dim is None and self_dim is not None:
        items = self.movedim(self_dim, 0)
        return product(items.reshape(-1, items.shape[2]), mat2).unflatten(0, items.shape[:2]), 0
    if self_dim is None and mat2_dim is not None:
        columns = mat2.movedim(mat2_dim, 1)
        wide = product(self, columns.reshape(columns.shape[0], -1))
        return wide.unflatten(1, columns.shape[1:]), 1
    pairs = zip(self.unbind(self_dim or 0), mat2.unbind(mat2_dim or 0), strict=True)
    return torch.stack([product(x, y) for x, y in pairs]), 0


def _register() -> None:
    tags = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)
    library.define("mm(Tensor self, Tensor mat2) -> Tensor", tags=tags)
    library.define("_mm_in_python(Tensor self, Tensor mat2) -> Tensor", tags=tags)
    for name in ("mm_backward", "_mm_backward_in_python"):
        backward = "(Tensor grad, Tensor self, Tensor mat2, bool[2] output_mask) -> (Tensor?, Tensor?)"
        library.define(f"{name}{backward}", tags=tags)
    library.impl("mm", _mm_python, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::mm", _mm_fake, lib=library)
    torch.library.register_vmap(f"{NAMESPACE}::mm", _mm_vmap, lib=library)
    library.define(
        "scaled_mm(Tensor self, Tensor mat2, Tensor scale_a, Tensor scale_b, ScalarType? out_dtype=None) -> Tensor",
        tags=tags,
    )
    library.impl("scaled_mm", _scaled_mm, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::scaled_mm", _scaled_mm_fake, lib=library)
    count_flops(torch.ops.matmul_grad.scaled_mm, lambda self, mat2, *scales: 2 * self[0] * self[1] * mat2[1])
    count_flops(torch.ops.matmul_grad.mm, lambda self, mat2: 2 * self[0] * self[1] * mat2[1])


_register()
sharding.register()
