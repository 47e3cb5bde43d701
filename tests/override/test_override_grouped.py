"""torch.nn.functional.grouped_mm while the switch is on: its results, torch's own gradients, and torch's afterwards."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import grouped_mm

import matmul_grad
from matmul_grad.testing import assert_same_bits

pytestmark = pytest.mark.usefixtures("off_before_and_after")
ENDS = torch.tensor([2, 2, 6], dtype=torch.int32)
FORMS = {"rows": ((7, 3), (3, 4, 3)), "columns": ((3, 2, 3), (7, 3)), "steps": ((5, 7), (2, 7))}


def calls(outcome: str, dtype: str) -> int:
    count: int = matmul_grad.info()[outcome].get("grouped_mm", {}).get(dtype, 0)
    return count


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_forward_and_torchs_backward_run_on_these_kernels(form: str, dtype: torch.dtype) -> None:
    """Strides of no whole 16 bytes, float64, and the gradient of a plain sum: torch refuses each."""
    a, b = (torch.arange(torch.Size(shape).numel()).view(shape) % 7 - 3 for shape in FORMS[form])
    a, b = a.to(dtype).requires_grad_(), b.to(dtype).requires_grad_()

    def step(function: object) -> tuple[Tensor, ...]:
        result = function(a, b.mT, offs=ENDS)  # type: ignore[operator]  # torch's or this package's
        return result.detach(), *torch.autograd.grad(result.sum(), (a, b))

    name = str(dtype).removeprefix("torch.")
    before = calls("accelerated", name)
    with matmul_grad.enabled():
        found = step(grouped_mm)
    assert calls("accelerated", name) == before + 3
    for one, other in zip(found, step(matmul_grad.grouped_mm), strict=True):
        assert_same_bits(one, other)
    with pytest.raises(RuntimeError):
        grouped_mm(a, b.mT, offs=ENDS)


def test_the_operator_is_as_it_was() -> None:
    before = torch._C._dispatch_dump("aten::_grouped_mm")
    matmul_grad.enable()
    assert torch._C._dispatch_dump("aten::_grouped_mm") != before
    matmul_grad.disable()
    assert torch._C._dispatch_dump("aten::_grouped_mm") == before


def test_what_is_left_to_torch() -> None:
    a, b = torch.ones(8, 8, dtype=torch.bfloat16), torch.ones(2, 8, 8, dtype=torch.bfloat16)
    descending = torch.tensor([6, 2], dtype=torch.int32)
    before = calls("handed_over", "bfloat16")
    with matmul_grad.enabled():
        assert grouped_mm(a, b, offs=descending).shape == (8, 8)
        with pytest.raises(RuntimeError, match="Bias not supported yet"):
            grouped_mm(a, b, offs=descending, bias=a)
        assert calls("handed_over", "bfloat16") == before + 1
        with matmul_grad.strict(), pytest.raises(RuntimeError, match="strict"):
            grouped_mm(a, b, offs=descending)
