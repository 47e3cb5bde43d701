"""Whether products are recorded by C++ nodes of torch (``graph_entries.py``), and the test that decides it.

No layout is guessed: functions are called by names that fix their arguments, keys are torch's, and where the hooks of
saved tensors are is seen by comparing. So a torch that is not as expected fails the test, and is not corrupted by it.
"""

from __future__ import annotations

import gc
import platform
import sys
import weakref
from typing import Any

import torch
from torch import Tensor

from . import torch_layout
from .op_table import COMPOSED, OWN
from .state import (
    ADD,
    ADDMM,
    AUTOCAST_KEY,
    DTYPE_CODES,
    GEMMS,
    GRAD_DTYPE,
    HOOKS,
    INTERRUPTED,
    KEY_EXCLUDED,
    LINEAR,
    MATMUL,
    RECORD,
    RECORD_KEYS,
    SCALE,
    TAG_COUNT,
    TAG_RANK,
    TAGS,
)
from .state import words as state

DEVICE, _KEYS = torch_layout.private_backend()
THREE = "Tensor self, Tensor grad_output, Tensor weight, bool[3] output_mask) -> (Tensor, Tensor, Tensor)"
BACKWARD = {
    "matmul_backward": "(Tensor grad, Tensor self, Tensor other, bool[2] mask) -> (Tensor, Tensor)",
    "linear_backward": f"({THREE}",
    "mkldnn_linear_backward": f"({THREE}",
}
RECORDED = tuple(op.name for op in (*OWN, *COMPOSED))
ENTRIES = {
    ("aten", "matmul", DEVICE): "matmul_grad_record_matmul",
    ("aten", "linear", DEVICE): "matmul_grad_record_linear",
    ("aten", "mkldnn_linear", DEVICE): "matmul_grad_record_addmm",
    ("aten", "matmul_backward", "CPU"): "matmul_grad_matmul_backward",
    ("aten", "matmul_backward", "AutogradCPU"): "matmul_grad_matmul_backward_autograd",
    ("aten", "linear_backward", "CPU"): "matmul_grad_linear_backward",
    ("aten", "linear_backward", "AutogradCPU"): "matmul_grad_linear_backward_autograd",
    ("aten", "mkldnn_linear_backward", "CPU"): "matmul_grad_addmm_backward",
    ("aten", "mkldnn_linear_backward", "AutogradCPU"): "matmul_grad_addmm_backward_autograd",
    **{
        ("matmul_grad", f"_{name}_recorded", "AutogradCPU"): f"matmul_grad_{name}_recorded_autograd"
        for name in RECORDED
    },
}
VMAP = ("FuncTorchBatched", "Batched")  # keys for which those of BACKWARD are registered in Python


_reasons: list[str] = []


def reason() -> str:
    """Why Functions in Python record all products; "" where they do not, or nothing was recorded yet."""
    return _reasons[0] if _reasons else ""


def prepare() -> None:
    """Look up what ``ENTRIES`` need before they are registered; ``reason`` tells where this torch lacks it."""
    _reasons.extend(filter(None, [_prepare()]))


def _prepare() -> str:
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "AMD64"):
        return f"a tensor is returned in another way on {sys.platform} {platform.machine()}"  # than in rax, by address
    found = {name: torch_layout.address(cpp) for name, cpp in torch_layout.GRAPH_MANGLED.items()}
    missing = [name for name, address in found.items() if address == 0]
    if missing or _KEYS == 0:
        return f"torch {torch.__version__} has no {', '.join(missing) or DEVICE}"
    for name, schema in BACKWARD.items():
        if str(getattr(torch.ops.aten, name).default._schema) != f"aten::{name}{schema}":
            return f"torch {torch.__version__} has another {name}"
    taken = [(name, key) for name, key in _aten_kernels() if torch._C._dispatch_has_kernel_for_dispatch_key(name, key)]
    if taken:
        return f"{taken[0][0]} has a kernel for {taken[0][1]}"
    state[RECORD_KEYS], state[HOOKS] = _KEYS, found["hooks"]
    state[MATMUL], state[LINEAR], state[ADDMM] = found["matmul"], found["linear"], found["addmm"]
    state[ADD], state[SCALE], state[GRAD_DTYPE] = found["add"], torch_layout.one(), found["grad_dtype"]
    for tag, tensor in enumerate(torch_layout.tags(TAG_COUNT, TAG_RANK)):
        state[TAGS + tag] = tensor
    state[KEY_EXCLUDED], state[AUTOCAST_KEY] = found["key_excluded"], torch_layout.dispatch_key("AutocastCPU")
    return ""


