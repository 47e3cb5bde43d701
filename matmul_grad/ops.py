"""The operators ``torch.ops.matmul_grad.*``: schemas, kernels, shapes for tracing, vmap rule, FLOP counts.

    key                          kernel                                        from
    AutogradCPU                  compiled, of every product and mm_backward    the first CPU call on that needs them
    CPU                          compiled, of every product and mm_backward    the first CPU call on that needs them
    AutocastCPU, AutocastCUDA    Python, in autocast.py: operands are cast     import
    Autograd                     Python, in autograd.py: every other device    import
    CompositeExplicitAutograd    Python, here: every other device              import
    NestedTensorCPU, ...CUDA     Python, here: PyTorch's                       import
    CompositeImplicitAutograd    mm_backward in Python: two products           import
    FuncTorchBatched             Python, in vmap.py: the rules of vmap         import

The compiled kernels are more specific than those in Python, so nothing is overridden. Where torch's C ABI is not
available, the Python kernels call the same drivers.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable
from math import inf
from typing import Any

import torch
from torch import Tensor

from . import sharding, strict_mode
from .flops import count_flops
from .kernels.cpu.once import Once as Once
from .kernels.native import graph as graph
from .kernels.native import pending
from .kernels.native.op_table import COMPOSED, OWN
from .kernels.native.python_functions import functions as compiled  # noqa: F401  # for api.py, functional.py
from .kernels.native.state import TAG_OF_B as TAG_OF_B
from .kernels.native.state import TAG_OF_BATCHES as TAG_OF_BATCHES
from .kernels.native.state import TAG_OF_VECTOR as TAG_OF_VECTOR
from .kernels.native.state import TAG_RANK as TAG_RANK
from .kernels.native.storage import require as require_storage
from .kernels.native.torch_layout import const_data_ptr as const_data_ptr
from .kernels.native.torch_layout import eager as eager

NAMESPACE = "matmul_grad"
library = torch.library.Library(NAMESPACE, "DEF")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)
BACKWARD = "(Tensor grad, Tensor self, Tensor mat2, bool[2] output_mask) -> (Tensor?, Tensor?)"
SCHEMAS = {op.name: op.schema for op in OWN if op.schema is not None}
COMPOSED_SCHEMAS = {op.name: op.schema for op in COMPOSED if op.schema is not None}
BACKWARD_IN_PYTHON = {
    "mm": BACKWARD,
    "matmul": "(Tensor grad, Tensor self, Tensor other, bool[2] mask) -> (Tensor?, Tensor?)",
    "linear": "(Tensor self, Tensor grad, Tensor weight, bool[3] mask) -> (Tensor?, Tensor?, Tensor?)",
    "addmm": "(Tensor self, Tensor grad, Tensor weight, bool[3] mask) -> (Tensor?, Tensor?, Tensor?)",
}
# Keys that modes and transforms put in front of an operator without tensors; none of them is to see ``_raise``.
ABOVE_ALL = ("Python", "FuncTorchDynamicLayerFrontMode", "FuncTorchDynamicLayerBackMode", "Functionalize")
NESTED = ("NestedTensorCPU", "NestedTensorCUDA")
_LARGEST = {dtype: torch.finfo(dtype).max for dtype in DTYPES}


def native_status() -> str:
    """Register the compiled CPU kernels if that was not tried yet; "" when they are, else why they are not."""
    return _native.result()


def _register_native() -> str:
    from .kernels.cpu import build

    try:
        from .kernels.native import register
    except Exception as error:
        build.notify(f"CPU products run through Python, their compiled entries cannot be imported: {error}")
        return str(error) or type(error).__name__
    try:
        register.register()
    except register.Unavailable as reason:
        return str(reason)
    except Exception as error:
        build.notify(f"CPU products run through Python, their compiled entries cannot be loaded: {error!r}")
        return str(error) or type(error).__name__
    return ""


_native = Once(_register_native)


def gradients_status() -> str:
    """``native_status``, and the same of those of backward: a process without gradients does not compile them."""
    return native_status() or _native_gradients.result()


def outs_status() -> str:
    """Likewise of those that write to ``out``."""
    return native_status() or _native_outs.result()


def _register_more(name: str, consequence: str) -> str:
    from .kernels.cpu import build
    from .kernels.native import register

    try:
        getattr(register, name)()
    except Exception as error:
        build.notify(f"{consequence}, their compiled entries cannot be loaded: {error!r}")
        return str(error) or type(error).__name__
    return ""


_native_gradients = Once(functools.partial(_register_more, "register_gradients", "CPU gradients run through Python"))
_native_outs = Once(functools.partial(_register_more, "register_outs", "products with out= run through Python"))


def rank_of(name: str) -> int:
    """Of the operands of an operator."""
    return 3 if "bmm" in name else 2


def product(self: Tensor, mat2: Tensor) -> Tensor:
    """The differentiable operator for two matrices, or two batches of them."""
    if self.dim() == 3:
        return torch.ops.matmul_grad.bmm.default(self, mat2)
    return torch.ops.matmul_grad.mm.default(self, mat2)


def addition(input: Tensor, self: Tensor, mat2: Tensor, beta: float, alpha: float) -> Tensor:
    """The differentiable operator for beta · input + alpha · (A · B), of matrices or batches."""
    operator = torch.ops.matmul_grad.baddbmm if self.dim() == 3 else torch.ops.matmul_grad.addmm
    return operator.default(input, self, mat2, beta=beta, alpha=alpha)


def accelerated(self: Tensor, mat2: Tensor) -> bool:
    """Whether these kernels support the product: dense matrices or batches that fit, of a dtype with a kernel."""
    return (
        self.device == mat2.device
        and self.dtype == mat2.dtype
        and self.layout == mat2.layout == torch.strided
        and self.dim() == mat2.dim() in (2, 3)
        and self.shape[:-2] == mat2.shape[:-2]
        and self.shape[-1] == mat2.shape[-2]
        and _has_kernel(self)
    )


def can_be_added(input: Tensor, self: Tensor, mat2: Tensor) -> bool:
    """Whether these kernels can add ``input`` to a supported product: it expands to the result."""
    shape = (*self.shape[:-1], mat2.shape[-1])
    return (
        input.device == self.device
        and input.dtype == self.dtype
        and input.layout == torch.strided
        and input.dim() <= len(shape)
        and all(size in (1, whole) for size, whole in zip(reversed(input.shape), reversed(shape), strict=False))
    )


def are_too_large(dtype: torch.dtype, beta: float, alpha: float, is_vector: bool = False) -> bool:
    """Whether torch refuses one of them: what float32 cannot hold, or for a vector the dtype; infinity it takes."""
    largest = _LARGEST[dtype if is_vector or dtype == torch.float64 else torch.float32]
    return largest < abs(beta) < inf or largest < abs(alpha) < inf


def has_work(self: Tensor, mat2: Tensor, beta: float = 1, alpha: float = 1, is_vector: bool = False) -> bool:
    """Whether there is anything to multiply, and the scales are numbers that torch takes; else its kernel is called."""
    sizes = self.numel() and mat2.numel() and alpha
    return bool(sizes) and not are_too_large(self.dtype, beta, alpha, is_vector)


def are_scales(*scales: Any) -> bool:
    """Whether float64, the type of the operators' scales, holds these numbers exactly."""
    for x in scales:  # noqa: SIM110  # a generator costs a tenth of a call on 8 × 8
        if type(x) is not float and (type(x) is not int or abs(x) > 2**53):
            return False
    return True


