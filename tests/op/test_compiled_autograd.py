"""The backward pass under compiled autograd, where torch traces the graph of gradients itself."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor
from torch._dynamo import compiled_autograd

import matmul_grad
from matmul_grad.testing import normal

pytestmark = [
    pytest.mark.usefixtures("fresh_compiler"),
    # Tracing scripts parts of torch, which torch.jit deprecates (the category depends on the version), and reads .grad.
    pytest.mark.filterwarnings("ignore:.*torch.jit.*"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]


def draw(*shape: int, seed: int) -> Tensor:
    return normal(1, torch.Size(shape).numel(), torch.float64, seed).view(shape).requires_grad_()


# Each function's name in torch and here, with the shapes of its operands and its keywords.
CALLS: dict[str, tuple[list[tuple[int, ...]], dict[str, float]]] = {
    "mm": ([(3, 4), (4, 2)], {}),
    "bmm": ([(2, 3, 4), (2, 4, 5)], {}),
    "addmm": ([(2,), (3, 4), (4, 2)], {"beta": 0.5, "alpha": 2}),
    "baddbmm": ([(2, 1, 5), (2, 3, 4), (2, 4, 5)], {"beta": 0.5, "alpha": 2}),
    "matmul": ([(2, 3, 4), (4, 5)], {}),
    "linear": ([(2, 3, 4), (5, 4), (5,)], {}),
}


def gradients(function: Callable[..., Tensor], name: str) -> tuple[Tensor, ...]:
    """Of the operands, for a gradient of the result that is not constant."""
    shapes, keywords = CALLS[name]
    operands = [draw(*shape, seed=number) for number, shape in enumerate(shapes)]
    function(*operands, **keywords).square().sum().backward()
    return tuple(operand.grad for operand in operands if operand.grad is not None)


def torch_function(name: str) -> Callable[..., Tensor]:
    return torch.nn.functional.linear if name == "linear" else getattr(torch, name)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", CALLS)
def test_gradients_are_those_of_torch(name: str, backend: str) -> None:
    compiled: list[Any] = []

    def compiler(graph: torch.fx.GraphModule) -> Callable[..., Any]:
        compiled.append(graph)
        return torch.compile(graph, backend=backend)

    with compiled_autograd._enable(compiler):
        actual = gradients(getattr(matmul_grad, name), name)
    assert len(compiled) == 1
    expected = gradients(torch_function(name), name)
    assert len(actual) == len(expected) == len(CALLS[name][0])
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def test_a_graph_is_traced_once_for_equal_shapes() -> None:
    """Nodes of one class and shape have one key in the cache of compiled autograd."""
    compiled: list[Any] = []

    def compiler(graph: torch.fx.GraphModule) -> Callable[..., Any]:
        compiled.append(graph)
        return graph

    with compiled_autograd._enable(compiler):
        first = gradients(matmul_grad.addmm, "addmm")
        second = gradients(matmul_grad.addmm, "addmm")
        assert len(compiled) == 1
        gradients(matmul_grad.mm, "mm")
        assert len(compiled) == 2
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_different_factors_are_different_graphs() -> None:
    """beta and alpha lie on the context, and are part of what is compiled."""
    left, right, added = draw(3, 4, seed=1), draw(4, 2, seed=2), draw(3, 2, seed=3)
    with compiled_autograd._enable(torch.compile(backend="eager")):
        for beta, alpha in [(1.0, 1.0), (0.5, 1.0), (0.5, 2.0), (1.0, 1.0)]:
            actual = torch.autograd.grad(
                matmul_grad.addmm(added, left, right, beta=beta, alpha=alpha).square().sum(), (added, left, right)
            )
            expected = torch.autograd.grad(
                torch.addmm(added, left, right, beta=beta, alpha=alpha).square().sum(), (added, left, right)
            )
            torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def test_a_compiled_step_with_the_setting() -> None:
    """As users turn it on: torch._dynamo.config.compiled_autograd."""
    left, right = draw(3, 4, seed=1), draw(4, 2, seed=2)

    def step() -> None:
        matmul_grad.mm(left, right).square().sum().backward()

    with torch._dynamo.config.patch(compiled_autograd=True):
        torch.compile(step, backend="aot_eager")()
    actual = left.grad, right.grad
    expected = torch.autograd.grad(torch.mm(left, right).square().sum(), (left, right))
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
