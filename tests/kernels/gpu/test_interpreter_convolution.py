"""Convolutions under Triton's interpreter: exact integers against torch in float64, canaries, bits; no GPU needed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from case_process import CaseProcess, assert_no_complaint
from convolution_cases import FUNCTIONS, GEOMETRIES, check_exact, integers, operands, step
from gpu_cases import rows_alike, serve_cases
from products import assert_exact
from torch import Tensor
from torch.nn import functional

import matmul_grad
from matmul_grad.testing import assert_same_bits


def check_split(dtype: str) -> None:
    """The gradient of a weight, of two groups, as parts of k added in order."""
    from matmul_grad.kernels.gpu import convolution

    choose_tile = convolution.choose_tile
    x, grad = integers((3, 4, 12, 11), dtype, 1), integers((3, 6, 12, 11), dtype, 2)
    w, shared = torch.zeros(6, 2, 3, 3, dtype=x.dtype), ((1, 1), (1, 1), (1, 1), 2)
    want = torch.ops.aten.convolution_backward(
        grad.double(), x.double(), w.double(), None, *shared[:3], False, (0, 0), 2, [False, True, False]
    )[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convolution, "choose_tile", lambda *of: replace(choose_tile(*of), split_k=3))
        assert_exact(convolution.weight_gradient(grad, x, w.shape, *shared), want.to(x.dtype))


def check_float32_of_16_bits(split: int) -> None:
    """The gradient of a weight is the sums themselves, beside one in 16 bits from the same operands."""
    from matmul_grad.kernels.gpu import convolution

    choose_tile = convolution.choose_tile
    size = 2, 2, 17, 16
    x, grad = 999 * integers(size, "fp16", 1) + integers(size, "fp16", 3), integers((2, 3, 17, 16), "fp16", 2)
    want = torch.nn.grad.conv2d_weight(x.double(), (3, 2, 3, 3), grad.double(), padding=1)
    assert not torch.equal(want, want.half().double())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convolution, "choose_tile", lambda *of: replace(choose_tile(*of), split_k=split))
        for dtype in (torch.float16, torch.float32):
            found = convolution.weight_gradient(grad, x, want.shape, (1, 1), (1, 1), (1, 1), 1, dtype)
            assert_exact(found, want.to(dtype))


def check_wide() -> None:
    """64-bit indices give the bits that 32-bit ones give."""
    from matmul_grad.kernels.gpu import convolution_plan, launch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convolution_plan, "WIDE_FROM", 1)
        launch.clear_cache()
        check_exact("groups-sliced")
    launch.clear_cache()


def check_same_bits(channels: int, stride: int) -> None:
    """A sample has the same bits alone and in a batch, in either memory format, and a pixel in any image."""
    from matmul_grad.kernels.gpu.convolution import forward, input_gradient

    generator = torch.Generator().manual_seed(7)
    x = torch.randn(4, channels, 4, 5, generator=generator)
    w = torch.randn(channels, channels, 3, 2, generator=generator)
    shared: Any = ((stride, stride), (1, 1), (1, 1), 1)
    with rows_alike():
        y = forward(x, w, None, *shared)
        assert_same_bits(forward(x[3:4], w, None, *shared), y[3:4])
        assert_same_bits(forward(x.contiguous(memory_format=torch.channels_last), w, None, *shared), y)
        assert_same_bits(forward(x[:, :, :3], w, None, *shared)[:, :, :1], y[:, :, :1])
        dx = input_gradient(y, w, x.shape, *shared)
        assert_same_bits(input_gradient(y[3:4], w, x[3:4].shape, *shared), dx[3:4])


def check_precision() -> None:
    """float32 follows torch's setting for convolutions, which is apart from that of products."""
    from matmul_grad.kernels.gpu.convolution import forward

    setting: Any = torch.backends.cudnn.conv
    before = setting.fp32_precision
    x, one = torch.full((1, 1, 3), 1 + 2**-11), torch.ones(1, 1, 1)
    try:
        for precision, want in (("ieee", x), ("tf32", torch.full_like(x, 1 + 2**-10))):
            setting.fp32_precision = precision
            assert_exact(forward(x, one, None, (1,), (0,), (1,), 1), want)
    finally:
        setting.fp32_precision = before


def check_empty() -> None:
    """No sample, no channel, and memory formats of results."""
    from matmul_grad.kernels.gpu.convolution import forward, input_gradient, weight_gradient

    shared: Any = ((1, 1), (1, 1), (1, 1), 1)
    w, bias = torch.ones(3, 2, 3, 3), torch.arange(3.0)
    assert forward(torch.ones(0, 2, 4, 4), w, bias, *shared).shape == (0, 3, 4, 4)
    assert_exact(weight_gradient(torch.ones(0, 3, 4, 4), torch.ones(0, 2, 4, 4), w.shape, *shared), torch.zeros_like(w))
    none = forward(torch.ones(1, 0, 4, 4), torch.ones(3, 0, 3, 3), bias, *shared)
    assert_exact(none, bias.view(1, 3, 1, 1).expand(1, 3, 4, 4).contiguous())
    last = torch.ones(2, 2, 4, 4).contiguous(memory_format=torch.channels_last)
    y = forward(last, w, None, *shared)
    for result in (y, input_gradient(y, w, last.shape, *shared)):
        assert result.is_contiguous(memory_format=torch.channels_last) and not result.is_contiguous()