def _has_kernel(tensor: Tensor) -> bool:
    if tensor.is_cuda:
        from .kernels.gpu import launch

        return launch.supports(tensor)
    if tensor.device.type != "cpu" or tensor.dtype not in DTYPES:
        return False
    try:
        from .kernels.native import direct
    except Exception:  # no LLVM: `native_status` has the reason
        return False
    return direct.supports(tensor.dtype)


def make_kernel(name: str) -> Callable[..., Tensor]:
    """An operator's kernel for every device without a compiled one."""
    rank, torch_impl = rank_of(name), torch_impl_of(name)

    def multiply(self: Tensor, mat2: Tensor) -> Tensor:
        if self.dim() != rank or not accelerated(self, mat2):
            strict_mode.note_fallback(self, mat2)
        elif self.is_cuda or has_work(self, mat2):
            return compute(self, mat2)
        return torch_impl(self, mat2)

    def multiply_and_add(self: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
        if mat1.dim() != rank or not accelerated(mat1, mat2) or not can_be_added(self, mat1, mat2):
            strict_mode.note_fallback(mat1, mat2)
        elif has_work(mat1, mat2, beta, alpha):
            return compute(mat1, mat2, self, beta, alpha)
        return torch_impl(self, mat1, mat2, beta=beta, alpha=alpha)

    return multiply_and_add if "add" in name else multiply


def torch_impl_of(name: str) -> Callable[..., Tensor]:
    """aten's operator of the same name; for integers it needs integer scales too."""
    operator = getattr(torch.ops.aten, name).default

    def torch_impl(self: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
        if not (mat1.is_floating_point() or mat1.is_complex()):
            beta, alpha = (int(x) if float(x).is_integer() else x for x in (beta, alpha))
        return operator(self, mat1, mat2, beta=beta, alpha=alpha)

    return torch_impl if "add" in name else operator


def compute(
    self: Tensor,
    mat2: Tensor,
    input: Tensor | None = None,
    beta: float = 1,
    alpha: float = 1,
    out: Tensor | None = None,
) -> Tensor:
    """A supported product by these kernels, into new memory or into ``out``."""
    require_storage(self, mat2, *(x for x in (input, out) if x is not None))
    if self.is_cuda:
        from .kernels.gpu import launch

        try:
            if input is None:
                return launch.mm(self, mat2, out=out)
            return launch.addmm(self, mat2, launch.Epilogue(alpha, beta, input), out)
        except launch.CannotBuild:  # from now on `launch.supports` is False
            strict_mode.note_fallback(self, mat2)
            return _by_torch(self, mat2, input, beta, alpha, out)
    from .kernels.native import direct

    return direct.product(self, mat2, direct.Epilogue(alpha, beta, input), out)


def accumulate(self: Tensor, mat2: Tensor, out: Tensor) -> Tensor:
    """out += A · B of a supported product, in float32 of 16-bit operands."""
    if self.is_cuda:
        return compute(self, mat2, out, 1.0, 1.0, out)
    from .kernels.native import direct

    require_storage(self, mat2, out)
    return direct.accumulate(self, mat2, out)


def _by_torch(
    self: Tensor, mat2: Tensor, input: Tensor | None, beta: float, alpha: float, out: Tensor | None
) -> Tensor:
    batched = self.dim() == 3
    named: dict[str, Any] = {} if out is None else {"out": out}
    if out is not None and out.dtype != self.dtype:
        named["out_dtype"] = out.dtype
    if input is None:
        return (torch.bmm if batched else torch.mm)(self, mat2, **named)
    return (torch.baddbmm if batched else torch.addmm)(input, self, mat2, beta=beta, alpha=alpha, **named)


def both_gradients(grad: Tensor, self: Tensor, mat2: Tensor) -> tuple[Tensor | None, Tensor | None] | None:
    """Both gradients from one launch on a GPU, or None where two products are needed: see ``autograd.py``."""
    if not (grad.is_cuda and accelerated(self, mat2) and accelerated(grad, mat2.mT)):
        return None
    from .kernels.gpu import launch

    require_storage(grad, self, mat2)
    try:
        return launch.mm_backward(grad, self, mat2)
    except launch.CannotBuild:
        return None


def make_nested_kernel(name: str) -> Callable[..., Tensor]:
    """PyTorch's product of nested tensors, which have no sizes to look at."""
    torch_impl = torch_impl_of(name)

    def nested_kernel(*operands: Tensor, **scales: float) -> Tensor:
        strict_mode.note_fallback(*operands[-2:])
        return torch_impl(*operands, **scales)

    return nested_kernel


def _scaled_mm(
    self: Tensor, mat2: Tensor, scale_a: Tensor, scale_b: Tensor, out_dtype: torch.dtype | None = None
) -> Tensor:
    """Every device: these kernels on a GPU that has 8-bit matrix units, else PyTorch's."""
    result = self.dtype if out_dtype is None else out_dtype
    if self.is_cuda:
        from .kernels.gpu import launch

        if launch.supports_scaled(self, mat2, scale_a, scale_b, result):
            require_storage(self, mat2, scale_a, scale_b)
            with contextlib.suppress(launch.CannotBuild):
                return launch.scaled_mm(self, mat2, scale_a, scale_b, result)
    strict_mode.note_fallback(self, mat2)
    return scaled_mm_by_torch(self, mat2, scale_a, scale_b, out_dtype)


def scaled_mm_by_torch(
    self: Tensor, mat2: Tensor, scale_a: Tensor, scale_b: Tensor, out_dtype: torch.dtype | None = None
) -> Tensor:
    return torch._scaled_mm(self, mat2, scale_a, scale_b, out_dtype=out_dtype)


def by_compiled_code(name: str, schema: str, kernel: Callable[..., Any], key: str) -> None:
    """Define an operator in Python that a compiled kernel calls, as where there is a graph to record."""
    library.define(f"{name}{schema[: schema.index(' ->')]} -> Tensor?", tags=TAGS)
    library.impl(name, pending.kept(kernel), key)


def backward_by_compiled_code(name: str, kernel: Callable[..., tuple[Tensor | None, ...]]) -> None:
    """``by_compiled_code`` for one of BACKWARD_IN_PYTHON: one more result is None where it raised."""
    schema = BACKWARD_IN_PYTHON[name]
    count = schema[schema.index("->") :].count("Tensor?")

    def backward_and_mark(first: Tensor, *others: Any) -> tuple[Tensor | None, ...]:
        return (*kernel(first, *others), first)

    library.define(f"_{name}_backward_in_python{schema[:-1]}, Tensor?)", tags=TAGS)
    kept = pending.kept(backward_and_mark, (None,) * (count + 1))
    library.impl(f"_{name}_backward_in_python", kept, "CompositeImplicitAutograd")


def _register() -> None:
    library.define("_raise() -> ()")
    for key in ("CompositeImplicitAutograd", *ABOVE_ALL):
        library.impl("_raise", pending.raise_it, key)
    for name, schema in SCHEMAS.items():
        adds = "add" in name
        library.define(f"{name}{schema}", tags=TAGS)
        library.impl(name, make_kernel(name), "CompositeExplicitAutograd")
        for key in NESTED:
            library.impl(name, make_nested_kernel(name), key)
        by_compiled_code(f"_{name}_by_torch", schema, torch_impl_of(name), "CompositeExplicitAutograd")
        # Shape and errors of a traced product are PyTorch's.
        torch.library.register_fake(f"{NAMESPACE}::{name}", torch_impl_of(name), lib=library)
        count_flops(getattr(torch.ops.matmul_grad, name), _flops_of_addmm if adds else _flops)
    for name, schema in COMPOSED_SCHEMAS.items():
        library.define(f"{name}{schema}", tags=TAGS)
    library.define(f"mm_backward{BACKWARD}", tags=TAGS)
    library.define(
        "scaled_mm(Tensor self, Tensor mat2, Tensor scale_a, Tensor scale_b, ScalarType? out_dtype=None) -> Tensor",
        tags=TAGS,
    )
    library.impl("scaled_mm", _scaled_mm, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::scaled_mm", scaled_mm_by_torch, lib=library)
    count_flops(torch.ops.matmul_grad.scaled_mm, _flops)


def _flops(self: Any, mat2: Any, *_: Any) -> int:
    return 2 * math.prod(self) * mat2[-1]


def _flops_of_addmm(_: Any, mat1: Any, mat2: Any) -> int:
    return _flops(mat1, mat2)


_register()
sharding.register()