def _aten_kernels() -> list[tuple[str, str]]:
    """What is registered for aten's operators: nothing of torch's or another library's is replaced."""
    kernels = [(f"aten::{name}", key) for namespace, name, key in ENTRIES if namespace == "aten"]
    return kernels + [(f"aten::{name}", key) for name in BACKWARD for key in VMAP]


def loaded_dtype() -> torch.dtype | None:
    """A dtype whose kernels are loaded."""
    for name, code in DTYPE_CODES.items():
        if state[GEMMS + code] > INTERRUPTED:
            return getattr(torch, name)
    return None


def can_be_tried() -> bool:
    """Whether the test of ``enable`` can run now: the kernels of a dtype are loaded, and nothing follows backward."""
    return loaded_dtype() is not None and not torch_layout.is_autograd_compiled()


def enable() -> None:
    """Record by torch's nodes from now on, if a test of it passes."""
    dtype = loaded_dtype()
    if state[MATMUL] == 0 or dtype is None:
        return
    try:
        with torch_layout.without_modes(), torch.enable_grad():
            _try_hooks()
            _try_kept_dtype()
            _try_products(dtype)
            _try_linear(dtype)
            _try_sums(dtype)
            _try_release(dtype)
    except Exception as error:
        _reasons.append(f"torch {torch.__version__} does not pass the test of recorded products: {error}")
    else:
        state[RECORD] = 1


def _mm(a: Tensor, b: Tensor) -> Tensor:
    return torch.ops.matmul_grad._mm_recorded.default(a, b)


def _is_recorded(c: Tensor) -> bool:
    return type(c.grad_fn).__name__ == "MatmulBackward0"


def _operands(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """A, B and dC, of small integers."""
    a = torch.arange(6, dtype=dtype, device="cpu").reshape(2, 3).requires_grad_()
    b = torch.arange(12, dtype=dtype, device="cpu").reshape(3, 4).requires_grad_()
    return a, b, torch.arange(8, dtype=dtype, device="cpu").reshape(2, 4)


def _try_hooks() -> None:
    def has_hooks() -> bool:
        return torch_layout.has_saved_tensor_hooks()

    seen: list[bool] = [has_hooks()]
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        seen.append(has_hooks())
        with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
            seen.append(has_hooks())
    seen.append(has_hooks())
    _same(seen, [False, True, True, False], "hooks are not where they are expected")


def _try_kept_dtype() -> None:
    x = torch.empty(1, dtype=torch.bfloat16, device="cpu", requires_grad=True)
    found = [torch_layout.kept_dtype(x)]
    for dtype in (torch.float32, torch.bfloat16):
        x.grad_dtype = dtype
        found.append(torch_layout.kept_dtype(x))
    codes = [DTYPE_CODES[name] | torch_layout.HAS_DTYPE for name in ("bfloat16", "float32", "bfloat16")]
    _same(found, codes, "the dtypes of gradients are not told as expected")


def _try_products(dtype: torch.dtype) -> None:
    a, b, grad = _operands(dtype)
    c = _mm(a, b)
    _same(_is_recorded(c), True, f"the node is {c.grad_fn}")
    _equal(c, [[20, 23, 26, 29], [56, 68, 80, 92]], "the product")
    dgrad, wgrad = [[14, 38, 62], [38, 126, 214]], [[12, 15, 18, 21], [16, 21, 26, 31], [20, 27, 34, 41]]
    for inputs, expected in (((a,), (dgrad,)), ((b,), (wgrad,)), ((a, b), (dgrad, wgrad))):
        for found, right in zip(torch.autograd.grad(c, inputs, grad, retain_graph=True), expected, strict=True):
            _equal(found, right, "a gradient")
    first, _ = torch.autograd.grad(c, (a, b), grad, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), b)
    _equal(second, [[4, 6, 8, 10]] * 3, "a second derivative")
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        _same(_is_recorded(_mm(a, b)), False, "hooks are passed by")
    with torch.no_grad():
        _same(_mm(a, b).grad_fn, None, "no_grad() records")


