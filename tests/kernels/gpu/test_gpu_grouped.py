"""Grouped products on a real GPU: exact in every form and layout, bits of a group, no wait for the device."""

from __future__ import annotations

import itertools

import pytest
import torch
from gpu_cases import DTYPES
from grouped_cases import FORMS, LAYOUTS, SIZES, TMA_SIZES, check_exact
from torch import Tensor

import matmul_grad
from matmul_grad.kernels.gpu import grouped
from matmul_grad.testing import assert_same_bits

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("layouts", ["".join(x) for x in itertools.product(LAYOUTS, LAYOUTS)])
@pytest.mark.parametrize("form", FORMS)
def test_groups_are_exact(form: str, layouts: str, device: torch.device) -> None:
    for dtype, sizes, result in itertools.product(DTYPES, (SIZES, TMA_SIZES), "NT"):
        check_exact(form, dtype, layouts + result, device=device, sizes=sizes)


def operands(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Of 3 groups of rows, of which 7 rows are in none."""
    x, w = torch.randn(1031, 512, device=device, dtype=dtype), torch.randn(3, 512, 768, device=device, dtype=dtype)
    return x, w, torch.tensor([100, 100, 1024], dtype=torch.int32, device=device)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_a_group_has_the_same_bits_whatever_the_others_are(dtype: torch.dtype, device: torch.device) -> None:
    x, w, offs = operands(device, dtype)
    y = matmul_grad.grouped_mm(x, w, offs=offs)
    alone = matmul_grad.grouped_mm(x[100:1024], w[2:], offs=offs[:1] + 824)
    assert_same_bits(y[100:1024].cpu(), alone.cpu())
    assert not bool(y[1024:].any())
    x[:100] = float("nan")
    assert_same_bits(matmul_grad.grouped_mm(x, w, offs=offs)[100:].cpu(), y[100:].cpu())


def test_forward_and_backward_wait_for_nothing_and_can_be_captured(device: torch.device) -> None:
    x, w, offs = operands(device, torch.bfloat16)
    grad = torch.randn(1031, 768, device=device, dtype=x.dtype)
    leaves = x.requires_grad_(), w.requires_grad_()

    def step() -> tuple[Tensor, ...]:
        y = matmul_grad.grouped_mm(*leaves, offs=offs)
        return y, *torch.autograd.grad(y, leaves, grad)

    with matmul_grad.strict():
        first = step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            second = step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            recorded = step()
    graph.replay()
    for one, other, third in zip(first, second, recorded, strict=True):
        assert_same_bits(one.detach().cpu(), other.detach().cpu())
        assert_same_bits(one.detach().cpu(), third.detach().cpu())
    offs.copy_(torch.tensor([10, 500, 1031], dtype=torch.int32))
    graph.replay()
    for one, third in zip(step(), recorded, strict=True):
        assert_same_bits(one.detach().cpu(), third.detach().cpu())


def test_what_the_kernel_does_not_count_is_a_loop(device: torch.device) -> None:
    x, w, offs = torch.ones(2000, 3, device=device), torch.ones(2000, 3, 2, device=device), torch.arange(1, 2001)
    ends = offs.to(device, torch.int32)
    assert not grouped.supports(x, w, ends, x[:, :2])
    assert bool((matmul_grad.grouped_mm(x, w, offs=ends) == 3).all())
