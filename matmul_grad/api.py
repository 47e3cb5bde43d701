"""The public functions, with torch's argument names."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from . import autocast, fallback, vmap
from .ops import compiled, eager
from .out_variants import run_with_out
from .scalars import real_scales

autocast.register()
vmap.register()

_mm = torch.ops.matmul_grad.mm.default
_bmm = torch.ops.matmul_grad.bmm.default
_addmm = torch.ops.matmul_grad.addmm.default
_baddbmm = torch.ops.matmul_grad.baddbmm.default
_eager_mm, _eager_bmm, _eager_addmm, _eager_baddbmm = map(eager, (_mm, _bmm, _addmm, _baddbmm))
_mm_backward = torch.ops.matmul_grad.mm_backward.default
_scaled_mm = torch.ops.matmul_grad.scaled_mm.default


def mm(input: Tensor, mat2: Tensor, out_dtype: torch.dtype | None = None, *, out: Tensor | None = None) -> Tensor:
    """Matrix product of two matrices, differentiable to any order.

    C = A · B,  dA = dC · Bᵀ,  dB = Aᵀ · dC

    shapes      input (m, k), mat2 (k, n) → (m, n); every size ≥ 0
    strides     any, read as they are; the result is contiguous
    dtypes      float16, bfloat16, float32, float64 on CPU and CUDA; the rest is torch.mm
    aliasing    the result is new memory, or ``out``, which may overlap an operand; one that repeats elements is torch's
    rounding    accumulated in float32 (float64 for float64); 16-bit results are rounded once, at the store
    errors      torch.mm's: RuntimeError for ranks, shapes, dtypes and devices, TypeError for what is no tensor
    determinism on CPU the same bits for any m, n, strides and number of threads
    source      docs/derivation.md; kernels/cpu/gemm.py, kernels/gpu/gemm.py

    Under autocast it casts as torch.mm does. With ``out_dtype`` = torch.float32 the sums of 16-bit operands are not
    rounded to 16 bits: on a CPU, and with a gradient; on CUDA it is torch.mm's, which has no gradient.

    >>> import torch, matmul_grad
    >>> a = torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    >>> b = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    >>> c = matmul_grad.mm(a, b)
    >>> c.sum().backward()
    >>> c.tolist(), a.grad.tolist()
    ([[1.0, 4.0], [3.0, 8.0]], [[1.0, 2.0], [1.0, 2.0]])
    """
    if out is not None or out_dtype is not None:
        return run_with_out("mm", (input, mat2), {}, out_dtype, out)
    if not is_dynamo_compiling():
        result = compiled.mm(input, mat2)
        if result is not None:
            return result
    if fallback.is_needed(input, mat2):
        return torch.mm(input, mat2)
    return _mm(input, mat2) if is_dynamo_compiling() else _eager_mm(input, mat2)


def bmm(input: Tensor, mat2: Tensor, out_dtype: torch.dtype | None = None, *, out: Tensor | None = None) -> Tensor:
    """Products of two batches of matrices, differentiable to any order.

    C[i] = A[i] · B[i]

    shapes      input (b, m, k), mat2 (b, k, n) → (b, m, n); every size ≥ 0
    strides     as ``mm``
    dtypes      as ``mm``; the rest is torch.bmm
    aliasing    as ``mm``
    rounding    as ``mm``
    errors      torch.bmm's
    determinism as ``mm``: an item has the bits that ``mm`` gives it alone
    source      as ``mm``

    >>> import torch, matmul_grad
    >>> a = torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]]])
    >>> matmul_grad.bmm(a, a.mT).flatten().tolist()
    [5.0, 25.0]
    """
    if out is not None or out_dtype is not None:
        return run_with_out("bmm", (input, mat2), {}, out_dtype, out)
    if not is_dynamo_compiling():
        result = compiled.bmm(input, mat2)
        if result is not None:
            return result
    if fallback.is_needed(input, mat2):
        return torch.bmm(input, mat2)
    return _bmm(input, mat2) if is_dynamo_compiling() else _eager_bmm(input, mat2)


def addmm(
    input: Tensor,
    mat1: Tensor,
    mat2: Tensor,
    out_dtype: torch.dtype | None = None,
    *,
    beta: float = 1,
    alpha: float = 1,
    out: Tensor | None = None,
) -> Tensor:
    """Matrix product to which something is added, differentiable to any order.

    C = beta · input + alpha · (A · B),  dinput = beta · dC,  dA = alpha · dC · Bᵀ,  dB = alpha · Aᵀ · dC

    shapes      input any that expands to (m, n), mat1 (m, k), mat2 (k, n) → (m, n); every size ≥ 0
    strides     as ``mm``
    dtypes      as ``mm``, one for all three; the rest is torch.addmm, and so are scales that are not real numbers
    aliasing    as ``mm``; ``out`` may be ``input``
    rounding    accumulated as ``mm``, and rounded once, after the addition
    errors      torch.addmm's
    determinism as ``mm``
    source      kernels/cpu/epilogue.py

    With ``beta`` = 0 the input is not read, so that NaN in it is not passed on.

    >>> import torch, matmul_grad
    >>> a, b, bias = torch.ones(2, 3), torch.ones(3, 2), torch.tensor([10.0, 20.0], requires_grad=True)
    >>> c = matmul_grad.addmm(bias, a, b, alpha=2)
    >>> c.sum().backward()
    >>> c.tolist(), bias.grad.tolist()
    ([[16.0, 26.0], [16.0, 26.0]], [2.0, 2.0])
    """
    if out is None and out_dtype is None and not is_dynamo_compiling():
        result = compiled.addmm(input, mat1, mat2, beta, alpha)
        if result is not None:
            return result
    if out is None and out_dtype is None and not fallback.is_needed(mat1, mat2, input):
        scales = real_scales(mat1, beta, alpha)
        if scales is not None:
            operator = _addmm if is_dynamo_compiling() else _eager_addmm
            return operator(input, mat1, mat2, beta=scales[0], alpha=scales[1])
    return run_with_out("addmm", (input, mat1, mat2), {"beta": beta, "alpha": alpha}, out_dtype, out)


def baddbmm(
    input: Tensor,
    batch1: Tensor,
    batch2: Tensor,
    out_dtype: torch.dtype | None = None,
    *,
    beta: float = 1,
    alpha: float = 1,
    out: Tensor | None = None,
) -> Tensor:
    """Products of two batches of matrices, to which something is added; differentiable to any order.

    C[i] = beta · input[i] + alpha · (A[i] · B[i])

    shapes      input any that expands to (b, m, n), batch1 (b, m, k), batch2 (b, k, n) → (b, m, n); every size ≥ 0
    strides     as ``mm``
    dtypes      as ``addmm``; the rest is torch.baddbmm
    aliasing    as ``addmm``
    rounding    as ``addmm``
    errors      torch.baddbmm's
    determinism as ``mm``
    source      as ``addmm``

    >>> import torch, matmul_grad
    >>> a = torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]]])
    >>> matmul_grad.baddbmm(torch.ones(1), a, a.mT, beta=3).flatten().tolist()
    [8.0, 28.0]
    """
    if out is None and out_dtype is None and not is_dynamo_compiling():
        result = compiled.baddbmm(input, batch1, batch2, beta, alpha)
        if result is not None:
            return result
    if out is None and out_dtype is None and not fallback.is_needed_to_compose(batch1, batch2, input):
        scales = real_scales(batch1, beta, alpha)
        if scales is not None:
            operator = _baddbmm if is_dynamo_compiling() else _eager_baddbmm
            return operator(input, batch1, batch2, beta=scales[0], alpha=scales[1])
    return run_with_out("baddbmm", (input, batch1, batch2), {"beta": beta, "alpha": alpha}, out_dtype, out)


def mm_backward(
    grad: Tensor, input: Tensor, mat2: Tensor, output_mask: tuple[bool, bool] = (True, True)
) -> tuple[Tensor | None, Tensor | None]:
    """Both gradients of ``mm``, or of ``bmm``, from the gradient of its result; differentiable to any order.

    dA = grad · Bᵀ,  dB = Aᵀ · grad

    shapes      grad (m, n), input (m, k), mat2 (k, n) → (m, k), (k, n), or a batch of each
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
    if fallback.is_needed(input, mat2, grad):
        dgrad = torch.matmul(grad, torch.transpose(mat2, -2, -1)) if output_mask[0] else None
        return dgrad, torch.matmul(torch.transpose(input, -2, -1), grad) if output_mask[1] else None
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
    if fallback.is_needed(input, mat2) or fallback.is_needed(scale_a, scale_b):
        return torch._scaled_mm(input, mat2, scale_a, scale_b, out_dtype=out_dtype)
    return _scaled_mm(input, mat2, scale_a, scale_b, out_dtype)
