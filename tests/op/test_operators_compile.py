"""The operators of mm under torch.compile and torch.export: one graph, which holds them, at any size."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from functorch.compile import make_boxed_func
from pairs import DOUBLE, MM, assert_close, pair
from torch import Tensor

import matmul_grad
from matmul_grad.testing import assert_same_bits, normal

# The compilers script and trace with parts of torch that torch itself has deprecated.
compiles = pytest.mark.filterwarnings("ignore:.*torch.jit.*")


@compiles
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("dynamic", [None, True], ids=["automatic", "dynamic"])
def test_compile_fullgraph(dynamic: bool | None) -> None:
    def loss(mm: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
        return torch.relu(mm(x * 2, y.t())).pow(2).sum()

    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")
    compiled = torch.compile(lambda x, y: loss(matmul_grad.mm, x, y), fullgraph=True, dynamic=dynamic, backend=counter)
    for size in (3, 5, 8):
        x, y = normal(size, 7, DOUBLE).requires_grad_(), normal(size + 1, 7, DOUBLE).requires_grad_()
        value, expected = compiled(x, y), loss(torch.mm, x, y)
        assert_close(value, expected)
        assert_close(torch.autograd.grad(value, (x, y)), torch.autograd.grad(expected, (x, y)))
        with torch.no_grad():
            assert_close(compiled(x, y), expected)
    assert counter.frame_count <= {None: 4, True: 2}[dynamic]  # with and without gradients, twice if automatic


@compiles
@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_graph_holds_the_operators() -> None:
    graphs: dict[str, list[Any]] = {"forward": [], "backward": []}

    def keep(name: str):
        def compiler(graph, _):
            graphs[name] += [node.target for node in graph.graph.nodes if node.op == "call_function"]
            return make_boxed_func(graph.forward)

        return compiler

    backend = torch._dynamo.backends.common.aot_autograd(fw_compiler=keep("forward"), bw_compiler=keep("backward"))
    x, y = pair(needs=True)
    torch.compile(matmul_grad.mm, fullgraph=True, backend=backend)(x, y).sum().backward()
    assert graphs["forward"].count(MM.default) == 1
    assert graphs["backward"].count(MM.default) == 2
    assert not {torch.ops.aten.mm.default} & {*graphs["forward"], *graphs["backward"]}


@compiles
@pytest.mark.usefixtures("fresh_compiler")
def test_compile_mm_backward_and_transforms() -> None:
    (a, b), grad = pair(), normal(3, 2, DOUBLE, seed=3)
    compiled = torch.compile(matmul_grad.mm_backward, fullgraph=True)
    assert_close(compiled(grad, a, b), (grad @ b.t(), a.t() @ grad))

    def gradient(mm: Callable[[Tensor, Tensor], Tensor]):
        return torch.func.grad(lambda x, y: mm(x, y).sin().sum(), (0, 1))

    assert_close(torch.compile(gradient(matmul_grad.mm), fullgraph=True)(a, b), gradient(torch.mm)(a, b))


@compiles
def test_export_with_a_dynamic_dimension() -> None:
    class Product(torch.nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return matmul_grad.mm(x, y)

    a, b = pair(7)
    rows = torch.export.Dim("rows")
    program = torch.export.export(Product(), (a, b), dynamic_shapes={"x": {0: rows}, "y": None})
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert MM.default in targets
    for m in (2, 3, 7):
        assert_same_bits(program.module()(a[:m], b), matmul_grad.mm(a[:m], b))
