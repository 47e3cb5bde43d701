"""What docs/compilers.md says of AOTInductor, Inductor's C++ wrapper and CUDA graphs."""

import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from gpu_required import require_gpu
from limits import scaled
from switch import accelerated
from torch import Tensor, nn
from torch._inductor import config
from torch_warnings import PROFILER

import matmul_grad
from matmul_grad.testing import assert_same_bits, integers, normal

ROWS = torch.export.Dim("rows", min=2, max=64)
# torch's code for export and packages warns of what torch has deprecated.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.*"),
    pytest.mark.filterwarnings("ignore:TypedStorage:UserWarning"),
    PROFILER,
]


class Net(nn.Module):
    """A linear layer, a product and a batch of one, by torch's functions or by those of this package."""

    def __init__(self, functions: object) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.functions = functions
        self.layer, self.weight = nn.Linear(16, 8), nn.Parameter(torch.randn(8, 4))

    def forward(self, x: Tensor) -> Tensor:
        if self.functions is matmul_grad:
            hidden = matmul_grad.linear(x, self.layer.weight, self.layer.bias).relu()
            mixed = matmul_grad.mm(hidden, self.weight)
            return matmul_grad.bmm(mixed[None], mixed.t()[None])
        mixed = torch.mm(self.layer(x).relu(), self.weight)
        return torch.bmm(mixed[None], mixed.t()[None])


def packaged(net: Net, path: Path) -> str:
    """The network exported with any number of rows, compiled to a shared library in a file."""
    example = normal(5, 16, torch.float32)
    with torch.no_grad():
        program = torch.export.export(net, (example,), dynamic_shapes=({0: ROWS},))
        return torch._inductor.aoti_compile_and_package(program, package_path=str(path))


def operators_of(call: Callable[[], object]) -> set[str]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    return {event.key for event in profile.key_averages()}


LOAD = "import sys, torch\n{}\nprint(torch._inductor.aoti_load_package(sys.argv[1])(torch.ones(3, 16)).shape)"


@pytest.mark.slow
def test_aotinductor_calls_the_operators(tmp_path: Path) -> None:
    net = Net(matmul_grad).eval()
    path = packaged(net, tmp_path / "net.pt2")
    compiled = torch._inductor.aoti_load_package(path)
    for rows in (5, 9):
        x = normal(rows, 16, torch.float32, seed=rows)
        torch.testing.assert_close(compiled(x), net(x))
    with matmul_grad.strict():
        ran = operators_of(lambda: compiled(x))
    assert {"matmul_grad::addmm", "matmul_grad::mm", "matmul_grad::bmm"} <= ran

    def loaded(before: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", LOAD.format(before), path]
        return subprocess.run(command, capture_output=True, text=True, timeout=scaled(120), env=os.environ)

    assert loaded("import matmul_grad").stdout == "torch.Size([1, 3, 3])\n"
    assert "Could not find schema for matmul_grad::addmm" in loaded("").stderr


@pytest.mark.slow
def test_aotinductor_ignores_the_override(tmp_path: Path) -> None:
    net = Net(torch).eval()
    compiled = torch._inductor.aoti_load_package(packaged(net, tmp_path / "net.pt2"))
    x = normal(5, 16, torch.float32)
    before = accelerated().total()
    with matmul_grad.enabled():
        torch.testing.assert_close(compiled(x), net(x))
    assert accelerated().total() - before == 3, "those of the network itself, none of the compiled one"


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
def test_cpp_wrapper_ignores_the_override_and_calls_the_operators() -> None:
    x = normal(5, 16, torch.float32)
    with config.patch(cpp_wrapper=True), torch.no_grad():
        of_torch, of_ours = (torch.compile(Net(functions), fullgraph=True) for functions in (torch, matmul_grad))
        expected, ours = of_torch(x), of_ours(x)
        before = accelerated()
        with matmul_grad.enabled():
            assert_same_bits(of_torch(x), expected)
        assert accelerated() == before
        ran = operators_of(lambda: of_ours(x))
    torch.testing.assert_close(ours, expected)
    assert {"matmul_grad::addmm", "matmul_grad::mm", "matmul_grad::bmm"} <= ran


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
def test_max_autotune_calls_the_operators_and_makes_batches_of_aten_its_own() -> None:
    x = normal(5, 16, torch.float32).requires_grad_()
    of_torch, of_ours = (
        torch.compile(Net(functions), fullgraph=True, mode="max-autotune") for functions in (torch, matmul_grad)
    )
    expected = of_torch(x)
    expected.sum().backward()
    before = accelerated()
    with matmul_grad.enabled():
        switched = of_torch(x)
        switched.sum().backward()
    after = accelerated()
    assert (after["mm"] - before["mm"], after["addmm"] - before["addmm"]) == (5, 1)
    assert after["bmm"] - before["bmm"] <= 3, "some are templates of Inductor's, as it finds them faster"
    of_ours(x).sum().backward()
    ran = operators_of(lambda: of_ours(x).sum().backward())
    torch.testing.assert_close((switched, of_ours(x)), (expected, expected))
    assert {"matmul_grad::addmm", "matmul_grad::mm", "matmul_grad::bmm"} <= ran
    assert not {"aten::mm", "aten::bmm", "aten::addmm"} & ran


# --- CUDA graphs ---------------------------------------------------------------------------------------------


@pytest.fixture
def cuda() -> torch.device:
    return require_gpu()


def whole_model(device: torch.device) -> nn.Sequential:
    """Weights are small integers, so its products are exact and have the same bits whoever computes them."""
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 32, bias=False)).to(device)
    for seed, parameter in enumerate(model.parameters()):
        with torch.no_grad():
            parameter.copy_(integers(1, parameter.numel(), torch.float32, seed).view(parameter.shape))
    return model


def step(call: Callable[[Tensor], Tensor], model: nn.Module, x: Tensor) -> list[Tensor]:
    model.zero_grad(set_to_none=True)
    y = call(x)
    y.backward(torch.ones_like(y))
    return [y.detach().clone(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def assert_steps_are_torchs(call: Callable[[Tensor], Tensor], model: nn.Module, alone: nn.Module) -> None:
    for seed in (1, 2, 3, 4):  # compiled code warms up and records in the first two
        torch.compiler.cudagraph_mark_step_begin()
        x = integers(128, 64, torch.float32, seed).to(next(alone.parameters()).device)
        found, expected = step(call, model, x), step(alone, alone, x)
        assert len(found) == len(expected) == 4
        for one, other in zip(found, expected, strict=True):
            assert_same_bits(one.cpu() + 0.0, other.cpu() + 0.0)


@pytest.mark.gpu
@pytest.mark.parametrize("way", ["converted", "switched"])
def test_a_captured_training_step_replays_with_new_values(way: str, cuda: torch.device) -> None:
    model, alone = whole_model(cuda), whole_model(cuda)
    example = (torch.zeros(128, 64, device=cuda),)
    before = accelerated()["addmm"]
    with matmul_grad.strict(), matmul_grad.enabled() if way == "switched" else nullcontext():
        if way == "converted":
            matmul_grad.convert(model)
        graphed = torch.cuda.make_graphed_callables(model, example)
    assert way == "converted" or accelerated()["addmm"] > before
    assert_steps_are_torchs(graphed, model, alone)


@pytest.mark.gpu
@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_code_captures_its_own_graphs(cuda: torch.device) -> None:
    model = matmul_grad.convert(whole_model(cuda))
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    assert_steps_are_torchs(compiled, model, whole_model(cuda))
