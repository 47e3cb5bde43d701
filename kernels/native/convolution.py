"""Convolutions on CPU: the driver of the GEMM, with an operand that is patches of an image (patches_args.py).

Sums run over (channel, tap), for the gradient of a filter over (sample, pixel), in this order: so an element of C
depends on its window and its filter, and one of dX on the gradients that reach it: not on the batch, the size of the
image, the layout or the number of threads. Nothing is allocated but the result. convolution_plan.py has the products.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ..cpu import driver
from ..cpu import gemm_args as g
from ..cpu.config import BlockConfig
from . import direct
from .convolution_operands import Sizes
from .convolution_plan import Arguments, Layout, Plan, forward_plan, input_gradient_plan, weight_gradient_plan
from .torch_layout import const_data_ptr, has_thread_pool

MOST_PIXELS = 1 << 27  # of a batch: an index of them and a step of k share the 64 bits of an address, see FREE_STRIDE


def supports(input: Tensor, weight: Tensor) -> bool:
    """Whether these kernels compute convolutions of two dense tensors with 1 to 3 spatial dimensions.

    Batches of more than MOST_PIXELS are torch's, and dtypes without kernels.
    """
    if not input.is_cpu or not weight.is_cpu or input.dtype is not weight.dtype:
        return False
    if input.layout is not torch.strided or weight.layout is not torch.strided or not 3 <= input.dim() <= 5:
        return False
    if input.numel() > MOST_PIXELS * input.shape[1] or weight.numel() > MOST_PIXELS * weight.shape[1]:
        return False
    return input.dtype in _loaded or _is_loaded(input.dtype)


_loaded: set[torch.dtype] = set()


def _is_loaded(dtype: torch.dtype) -> bool:
    if not direct.supports(dtype):
        return False
    _loaded.add(dtype)
    return True


def forward(
    input: Tensor, weight: Tensor, bias: Tensor | None, stride: Sizes, padding: Sizes, dilation: Sizes, groups: int
) -> Tensor:
    """The convolution of a batch, in the memory format of ``input``; no size is 0.

    input (n, ci, …), weight (co, ci / groups, …), bias (co) or None; stride, padding and dilation of each dimension.
    """
    arguments = Arguments(tuple(stride), tuple(padding), tuple(dilation), groups, input.element_size())
    plan = forward_plan(_layout(input), _layout(weight), None if bias is None else bias.stride(0), arguments)
    return _run(plan, weight, input, _result(input, plan), bias)


def input_gradient(
    grad: Tensor,
    weight: Tensor,
    input_size: Sizes,
    stride: Sizes,
    padding: Sizes,
    dilation: Sizes,
    groups: int,
    bias: Tensor | None = None,
) -> Tensor:
    """The gradient of a convolution's input, or with a bias (ci) a transposed convolution; no size is 0."""
    arguments = Arguments(tuple(stride), tuple(padding), tuple(dilation), groups, grad.element_size())
    added = None if bias is None else bias.stride(0)
    plan = input_gradient_plan(_layout(grad), _layout(weight), tuple(input_size), added, arguments)
    out = _result(grad, plan)
    for part in plan.unreached:
        _fill(out[part], bias)
    return _run(plan, grad, weight, out, bias) if plan.swapped else _run(plan, weight, grad, out, bias)


def weight_gradient(
    grad: Tensor,
    input: Tensor,
    weight_size: Sizes,
    stride: Sizes,
    padding: Sizes,
    dilation: Sizes,
    groups: int,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """The gradient of a convolution's filter, in the dtype of the operands, or in float32; no size is 0."""
    is_wide = out_dtype is not None and out_dtype != grad.dtype
    arguments = Arguments(tuple(stride), tuple(padding), tuple(dilation), groups, grad.element_size())
    plan = weight_gradient_plan(_layout(grad), _layout(input), tuple(weight_size), is_wide, arguments)
    return _run(plan, grad, input, _result(grad, plan, out_dtype), None)


def _layout(tensor: Tensor) -> Layout:
    return Layout(tensor.shape, tensor.stride())


def _result(like: Tensor, plan: Plan, dtype: torch.dtype | None = None) -> Tensor:
    return like.new_empty_strided(*plan.result, dtype=dtype)


def _fill(part: Tensor, bias: Tensor | None) -> None:
    """Pixels that no tap reaches."""
    part.copy_(torch.zeros((), dtype=part.dtype) if bias is None else bias.view(-1, *[1] * (part.dim() - 2)))


def _run(plan: Plan, a: Tensor, b: Tensor, out: Tensor, bias: Tensor | None) -> Tensor:
    """A copy-on-write storage is copied only where it is written."""
    a_address, b_address, c_address = const_data_ptr(a), const_data_ptr(b), out.data_ptr()
    compute, threads = _driver(a.dtype), torch.get_num_threads() if has_thread_pool() else 1
    for call in plan.calls:
        words = call.words[:]
        words[call.a] += a_address
        words[call.b] += b_address
        words[g.C] += c_address
        if bias is not None:
            words[g.SOURCE] = const_data_ptr(bias)
        start = words.buffer_info()[0]
        for word, description in call.pointers:
            words[word] = start + description
        for item in range(call.times):
            if item:
                for word, step in call.steps:
                    words[word] += step
            if compute(start, 1, threads):
                raise MemoryError("matmul_grad: the packing buffers cannot be allocated")
    return out


@functools.cache
def _driver(dtype: torch.dtype) -> Any:
    return direct.CALL(driver.patches_address(_config(dtype)))


def _config(dtype: torch.dtype) -> BlockConfig:
    return driver.config(str(dtype).removeprefix("torch."))
