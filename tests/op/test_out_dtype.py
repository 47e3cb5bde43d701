"""``out_dtype=torch.float32``: sums of 16-bit operands that are not rounded, and what is recorded of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from dtypes import ACCELERATED
from torch import Tensor
from torch.func import grad, jvp, vmap
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

import matmul_grad
from matmul_grad.testing import assert_same_bits, integers, normal

WIDE = torch.float32
NAMES = ("mm", "bmm", "addmm", "baddbmm")
every_name = pytest.mark.parametrize("name", NAMES)
NARROW = [dtype for name, dtype in ACCELERATED.items() if name in ("bf16", "f16")]
every_dtype = pytest.mark.parametrize("dtype", NARROW, ids=str)
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*")
reads_grad = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")


def operands(name: str, dtype: torch.dtype, draw: Callable[..., Tensor] = normal, k: int = 40) -> tuple[Tensor, ...]:
    """(3 items of) 13 × k and k × 21, behind what is added, in float32."""
    batch = 3 if "bmm" in name else 1
    a, b = draw(batch * 13, k, dtype, seed=1), draw(batch * k, 21, dtype, seed=2)
    both = (a.view(3, 13, k), b.view(3, k, 21)) if "bmm" in name else (a, b)
    return (draw(1, 21, WIDE, seed=3)[0].clone(), *both) if "add" in name else both


def exact(name: str, found: tuple[Tensor, ...], **scales: float) -> Tensor:
    result: Tensor = getattr(torch, name)(*(x.double() for x in found), **scales)
    return result


def scales_of(name: str) -> dict[str, float]:
    return {"beta": 0.5, "alpha": 2.0} if "add" in name else {}


def call(name: str, *found: Tensor, **named: Any) -> Tensor:
    result: Tensor = getattr(matmul_grad, name)(*found, out_dtype=WIDE, **named)
    return result


@every_name
@every_dtype
def test_sums_are_not_rounded(name: str, dtype: torch.dtype) -> None:
    *inputs, a, b = operands(name, dtype, integers, 300)
    found = (*inputs, a * 31, b)  # sums with more bits than 16-bit results hold
    with matmul_grad.strict():
        result = call(name, *found, **scales_of(name))
    assert result.dtype == WIDE
    expected = exact(name, found, **scales_of(name))
    assert_same_bits(result + 0.0, expected.to(WIDE) + 0.0)
    assert not torch.equal(result, result.to(dtype).to(WIDE))


@every_name
@every_dtype
def test_results_round_to_those_of_16_bits(name: str, dtype: torch.dtype) -> None:
    found = operands(name, dtype)
    if "add" in name:
        found = (found[0].to(dtype), *found[1:])  # an input of 16 bits is added too
    assert_same_bits(call(name, *found).to(dtype), getattr(matmul_grad, name)(*found))


@every_name
def test_strides_out_and_nothing_to_multiply(name: str) -> None:
    found = operands(name, torch.bfloat16)
    first = call(name, *found)
    by_columns = [x if x.dim() == 1 else x.mT.contiguous().mT for x in found]
    assert_same_bits(call(name, *by_columns), first)
    out = torch.empty_like(first)
    assert call(name, *found, out=out) is out
    assert_same_bits(out, first)
    *inputs, a, b = found
    assert_same_bits(call(name, *inputs, a[..., :0], b[..., :0, :]), exact(name, (*inputs, a * 0, b * 0)).to(WIDE))


@every_name
def test_errors_are_those_of_torch(name: str) -> None:
    found = operands(name, torch.bfloat16)
    *inputs, a, b = found
    with pytest.raises(RuntimeError, match="out_dtype must be the same as input dtype or fp32 for fp16/bf16 inputs"):
        getattr(matmul_grad, name)(*found, out_dtype=torch.float64)
    for wrong in ((a, a), (a, b.half())):
        narrow = [x.bfloat16() for x in inputs]
        with pytest.raises(RuntimeError) as expected:
            getattr(torch, name)(*narrow, *wrong)
        with pytest.raises(RuntimeError) as raised:
            call(name, *narrow, *wrong)
        assert str(raised.value) == str(expected.value)


@every_name
def test_the_dtype_of_the_operands_is_the_plain_product(name: str) -> None:
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        found = tuple(x.to(dtype) for x in operands(name, dtype))
        result = getattr(matmul_grad, name)(*found, out_dtype=dtype)
        assert_same_bits(result, getattr(matmul_grad, name)(*found))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert call(name, *(x.float() for x in found)).dtype == WIDE


@every_name
@every_dtype
def test_gradients_are_rounded_once(name: str, dtype: torch.dtype) -> None:
    """Beside those in float64 of the same float32 gradient, of which 16 bits would lose half."""
    ours = [x.requires_grad_() for x in operands(name, dtype)]
    double = [x.detach().double().requires_grad_() for x in ours]
    result = call(name, *ours, **scales_of(name))
    incoming = normal(1, result.numel(), WIDE, seed=5).view(result.shape)
    found = torch.autograd.grad(result, ours, incoming)
    expected = torch.autograd.grad(exact(name, tuple(double), **scales_of(name)), double, incoming.double())
    for one, other, operand in zip(found, expected, ours, strict=True):
        assert one.dtype == operand.dtype
        half_a_unit = other.abs() * torch.finfo(one.dtype).eps / 2 + torch.finfo(one.dtype).tiny
        assert ((one.double() - other).abs() <= 1.001 * half_a_unit + 1e-5).all()


@every_name
def test_second_derivatives(name: str) -> None:
    def second(*found: Tensor) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in found]
        function = call if leaves[-1].dtype == torch.float16 else lambda name, *x: getattr(torch, name)(*x)
        first = torch.autograd.grad(function(name, *leaves).square().sum(), leaves, create_graph=True)
        return list(torch.autograd.grad(sum(x.double().square().sum() for x in first), leaves))

    found = operands(name, torch.float16, lambda m, n, dtype, seed: normal(m, n, dtype, seed) * 0.1, 5)
    for one, other in zip(second(*found), second(*(x.double() for x in found)), strict=True):
        assert (one.double() - other).abs().max() <= 0.02 * other.abs().max()


@every_name
def test_transforms(name: str) -> None:
    found = operands(name, torch.bfloat16)
    result, tangent = jvp(lambda *x: call(name, *x), found, found)
    torch.testing.assert_close(tangent, exact(name, found).float() * 2 - (0 if len(found) == 2 else found[0]))
    assert_same_bits(result, call(name, *found))
    for dims in ((0,) * len(found), (*[None] * (len(found) - 1), 0), (*[None] * (len(found) - 2), 1, None)):
        many = [x if dim is None else torch.stack([x, -x], dim) for x, dim in zip(found, dims, strict=True)]
        one_by_one = [
            call(name, *(x if dim is None else x.select(dim, item) for x, dim in zip(many, dims, strict=True)))
            for item in range(2)
        ]
        assert_same_bits(vmap(lambda *x: call(name, *x), dims)(*many), torch.stack(one_by_one))
        grads = vmap(grad(lambda *x: call(name, *x).square().sum(), len(found) - 1), dims)(*many)
        assert grads.dtype == torch.bfloat16


@reads_grad
@every_name
@pytest.mark.parametrize("needs", [True, False], ids=["requires_grad", "constants"])
def test_opcheck(name: str, needs: bool) -> None:
    found = tuple(x.requires_grad_(needs) for x in operands(name, torch.bfloat16, k=4))
    operator = getattr(torch.ops.matmul_grad, f"{name}_dtype").default
    assert set(opcheck(operator, (*found, WIDE), scales_of(name)).values()) == {"SUCCESS"}
    aten = str(getattr(torch.ops.aten, name).dtype._schema).replace(f"aten::{name}.dtype", f"matmul_grad::{name}_dtype")
    assert str(operator._schema) == aten.replace("Scalar beta=1, Scalar alpha=1", "float beta=1., float alpha=1.")


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("name", ["mm", "baddbmm"])
def test_compiled_with_a_full_graph(name: str) -> None:
    found = [x.requires_grad_() for x in operands(name, torch.bfloat16)]
    compiled = torch.compile(lambda *x: call(name, *x), fullgraph=True)
    both = [f(*found) for f in (compiled, lambda *x: call(name, *x))]
    assert_same_bits(*(x.detach() for x in both))
    for one, other in zip(*(torch.autograd.grad(x.sum(), found) for x in both), strict=True):
        assert_same_bits(one, other)


@every_name
def test_flops_are_those_of_the_product(name: str) -> None:
    found = operands(name, torch.bfloat16)
    with FlopCounterMode(display=False) as counter:
        call(name, *found)
    assert counter.get_total_flops() == 2 * 13 * 40 * 21 * (3 if "bmm" in name else 1)
