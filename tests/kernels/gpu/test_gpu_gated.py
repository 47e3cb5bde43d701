"""Gated products on a real GPU: exact in every layout, near float64, one launch, gradients."""

from __future__ import annotations

import itertools

import pytest
import torch
from gpu_cases import DTYPES, embed, embed_aligned, integers
from products import assert_exact
from torch import Tensor

import matmul_grad
from matmul_grad.activation_formulas import BY_TORCH, NAMES
from matmul_grad.kernels.gpu import gated

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("layouts", ["".join(x) for x in itertools.product("NT", repeat=3)] + ["SRC"])
@pytest.mark.parametrize("name", DTYPES)
def test_results_are_exact(name: str, layouts: str, device: torch.device) -> None:
    """Sums of up to 80 products of -1, 0 and 1; of sizes that TMA reads, and others."""
    dtype = DTYPES[name]
    for (m, n, k), place in (((136, 136, 80), embed_aligned), ((133, 67, 79), embed)):
        if layouts == "SRC" and place is embed_aligned:
            continue
        shapes = (m, k), (k, n), (k, n)
        a, b, gate = (
            place(integers(*shape, dtype, seed, device), x) for seed, (shape, x) in enumerate(zip(shapes, layouts))
        )
        row, whole = integers(1, n, dtype, 7, device)[0], integers(m, n, dtype, 8, device)
        value = a.double() @ b.double() + row.double()
        pre = (a.double() @ gate.double() + whole.double()).to(dtype).double()
        found = gated.product(gated.Gated(a, b, gate, row, whole, "relu", True), "ieee")
        if found is None:  # two products are predicted to be faster
            continue
        for got, want in zip(found, (pre.relu() * value, pre, value), strict=True):
            assert got is not None
            assert_exact(got.cpu(), want.to(dtype).cpu())


@pytest.mark.parametrize("activation", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layers_are_near_float64(dtype: torch.dtype, activation: str, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(1)
    drawn = [torch.randn(shape, generator=generator) for shape in ((300, 512), (256, 512), (256, 512), (256,), (256,))]
    given = [(x / 20 if x.dim() == 2 else x).to(device, dtype).requires_grad_() for x in drawn]
    wide = [x.detach().double().requires_grad_() for x in given]

    def exact(x: Tensor, weight: Tensor, gate: Tensor, bias: Tensor, gate_bias: Tensor) -> Tensor:
        return BY_TORCH[activation](x @ gate.t() + gate_bias) * (x @ weight.t() + bias)

    with matmul_grad.strict():
        found = matmul_grad.gated_linear(*given, activation=activation)
    expected = exact(*wide)
    tolerance = {"rtol": 0.03, "atol": 0.03} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(found.double(), expected, **tolerance)
    grads = torch.autograd.grad(found.float().sum(), given)
    for one, other in zip(grads, torch.autograd.grad(expected.sum(), wide), strict=True):
        assert (one.double() - other).abs().max() <= 0.05 * other.abs().max()
