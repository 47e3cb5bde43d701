"""A gradient has its operand's order in memory, as torch's has: eager, compiled, under transforms, of every order."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch_warnings import PROFILER

import matmul_grad


def by_rows(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def by_columns(*shape: int) -> Tensor:
    return by_rows(*shape).mT.contiguous().mT


def every_second(*shape: int) -> Tensor:
    return by_rows(*shape[:-1], 2 * shape[-1])[..., ::2]


LAYOUTS = {"rows": by_rows, "columns": by_columns, "sliced": every_second}
OPERATORS: dict[str, tuple[tuple[int, ...], ...]] = {
    "mm": ((4, 5), (5, 3)),
    "addmm": ((4, 3), (4, 5), (5, 3)),
    "bmm": ((2, 4, 5), (2, 5, 3)),
    "baddbmm": ((2, 4, 3), (2, 4, 5), (2, 5, 3)),
    "matmul": ((6, 4, 5), (5, 3)),
    "linear": ((4, 5), (3, 5), (3,)),
}


def function(library: Any, name: str) -> Callable[..., Tensor]:
    return torch.nn.functional.linear if (library, name) == (torch, "linear") else getattr(library, name)


def operands(name: str, layout: str) -> list[Tensor]:
    kind = LAYOUTS[layout]
    return [(kind if len(shape) > 1 else by_rows)(*shape).requires_grad_() for shape in OPERATORS[name]]


def strides(gradients: Any) -> list[tuple[int, ...]]:
    return [gradient.stride() for gradient in gradients]


def eager(call: Callable[..., Tensor], tensors: list[Tensor]) -> Any:
    return torch.autograd.grad(call(*tensors).square().sum(), tensors)


def with_a_graph(call: Callable[..., Tensor], tensors: list[Tensor]) -> Any:
    return torch.autograd.grad(call(*tensors).square().sum(), tensors, create_graph=True)


def compiled(call: Callable[..., Tensor], tensors: list[Tensor]) -> Any:
    torch._dynamo.reset()
    return eager(torch.compile(call, backend="aot_eager", fullgraph=True), tensors)


def transformed(call: Callable[..., Tensor], tensors: list[Tensor]) -> Any:
    every = tuple(range(len(tensors)))
    return torch.func.grad(lambda *x: call(*x).square().sum(), every)(*(x.detach() for x in tensors))


@pytest.mark.parametrize("way", [eager, with_a_graph, compiled, transformed], ids=lambda way: way.__name__)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", OPERATORS)
def test_strides_of_gradients_are_torchs(name: str, layout: str, way: Callable[..., Any]) -> None:
    ours = way(function(matmul_grad, name), operands(name, layout))
    theirs = way(function(torch, name), operands(name, layout))
    assert strides(ours) == strides(theirs)
    for one, other in zip(ours, theirs):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_only_the_gradient_that_is_needed(layout: str) -> None:
    for needed in (0, 1):
        gradients = []
        for library in (matmul_grad, torch):
            tensors = [x.detach().requires_grad_(i == needed) for i, x in enumerate(operands("mm", layout))]
            gradients.append(torch.autograd.grad(library.mm(*tensors).sum(), tensors[needed])[0])
        assert gradients[0].stride() == gradients[1].stride()


@pytest.mark.parametrize("layouts", [("rows", "columns"), ("columns", "rows"), ("columns", "columns")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mm_backward_has_the_same_bits_in_either_order(layouts: tuple[str, str], dtype: torch.dtype) -> None:
    grad, a, b = (by_rows(*shape).to(dtype) for shape in ((70, 90), (70, 130), (130, 90)))
    expected = matmul_grad.mm_backward(grad, a, b)
    lying = (x.mT.contiguous().mT if layout == "columns" else x for x, layout in zip((a, b), layouts))
    actual = matmul_grad.mm_backward(grad, *lying)
    for gradient, same, layout in zip(actual, expected, layouts):
        assert gradient is not None and same is not None
        assert torch.equal(gradient, same)
        assert (gradient.stride(0) == 1) == (layout == "columns")


@pytest.mark.parametrize("library", [torch, matmul_grad], ids=["torch", "matmul_grad"])
def test_a_gradient_can_be_flattened(library: Any) -> None:
    weight = torch.randn(5, 8, requires_grad=True)
    (gradient,) = torch.autograd.grad(function(library, "linear")(torch.randn(4, 8), weight).sum(), weight)
    assert torch.nn.utils.parameters_to_vector([gradient]).shape == (40,)


@PROFILER
def test_gradient_of_a_weight_is_not_copied() -> None:
    """AccumulateGrad keeps a gradient that lies as its parameter does, and copies any other one."""
    layer = matmul_grad.convert(torch.nn.Linear(64, 48))
    with torch.profiler.profile(record_shapes=True) as profile:
        layer(torch.randn(4, 64)).sum().backward()
    copies = [
        event for event in profile.key_averages(group_by_input_shape=True)
        if event.key == "aten::copy_" and [48, 64] in event.input_shapes
    ]  # fmt: skip
    assert copies == []
