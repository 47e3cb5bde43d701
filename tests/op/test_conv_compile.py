"""The operators of convolution under torch.compile and torch.export: one graph, which holds them, at any size."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from functorch.compile import make_boxed_func
from pairs import assert_close
from torch import Tensor
from torch.nn import functional

import matmul_grad
from matmul_grad.testing import normal

CONVOLUTION, WEIGHT_GRADIENT = torch.ops.matmul_grad.convolution, torch.ops.matmul_grad.convolution_weight_gradient
# The compilers script and trace with parts of torch that torch itself has deprecated.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.*"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning"),
    # Since torch 2.15 opcheck reads .grad of the views that it makes of its operands.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]


def drawn(*size: int, seed: int = 0) -> Tensor:
    return normal(1, torch.Size(size).numel(), torch.float64, seed=seed + 1).view(size)


def loss(module: Any, x: Tensor, w: Tensor, v: Tensor, b: Tensor) -> Tensor:
    """A convolution, a transposed one and one with "same" padding."""
    y = torch.relu(module.conv2d(x, w, b, stride=2, padding=1))
    y = module.conv_transpose2d(y, v, stride=2, padding=1, output_padding=1)
    return module.conv2d(y, w, padding="same").pow(2).sum()


def operands(batch: int = 2, size: int = 6) -> list[Tensor]:
    shapes = (batch, 2, size, size + 1), (3, 2, 3, 3), (3, 2, 3, 3), (3,)
    return [drawn(*shape, seed=seed).requires_grad_() for seed, shape in enumerate(shapes)]


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("dynamic", [None, True], ids=["automatic", "dynamic"])
def test_compile_fullgraph(dynamic: bool | None) -> None:
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda *x: loss(matmul_grad, *x), fullgraph=True, dynamic=dynamic, backend=counter)
    for size in (6, 7, 9):
        given = operands(size - 2, size)  # no size is that of another dimension
        value, expected = compiled(*given), loss(functional, *given)
        assert_close(value, expected)
        assert_close(torch.autograd.grad(value, given), torch.autograd.grad(expected, given))
    assert counter.frame_count <= {None: 2, True: 1}[dynamic]


@pytest.mark.usefixtures("fresh_compiler")
def test_compile_by_inductor() -> None:
    x, w, _, b = operands()
    y, expected = torch.compile(matmul_grad.conv2d, fullgraph=True)(x, w, b), functional.conv2d(x, w, b)
    assert_close(y, expected)
    assert_close(torch.autograd.grad(y.sum(), (x, w, b)), torch.autograd.grad(expected.sum(), (x, w, b)))


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_graph_holds_the_operators() -> None:
    graphs: dict[str, list[Any]] = {"forward": [], "backward": []}

    def keep(name: str) -> Callable[..., Any]:
        def compiler(graph: Any, _: Any) -> Any:
            graphs[name] += [node.target for node in graph.graph.nodes if node.op == "call_function"]
            return make_boxed_func(graph.forward)

        return compiler

    backend = torch._dynamo.backends.common.aot_autograd(fw_compiler=keep("forward"), bw_compiler=keep("backward"))
    x, w, *_ = operands()
    torch.compile(matmul_grad.conv2d, fullgraph=True, backend=backend)(x, w).sum().backward()
    assert graphs["forward"].count(CONVOLUTION.default) == 1
    assert graphs["backward"].count(CONVOLUTION.default) == 1  # the gradient of the input
    assert graphs["backward"].count(WEIGHT_GRADIENT.default) == 1
    theirs = {torch.ops.aten.convolution.default, torch.ops.aten.convolution_backward.default}
    assert not theirs & {*graphs["forward"], *graphs["backward"]}


@pytest.mark.parametrize("transposed", [False, True], ids=["convolution", "transposed"])
def test_opcheck(transposed: bool) -> None:
    x, w, _, b = operands()
    w = w.detach().transpose(0, 1).contiguous().requires_grad_() if transposed else w
    for image in (x, x.detach().to(memory_format=torch.channels_last).requires_grad_()):
        arguments = [2, 2], [1, 1], [1, 1], transposed, [0, 1 if transposed else 0], 1
        torch.library.opcheck(CONVOLUTION, (image, w, b, *arguments))
    y = CONVOLUTION(x, w, None, *arguments).detach().requires_grad_()
    grad, input = (x, y) if transposed else (y, x)
    torch.library.opcheck(WEIGHT_GRADIENT, (grad, input, list(w.shape), *arguments[:3], 1))


class Net(torch.nn.Module):
    def forward(self, x: Tensor, w: Tensor, v: Tensor, b: Tensor) -> Tensor:
        return loss(matmul_grad, x, w, v, b)


def test_export_with_dynamic_dimensions() -> None:
    """The batch and the size; decomposed, the program holds aten's operators."""
    given = [x.detach() for x in operands(3, 8)]
    batch, height = torch.export.Dim("batch", min=2), torch.export.Dim("height", min=4, max=64)
    shapes = {"x": {0: batch, 2: height}, "w": None, "v": None, "b": None}
    program = torch.export.export(Net(), tuple(given), dynamic_shapes=shapes)
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert targets.count(CONVOLUTION.default) == 3
    decomposed = program.run_decompositions()
    targets = [node.target for node in decomposed.graph.nodes if node.op == "call_function"]
    assert targets.count(torch.ops.aten.convolution.default) == 3 and CONVOLUTION.default not in targets
    for other in (program, decomposed):
        x = drawn(2, 2, 5, 9)
        assert_close(other.module()(x, *given[1:]), loss(functional, x, *given[1:]))