def _try_linear(dtype: torch.dtype) -> None:
    """One gradient of a product, and of a layer: each saves what it uses."""
    a, b, grad = _operands(dtype)
    product, layer = torch.ops.matmul_grad._mm_recorded.default, torch.ops.matmul_grad._linear_recorded.default
    weight = b.detach().t().contiguous().requires_grad_()
    expected = [[20, 23, 26, 29], [56, 68, 80, 92]]
    dgrad, wgrad = [[14, 38, 62], [38, 126, 214]], [[12, 15, 18, 21], [16, 21, 26, 31], [20, 27, 34, 41]]
    layer_wgrad = [list(row) for row in zip(*wgrad, strict=True)]
    for function, x, y, wanted, right in (
        (product, a, b.detach(), a, dgrad), (product, a.detach(), b, b, wgrad),
        (layer, a, weight.detach(), a, dgrad), (layer, a.detach(), weight, weight, layer_wgrad),
        (layer, a, weight, weight, layer_wgrad), (layer, a, weight, a, dgrad),
    ):  # fmt: skip
        c = function(x, y)
        _same(type(c.grad_fn).__name__, "LinearBackward0", "the node of one gradient")
        _equal(c, expected, "a product with one gradient")
        (found,) = torch.autograd.grad(c, wanted, grad, create_graph=True)
        _equal(found, right, "the gradient of one operand")
        _same(found.stride(), wanted.stride(), "the order of a gradient")


def _try_sums(dtype: torch.dtype) -> None:
    a, b, grad = _operands(dtype)
    added = torch.arange(4, dtype=dtype, device="cpu").requires_grad_()
    c = torch.ops.matmul_grad._addmm_recorded.default(added, a, b)
    _same(type(c.grad_fn).__name__, "MkldnnLinearBackward0", "the node of addmm")
    _equal(c, [[20, 24, 28, 32], [56, 69, 82, 95]], "the sum")
    found = torch.autograd.grad(c, (added, a, b), grad)
    _equal(found[0], [4, 6, 8, 10], "the gradient of what is added")
    _equal(found[1], [[14, 38, 62], [38, 126, 214]], "a gradient of the sum")
    _equal(found[2], [[12, 15, 18, 21], [16, 21, 26, 31], [20, 27, 34, 41]], "the other gradient of the sum")


def _try_release(dtype: torch.dtype) -> None:
    """No reference to an operand or a result is left after a step."""
    gone = []
    for _ in range(2):
        a, b, grad = (torch.from_numpy(x.detach().double().numpy()).to(dtype) for x in _operands(dtype))
        added = torch.zeros(4, dtype=dtype, device="cpu")
        a.requires_grad_(), b.requires_grad_()
        c, d = _mm(a, b), _mm(a, b.detach())
        e = torch.ops.matmul_grad._addmm_recorded.default(added, a, b)
        results = (c, d, e, *torch.autograd.grad(c, (a, b), grad), *torch.autograd.grad(d + e, a, grad))
        gone += [weakref.ref(x.untyped_storage()) for x in (a, b, added, grad, *results)]
        del a, b, added, c, d, e, grad, results
    gc.collect()
    _same([x() for x in gone], [None] * len(gone), "a step keeps its tensors")


def _equal(actual: Tensor, expected: Any, what: str) -> None:
    _same(actual.tolist(), expected, f"{what} is wrong")


def _same(actual: object, expected: object, what: str) -> None:
    if actual != expected:
        raise AssertionError(f"{what}: {actual} instead of {expected}")
