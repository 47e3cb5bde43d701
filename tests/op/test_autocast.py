"""Autocast: each function gives the dtype that torch's gives, and parameters get gradients of theirs."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import matmul_grad
from matmul_grad.testing import assert_same_bits

FLOATS = torch.float32, torch.float64, torch.bfloat16, torch.float16
SHAPES = {
    "mm": ((3, 4), (4, 2)),
    "bmm": ((2, 3, 4), (2, 4, 2)),
    "addmm": ((2,), (3, 4), (4, 2)),
    "baddbmm": ((3, 2), (2, 3, 4), (2, 4, 2)),
    "matmul": ((2, 3, 4), (4, 2)),
    "linear": ((2, 3, 4), (2, 4), (2,)),
}


def both(name: str, *operands: Any, **named: Any) -> list[Any]:
    """What this package and torch make of it: a tensor, or type and message of the error."""
    theirs = nn.functional.linear if name == "linear" else getattr(torch, name)
    found: list[Any] = []
    for call in (getattr(matmul_grad, name), theirs):
        try:
            found.append(call(*operands, **named))
        except Exception as error:
            found.append((type(error), str(error)))
    return found


@pytest.mark.parametrize("to", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_dtypes_match_torch(name: str, to: torch.dtype) -> None:
    """For every choice of dtypes: the same dtype, or the same error."""
    shapes, seen = SHAPES[name], set()
    for dtypes in itertools.product(FLOATS, repeat=len(shapes)):
        operands = [torch.ones(shape, dtype=dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
        with torch.autocast("cpu", to):
            ours, theirs = both(name, *operands)
        if isinstance(theirs, Tensor):
            assert_same_bits(ours, theirs, f"{dtypes}")
            seen.add(ours.dtype)
        else:
            assert ours == theirs, dtypes
    assert seen == {to, torch.float64}


@pytest.mark.parametrize("name", SHAPES)
def test_gradients_have_the_dtype_of_the_parameter(name: str) -> None:
    found = []
    for ours in (True, False):
        operands = [torch.ones(shape).requires_grad_() for shape in SHAPES[name]]
        with torch.autocast("cpu"):
            c = both(name, *operands)[0 if ours else 1]
        assert c.dtype == torch.bfloat16
        c.sum().backward()
        found.append([x.grad for x in operands])
    for ours_grad, torch_grad in zip(*found, strict=True):
        assert ours_grad.dtype == torch.float32
        assert_same_bits(ours_grad, torch_grad)


@pytest.mark.parametrize("name", ["mm", "bmm", "addmm", "baddbmm"])
def test_operator_autocasts_and_out_does_not(name: str) -> None:
    operands = [torch.ones(shape) for shape in SHAPES[name]]
    with torch.autocast("cpu"):
        assert getattr(torch.ops.matmul_grad, name)(*operands).dtype == torch.bfloat16
        ours, theirs = both(name, *operands, out=torch.empty(0))
        assert ours.dtype == theirs.dtype == torch.float32
        with torch.autocast("cpu", enabled=False):
            assert getattr(matmul_grad, name)(*operands).dtype == torch.float32
    assert getattr(matmul_grad, name)(*operands).dtype == torch.float32


def test_backward_operator_autocasts() -> None:
    grad, a, b = torch.ones(3, 2), torch.ones(3, 4), torch.ones(4, 2)
    with torch.autocast("cpu"):
        assert [x.dtype for x in matmul_grad.mm_backward(grad, a, b)] == [torch.bfloat16] * 2
        w = torch.ones(4, 2, requires_grad=True)
        with torch.autocast("cpu", enabled=False):
            c = matmul_grad.mm(a, w)
        c.sum().backward()  # inside of the block, as some do
    assert w.grad.dtype == torch.float32


def test_under_a_transform() -> None:
    a, w = torch.ones(5, 3, 4), torch.ones(4, 2)
    with torch.autocast("cpu"):
        assert_same_bits(*(torch.func.vmap(call, (0, None))(a, w) for call in (matmul_grad.mm, torch.mm)))
        losses = [lambda w, call=call: call(a[0], w).float().sum() for call in (matmul_grad.mm, torch.mm)]
        assert_same_bits(*(torch.func.grad(loss)(w) for loss in losses))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
def test_compiled() -> None:
    torch._dynamo.reset()
    a, w = torch.ones(3, 4), torch.ones(2, 4, requires_grad=True)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(a: Tensor, w: Tensor) -> Tensor:
        with torch.autocast("cpu"):
            return matmul_grad.linear(a, w)

    c = step(a, w)
    c.sum().backward()
    assert (c.dtype, w.grad.dtype) == (torch.bfloat16, torch.float32)
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["mm", "bmm", "addmm", "baddbmm", "mm_backward"])
@pytest.mark.parametrize("key", ["AutocastCPU", "AutocastCUDA"])
def test_both_devices_have_it(name: str, key: str) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"matmul_grad::{name}", key)
