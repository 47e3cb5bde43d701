"""The functions under torch.compile and torch.export: one graph, any size, a file in between."""

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from functorch.compile import make_boxed_func
from torch import Tensor, nn

import matmul_grad
from matmul_grad.testing import normal

DOUBLE = torch.float64
OPERATORS = torch.ops.matmul_grad
pytestmark = [
    pytest.mark.usefixtures("fresh_compiler"),
    # The compilers script and trace with parts of torch that torch itself has deprecated.
    pytest.mark.filterwarnings("ignore:.*torch.jit.*"),
]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return normal(1, torch.Size(shape).numel(), DOUBLE, seed).view(shape)


def leaves(size: int) -> tuple[Tensor, ...]:
    shapes = (2, size, 6), (5, 6), (5,), (2, 5, 4)
    return tuple(draw(*shape, seed=1 + i).requires_grad_() for i, shape in enumerate(shapes))


def assert_close(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def ours(x: Tensor, w: Tensor, bias: Tensor, b: Tensor) -> Tensor:
    hidden = matmul_grad.linear(x, w, bias)
    summed = matmul_grad.baddbmm(hidden[:, :, :1], hidden, b, beta=0.5, alpha=2)
    return matmul_grad.bmm(matmul_grad.matmul(summed, b[0].t()).relu(), hidden.mT)


def theirs(x: Tensor, w: Tensor, bias: Tensor, b: Tensor) -> Tensor:
    hidden = nn.functional.linear(x, w, bias)
    summed = torch.baddbmm(hidden[:, :, :1], hidden, b, beta=0.5, alpha=2)
    return torch.bmm(torch.matmul(summed, b[0].t()).relu(), hidden.mT)


MODULES: dict[str, Callable[..., nn.Module]] = {
    "Linear": matmul_grad.Linear,
    "activation": lambda m, n, dtype: matmul_grad.Linear(m, n, dtype=dtype, activation="gelu"),
    "accumulate": lambda m, n, dtype: matmul_grad.Linear(m, n, dtype=dtype, activation="silu", accumulate=True),
    "GatedLinear": matmul_grad.GatedLinear,
    "converted": lambda m, n, dtype: matmul_grad.convert(nn.Linear(m, n, dtype=dtype), accumulate=True),
    "out_dtype": lambda m, n, dtype: Wide(m, n, dtype=dtype),
}


class Wide(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return matmul_grad.mm(x, self.weight.t(), out_dtype=torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODULES)
def test_modules_compile_to_one_graph(name: str, dtype: torch.dtype) -> None:
    """Their parameters have a class of their own, and those of 16 bits a dtype in which their gradient is kept."""
    module, x = MODULES[name](6, 5, dtype=dtype), normal(7, 6, dtype, 1)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    found = []
    for call in (module, compiled):
        module.zero_grad()
        c = call(x)
        c.float().square().sum().backward()
        found.append((c, *(p.grad for p in module.parameters())))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize(("backend", "dynamic"), [("inductor", True), ("aot_eager", None)])
def test_compiles_to_one_graph(backend: str, dynamic: bool | None) -> None:
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    compiled = torch.compile(ours, fullgraph=True, dynamic=dynamic, backend=counter)
    for size in (3, 7, 8):
        operands = leaves(size)
        value, expected = compiled(*operands), theirs(*operands)
        assert_close(value, expected)
        grads = [torch.autograd.grad(c.pow(2).sum(), operands) for c in (value, expected)]
        assert_close(*grads)
    assert counter.frame_count == {None: 2, True: 1}[dynamic]


def test_graphs_hold_the_operators() -> None:
    graphs: dict[str, list[Any]] = {"forward": [], "backward": []}

    def keep(name: str) -> Callable[..., Any]:
        def compiler(graph: Any, _: Any) -> Any:
            graphs[name] += [node.target for node in graph.graph.nodes if node.op == "call_function"]
            return make_boxed_func(graph.forward)

        return compiler

    backend = torch._dynamo.backends.common.aot_autograd(fw_compiler=keep("forward"), bw_compiler=keep("backward"))
    x, w, bias, b = leaves(3)
    compiled = torch.compile(
        lambda *y: matmul_grad.bmm(matmul_grad.linear(*y[:3]), y[3]), fullgraph=True, backend=backend
    )
    compiled(x, w, bias, b).sum().backward()
    assert [graphs["forward"].count(op) for op in (OPERATORS.addmm.default, OPERATORS.bmm.default)] == [1, 1]
    assert [graphs["backward"].count(op) for op in (OPERATORS.mm.default, OPERATORS.bmm.default)] == [2, 2]
    aten = torch.ops.aten
    assert not {aten.mm.default, aten.addmm.default, aten.bmm.default} & {*graphs["forward"], *graphs["backward"]}


OPERANDS = {
    "mm": ((3, 4), (4, 2)),
    "bmm": ((2, 3, 4), (2, 4, 2)),
    "addmm": ((2,), (3, 4), (4, 2)),
    "baddbmm": ((3, 2), (2, 3, 4), (2, 4, 2)),
    "matmul": ((2, 3, 4), (4, 2)),
    "linear": ((3, 4), (2, 4), (2,)),
}


@pytest.mark.parametrize("name", OPERANDS)
def test_transforms(name: str) -> None:
    """Gradients and tangents of transforms inside of compiled code are right, and not zero."""
    shapes = OPERANDS[name]
    operands = [draw(*shape, seed=i) for i, shape in enumerate(shapes)]
    every = tuple(range(len(operands)))

    def transforms(call: Callable[..., Tensor]) -> Callable[..., Any]:
        def loss(*x: Tensor) -> Tensor:
            return call(*x).sin().sum()

        def all_of_them(*x: Tensor) -> Any:
            first = torch.func.grad(loss, every)(*x)
            twice = torch.func.grad(lambda *y: torch.func.grad(loss, every)(*y)[-1].sum(), every)(*x)
            batch = torch.func.vmap(torch.func.grad(loss, every), (0, *[None] * (len(x) - 1)))(
                torch.stack([x[0]] * 3), *x[1:]
            )
            return first, twice, torch.func.jvp(call, x, tuple(y.cos() for y in x)), batch

        return all_of_them

    call = nn.functional.linear if name == "linear" else getattr(torch, name)
    expected = transforms(call)(*operands)
    compiled = torch.compile(transforms(getattr(matmul_grad, name)), fullgraph=True, backend="aot_eager")
    assert_close(compiled(*operands), expected)
    assert all(x.abs().sum() > 0 for x in expected[0])


@pytest.mark.parametrize("name", ["mm", "addmm", "matmul"])
def test_out(name: str) -> None:
    a, b, out = draw(3, 4), draw(4, 2), torch.zeros(3, 2, dtype=DOUBLE)
    operands = (draw(2), a, b) if name == "addmm" else (a, b)
    compiled = torch.compile(getattr(matmul_grad, name), fullgraph=True, backend="aot_eager")
    assert compiled(*operands, out=out) is out
    assert_close(out, getattr(torch, name)(*operands))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), matmul_grad.Linear(5, 4, bias=False)).double()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return matmul_grad.bmm(self.layers(x), y) + matmul_grad.matmul(x, x.mT).sum()


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # PyTorch's, of torch
@pytest.mark.filterwarnings("ignore:The given buffer is not writable:UserWarning")  # torch.export's, of its own file
def test_export_through_a_file() -> None:
    model = matmul_grad.convert(Model())
    batch, rows = torch.export.Dim("batch", min=2), torch.export.Dim("rows", min=2)
    shapes = {"x": {0: batch, 1: rows}, "y": {0: batch}}
    program = torch.export.export(model, (draw(2, 5, 6), draw(2, 4, 3)), dynamic_shapes=shapes)
    saved = io.BytesIO()
    torch.export.save(program, saved)
    saved.seek(0)
    loaded = torch.export.load(saved)
    targets = {node.target for node in loaded.graph.nodes if node.op == "call_function"}
    assert targets >= {OPERATORS.addmm.default, OPERATORS.mm.default, OPERATORS.bmm.default}
    for size in ((2, 5), (3, 2), (7, 9)):
        x, y = draw(*size, 6), draw(size[0], 4, 3)
        with matmul_grad.strict():
            assert_close(loaded.module()(x, y), model(x, y))
    decomposed = {node.target for node in loaded.run_decompositions().graph.nodes if node.op == "call_function"}
    assert torch.ops.aten.addmm.default in decomposed and OPERATORS.addmm.default not in decomposed