@contextlib.contextmanager
def dispatched_here() -> Iterator[list[str]]:
    """The operators take CPU tensors for a GPU's: the products over patches that they launch, in order."""
    from matmul_grad import convolution_ops
    from matmul_grad.kernels.gpu import convolution

    launched: list[str] = []
    run = convolution._run

    def noted(product: Any, *others: Any) -> Tensor:
        launched.append(product.__name__.removesuffix("_product"))
        return run(product, *others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convolution, "_run", noted)
        patch.setattr(convolution_ops, "kernels_for", lambda _: convolution)
        yield launched


def check_function(name: str, dtype: str) -> None:
    """A public function and its gradients run these kernels: whole numbers, as torch's in float64."""
    named = {"stride": 2, "padding": 1, "groups": 2}
    tensors = operands(name, dtype, groups=2)
    with dispatched_here() as launched, matmul_grad.strict():
        found = step(matmul_grad, name, tensors, **named)
    wanted = step(functional, name, [x.double() for x in tensors], **named)
    for ours, theirs in zip(found, wanted, strict=True):
        assert_exact(ours, theirs.to(ours.dtype))
    forward, backward = "forward", "input_gradient"
    if "transpose" in name:
        forward, backward = backward, forward
    assert launched == [forward, backward, "weight_gradient"]


def check_formats() -> None:
    """A batch in channels_last and one without samples, and under autocast."""
    from matmul_grad.convolution_ops import memory_format_of

    x, w, bias = operands("conv2d", "fp32")
    last = x.contiguous(memory_format=torch.channels_last)
    with dispatched_here() as launched, matmul_grad.strict():
        y = matmul_grad.conv2d(last, w, bias)
        assert memory_format_of(y) == torch.channels_last
        assert_exact(y, functional.conv2d(x, w, bias))
        assert_exact(matmul_grad.conv2d(x[0], w, bias), y[0].contiguous())
        assert launched == ["forward", "forward"]
        for ours, theirs in zip(*(step(m, "conv2d", [x[:0], w, bias]) for m in (matmul_grad, functional)), strict=True):
            assert_exact(ours, theirs)
        assert len(launched) == 2
        with torch.autocast("cpu", torch.bfloat16):
            half = matmul_grad.conv2d(x, w, bias)
        assert half.dtype == torch.bfloat16 and len(launched) == 3
        assert_exact(half, y.to(torch.bfloat16))


def check_fallbacks() -> None:
    """Complex numbers, integers and one channel a group are torch's."""
    x, w, bias = operands("conv2d", "fp64")
    cases = ((x.cfloat(), w.cfloat(), None, 1), (x.long(), w.long(), None, 1), (x, w[:4, :1], bias[:4], 4))
    with dispatched_here() as launched:
        for image, filters, added, groups in cases:
            found, wanted = (m.conv2d(image, filters, added, groups=groups) for m in (matmul_grad, functional))
            assert torch.equal(found, wanted)
            with matmul_grad.strict(), pytest.raises(RuntimeError, match=r"strict\(\)"):
                matmul_grad.conv2d(image, filters, added, groups=groups)
        assert launched == []


def check_more_phases_than_programs() -> None:
    """A stride whose phases no grid holds is torch's."""
    x, w, bias = torch.ones(1, 1, 1, 1), torch.ones(1, 1, 2, 2), torch.zeros(1)
    named: dict[str, Any] = {"stride": 1 << 16}
    with dispatched_here() as launched:
        found = matmul_grad.conv_transpose2d(x, w, bias, **named)
        assert launched == ["input_gradient"]
        assert_exact(found, functional.conv_transpose2d(x, w, bias, **named))
        with matmul_grad.strict(), pytest.raises(RuntimeError, match=r"strict\(\)"):
            matmul_grad.conv_transpose2d(x, w, bias, **named)


CASES: dict[str, Callable[[], None]] = {
    **{f"exact-{name}": partial(check_exact, name) for name in GEOMETRIES},
    **{f"split-{dtype}": partial(check_split, dtype) for dtype in ("fp64", "fp16")},
    **{f"float32-{split}": partial(check_float32_of_16_bits, split) for split in (1, 2)},
    **{
        f"bits-{channels}-{stride}": partial(check_same_bits, channels, stride)
        for channels, stride in ((3, 2), (32, 1))
    },
    "wide": check_wide,
    "precision": check_precision,
    "empty": check_empty,
    **{f"function-{name}": partial(check_function, name, "fp32") for name in FUNCTIONS},
    "function-fp16": partial(check_function, "conv2d", "fp16"),
    "formats": check_formats,
    "fallbacks": check_fallbacks,
    "phases": check_more_phases_than_programs,
}


@pytest.mark.parametrize("case", CASES)
def test_interpreted(case: str, interpreter: CaseProcess) -> None:
    assert_no_complaint(interpreter.complaint(case))


if __name__ == "__main__":
    serve_cases(CASES)
