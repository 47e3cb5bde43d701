"""Convolutions on a real GPU: exact in every geometry of the interpreter's cases, the same bits in any batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from convolution_cases import FUNCTIONS, GEOMETRIES, check_exact, operands, step
from products import assert_exact
from torch.nn import functional

import matmul_grad
from matmul_grad.kernels.gpu import convolution
from matmul_grad.testing import assert_same_bits

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("name", GEOMETRIES)
def test_convolutions_are_exact(name: str, device: torch.device) -> None:
    check_exact(name, device)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("channels", [24, 128])
def test_a_sample_has_the_same_bits_in_any_batch_and_memory_format(
    channels: int, dtype: torch.dtype, device: torch.device
) -> None:
    """In whatever tiles: those of one image, and those of a batch."""
    x = torch.randn(64, channels, 15, 14, device=device, dtype=dtype)
    w = torch.randn(96, channels, 3, 3, device=device, dtype=dtype)
    shared: Any = ((2, 2), (1, 1), (1, 1), 1)
    for batch in (x, x.contiguous(memory_format=torch.channels_last)):
        y = convolution.forward(batch, w, None, *shared)
        assert_same_bits(convolution.forward(x[40:41], w, None, *shared), y[40:41])
        dx = convolution.input_gradient(y, w, x.shape, *shared)
        assert_same_bits(convolution.input_gradient(y[40:41].contiguous(), w, x[40:41].shape, *shared), dx[40:41])


def test_a_weight_gradient_has_the_same_bits_each_time(device: torch.device) -> None:
    x, grad = (torch.randn(32, 64, 28, 28, device=device, dtype=torch.bfloat16) for _ in range(2))
    found = [
        convolution.weight_gradient(grad, x, (64, 64, 3, 3), (1, 1), (1, 1), (1, 1), 1) for _ in range(3)
    ]  # fmt: skip
    for other in found[1:]:
        assert_same_bits(other, found[0])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_public_functions_and_their_gradients_run_these_kernels(name: str, device: torch.device) -> None:
    """Strict, exact on integers, as torch's in float64 on a CPU."""
    tensors, named = operands(name, "fp16", groups=2), {"stride": 2, "padding": 1, "groups": 2}
    with matmul_grad.strict():
        found = step(matmul_grad, name, [x.to(device) for x in tensors], **named)
    for ours, theirs in zip(found, step(functional, name, [x.double() for x in tensors], **named), strict=True):
        assert_exact(ours.cpu(), theirs.to(ours.dtype))
