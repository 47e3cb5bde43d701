"""The public functions, with torch's own argument names."""

from __future__ import annotations

import torch
from torch import Tensor

from . import strictness
from .autograd import raised

_mm = torch.ops.matmul_grad.mm.default
_mm_backward = torch.ops.matmul_grad.mm_backward.default
_scaled_mm = torch.ops.matmul_grad.scaled_mm.default


def mm(input: Tensor, mat2: Tensor) -> Tensor:
    """Matrix product of two matrices, differentiable to any order.

    C = A · B,  dA = dC · Bᵀ,  dB = Aᵀ · dC

    shapes      input (m, k), mat2 (k, n) → (m, n); every size ≥ 0
    strides     any, read as they are; the result is contiguous
    dtypes      float16, bfloat16, float32, float64 on CPU and CUDA; the rest is torch.mm
    aliasing    the result is new memory
    rounding    accumulated in float32 (float64 for float64); 16-bit results are rounded once, at the store
    errors      torch.mm's: RuntimeError for ranks, shapes, dtypes and devices, TypeError for what is no tensor
    determinism on CPU the same bits for any m, n, strides and number of threads
    source      docs/derivation.md; kernels/cpu/gemm.py, kernels/gpu/gemm.py

    >>> import torch, matmul_grad
    >>> a = torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    >>> b = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    >>> c = matmul_grad.mm(a, b)
    >>> c.sum().backward()
    >>> c.tolist(), a.grad.tolist()
    ([[1.0, 4.0], [3.0, 8.0]], [[1.0, 2.0], [1.0, 2.0]])
    """
    try:
        return _mm(input, mat2)
    except RuntimeError as error:
        _raise_as_torch(error, input, mat2)
        raise


def _raise_as_torch(error: RuntimeError, input: Tensor, mat2: Tensor) -> None:
    """Raise what a hook or mode of the user's raised below, else torch.mm's own error; return where it has none."""
    original = getattr(raised, "error", None)
    raised.error = None
    if original is not None and str(error).endswith(str(original)):
        raise original from None
    if strictness.is_on():
        return
    with torch.no_grad():
        try:
            torch.mm(input, mat2)
        except Exception as torchs:
            raise torchs from None


def mm_backward(
    grad: Tensor, input: Tensor, mat2: Tensor, output_mask: tuple[bool, bool] = (True, True)
) -> tuple[Tensor | None, Tensor | None]:
    """Both gradients of ``mm`` from the gradient of its result; differentiable in turn.

    dA = grad · Bᵀ,  dB = Aᵀ · grad

    shapes      grad (m, n), input (m, k), mat2 (k, n) → (m, k), (k, n)
    strides     any (an expanded gradient too); the results are contiguous
    dtypes      as ``mm``
    aliasing    the results are new memory
    rounding    as ``mm``
    errors      as ``mm``
    determinism as ``mm``
    source      docs/derivation.md

    ``output_mask`` leaves out a product: None stands in its place.

    >>> import torch, matmul_grad
    >>> grad, a, b = torch.ones(2, 1), torch.ones(2, 3), torch.full((3, 1), 2.0)
    >>> da, db = matmul_grad.mm_backward(grad, a, b)
    >>> da.tolist(), db.tolist()
    ([[2.0, 2.0, 2.0], [2.0, 2.0, 2.0]], [[2.0], [2.0], [2.0]])
    """
    return _mm_backward(grad, input, mat2, list(output_mask))


def scaled_mm(
    input: Tensor, mat2: Tensor, scale_a: Tensor, scale_b: Tensor, out_dtype: torch.dtype | None = None
) -> Tensor:
    """Product of two matrices of 8-bit floats, times their two scales; without a gradient, as in torch.

    C = scale_a · scale_b · (A · B)

    shapes      input (m, k), mat2 (k, n), each scale one element → (m, n)
    strides     input row-major and mat2 column-major, k and n multiples of 16
    dtypes      float8_e4m3fn, float8_e5m2 with float32 scales; the result out_dtype, by default input's.
                On GPUs from sm_89 on, to float16, bfloat16 and float32; the rest is torch._scaled_mm
    aliasing    the result is new memory
    rounding    sums in float32, once at the store
    errors      torch._scaled_mm's
    determinism the same bits from run to run
    source      kernels/gpu/tma.py

    >>> import torch, matmul_grad
    >>> a, one = torch.ones(16, 32).to(torch.float8_e4m3fn), torch.tensor(1.0)
    >>> c = matmul_grad.scaled_mm(a, a.t(), one, one, torch.bfloat16)
    >>> c.shape, c.dtype, c[0, 0].item()
    (torch.Size([16, 16]), torch.bfloat16, 32.0)
    """
    return _scaled_mm(input, mat2, scale_a, scale_b, out_dtype)
