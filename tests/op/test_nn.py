"""Linear, convert and restore: the same module in all but what computes it, and back."""

import copy
import io
import logging
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from limits import scaled
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils._python_dispatch import TorchDispatchMode

import matmul_grad
from matmul_grad.layers import MARK
from matmul_grad.testing import assert_same_bits

compiles = pytest.mark.filterwarnings("ignore:.*torch.jit.*")


class Mlp(nn.Module):
    """Layers by names, in lists, without bias, one used twice, and tied weights."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(8, 8, bias=False), nn.GELU()) for _ in range(2)])
        self.again = self.first
        self.embedding = nn.Embedding(5, 8)
        self.head = nn.Linear(8, 5, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.again(x[..., :6]))


NAMES = ["first", "blocks.0.0", "blocks.1.0", "head"]


def seeded(make: Callable[..., nn.Module], *arguments: Any, **named: Any) -> Any:
    torch.manual_seed(0)
    return make(*arguments, **named)


def step(model: nn.Module, *inputs: Tensor) -> list[Tensor]:
    """The result, and the gradient of every parameter."""
    model.zero_grad()
    c = model(*inputs)
    c.sin().sum().backward()
    return [c.detach(), *(x.grad for x in model.parameters())]


def strictly(model: nn.Module, *inputs: Tensor) -> list[Tensor]:
    with matmul_grad.strict():
        return step(model, *inputs)


class counted(TorchDispatchMode):  # reads as the function of a block
    """The products of a block, by the names of their operators: this package's, and aten's."""

    def __init__(self) -> None:
        super().__init__()
        self.ours: list[str] = []
        self.theirs: list[str] = []

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = operator.name().split("::")[1].split(".")[0]
        if operator.namespace == "matmul_grad":
            self.ours.append(name)
        elif name in ("mm", "addmm", "_native_multi_head_attention", "_transformer_encoder_layer_fwd"):
            self.theirs.append(name)
        return operator(*args, **(kwargs or {}))


def everything(model: nn.Module) -> dict[str, Any]:
    """Each module with its class and all that it holds but the mark of ``convert``, by identity."""
    modules = model.named_modules(remove_duplicate=False)
    return {name: (type(module), {k: v for k, v in vars(module).items() if k != MARK}) for name, module in modules}


# --- the module ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("named", [{}, {"bias": False}, {"dtype": torch.float64}, {"device": "meta"}], ids=str)
def test_linear_is_torchs_module(named: dict[str, Any]) -> None:
    ours, theirs = seeded(matmul_grad.Linear, 7, 5, **named), seeded(nn.Linear, 7, 5, **named)
    assert isinstance(ours, nn.Linear)
    assert repr(ours) == repr(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert (one.dtype, one.device, one.shape) == (other.dtype, other.device, other.shape)
        if one.device.type != "meta":
            assert_same_bits(one.detach(), other.detach())
    ours.load_state_dict(theirs.state_dict(), assign=True)
    if named.get("device") != "meta":
        x = torch.randn(2, 3, 7, dtype=named.get("dtype"))
        torch.testing.assert_close(strictly(ours, x), step(theirs, x))


def test_a_layer_that_is_reset_draws_as_torchs() -> None:
    ours, theirs = matmul_grad.Linear(7, 5), nn.Linear(7, 5)
    for layer in (ours, theirs):
        torch.manual_seed(3)
        layer.reset_parameters()
    assert_same_bits(ours.weight.detach(), theirs.weight.detach())


def test_on_meta_and_then_on_cpu() -> None:
    layer = nn.utils.skip_init(matmul_grad.Linear, 4, 3)
    assert type(layer) is matmul_grad.Linear
    assert layer.weight.device.type == "cpu"


# --- convert and restore ------------------------------------------------------------------------------------


def test_convert_swaps_in_place_and_restore_undoes_it() -> None:
    model = seeded(Mlp).eval()
    x, before, shown, state = torch.randn(3, 6), everything(model), repr(model), list(model.state_dict())
    expected = step(model, x)
    assert matmul_grad.convert(model) is model
    assert matmul_grad.converted(model) == NAMES
    torch.testing.assert_close(strictly(model, x), expected)
    assert everything(model) == before
    assert repr(model) == shown
    assert list(model.state_dict()) == state
    assert model.head.weight is model.embedding.weight
    assert model.again is model.first
    assert matmul_grad.convert(model) is model  # twice is once
    assert matmul_grad.restore(model) is model
    assert everything(model) == before
    assert all(MARK not in vars(module) for module in model.modules())
    assert matmul_grad.converted(model) == []
    torch.testing.assert_close(step(model, x), expected, rtol=0, atol=0)
    assert everything(matmul_grad.restore(model)) == before


def test_it_says_what_it_swaps(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="matmul_grad"):
        matmul_grad.convert(seeded(Mlp))
        matmul_grad.convert(nn.Linear(2, 3))
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        *(f"converted {name}" for name in NAMES), "converted the model"
    ]  # fmt: skip


def test_filter_is_asked_of_each_module_by_name() -> None:
    model, asked = seeded(Mlp), []

    def wanted(module: nn.Module, name: str) -> bool:
        asked.append((name, model.get_submodule(name) is module))
        return name.startswith("blocks")

    matmul_grad.convert(model, filter=wanted)
    assert asked == [(name, True) for name in NAMES]
    assert matmul_grad.converted(model) == ["blocks.0.0", "blocks.1.0"]
    assert type(model.first) is type(model.head) is nn.Linear


def test_a_forward_that_is_not_torchs_is_left_out_with_the_reason(caplog: pytest.LogCaptureFixture) -> None:
    class Special(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1

    replaced = nn.Linear(3, 3)
    replaced.forward = lambda x: x  # type: ignore[method-assign]
    bound_elsewhere = nn.Linear(3, 3)
    bound_elsewhere.forward = nn.Linear(3, 3).forward  # type: ignore[method-assign]
    model = nn.Sequential(Special(3, 3), nn.Bilinear(3, 3, 3), replaced, matmul_grad.Linear(3, 3), bound_elsewhere)
    before = everything(model)
    matmul_grad.convert(model)
    assert everything(model) == before
    assert matmul_grad.converted(model) == []
    assert list(matmul_grad.nn.left_out(model)) == ["0", "2", "4"]
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    for part in ("3 of the model's", "Special has a forward of its own", "2: its forward was replaced"):
        assert part in record.getMessage()
    caplog.clear()
    matmul_grad.convert(model, filter=lambda module, name: name == "1")
    assert not caplog.records, "what the caller leaves out"


def test_a_subclass_with_torchs_forward_is_converted() -> None:
    class Mixin:
        def extra_repr(self) -> str:
            return "mixed"

    class Mixed(Mixin, nn.Linear):
        pass

    model, x = nn.Sequential(Mixed(4, 3)), torch.randn(2, 4)
    expected, before = step(model, x), everything(model)
    assert matmul_grad.converted(matmul_grad.convert(model)) == ["0"]
    torch.testing.assert_close(strictly(model, x), expected)
    assert everything(model) == before == everything(matmul_grad.restore(model))


def test_lazy_layers_are_converted_before_they_materialise() -> None:
    model = matmul_grad.convert(nn.Sequential(nn.LazyLinear(3)))
    assert matmul_grad.converted(model) == ["0"]
    with matmul_grad.strict(), counted() as calls:
        assert model(torch.randn(2, 5)).shape == (2, 3)
    assert type(model[0]) is nn.Linear
    assert matmul_grad.converted(model) == ["0"]
    assert calls.ours == ["addmm"]


# --- forwards that are wrapped ------------------------------------------------------------------------------


def test_a_forward_that_was_wrapped_and_unwrapped_is_converted() -> None:
    """What accelerate's remove_hook_from_module leaves behind, from before and after the first ``convert``."""
    model, x = nn.Sequential(nn.Linear(4, 3), nn.MultiheadAttention(4, 2)), torch.randn(2, 4)
    for module in model:
        module.forward = module.forward  # type: ignore[method-assign]
    assert matmul_grad.converted(matmul_grad.convert(model)) == ["0", "1"]
    with counted() as calls:
        model[0](x)
    assert calls.ours == ["addmm"]
    code = (
        "import torch, matmul_grad; layer = torch.nn.Linear(2, 3); layer.forward = layer.forward\n"
        "print(matmul_grad.converted(matmul_grad.convert(layer)))\n"
        "layer(torch.ones(1, 2)); print(matmul_grad.nn.calls())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=scaled(120))
    assert done.stdout == "['']\n{'linear': {'float32': 1}}\n", done.stderr


def test_a_forward_that_is_wrapped_after_convert_follows_restore() -> None:
    layer, x = matmul_grad.convert(nn.Linear(4, 3)), torch.randn(2, 4)
    inner = layer.forward
    layer.forward = lambda x: inner(x) * 2  # type: ignore[method-assign]
    with counted() as calls:
        doubled = layer(x)
    assert calls.ours == ["addmm"]
    matmul_grad.restore(layer)
    with counted() as calls:
        torch.testing.assert_close(layer(x), doubled)
    assert calls.ours == []
    del layer.forward
    torch.testing.assert_close(layer(x) * 2, doubled)


# --- what stays ---------------------------------------------------------------------------------------------


def test_hooks_stay() -> None:
    model, seen = nn.Sequential(nn.Linear(4, 3)), []
    handle = model[0].register_forward_hook(lambda module, args, out: seen.append("forward") or out * 2)
    model[0].register_forward_pre_hook(lambda module, args: seen.append("before"))
    model[0].register_full_backward_hook(lambda module, grads, out: seen.append("backward"))
    x = torch.randn(2, 4, requires_grad=True)
    expected = step(model, x)
    seen.clear()
    torch.testing.assert_close(strictly(matmul_grad.convert(model), x), expected)
    assert seen == ["before", "forward", "backward"]
    handle.remove()
    torch.testing.assert_close(model(x) * 2, expected[0])


@pytest.mark.parametrize("parametrization", ["weight_norm", "spectral_norm", "orthogonal"])
def test_parametrizations_stay(parametrization: str) -> None:
    model, x = nn.Sequential(nn.Linear(4, 3)), torch.randn(2, 4)
    getattr(parametrizations, parametrization)(model[0])
    model.eval()
    before, kind, expected = everything(model), type(model[0]), step(model, x)
    shared = copy.deepcopy(model)
    torch.testing.assert_close(strictly(matmul_grad.convert(model), x), expected)
    assert matmul_grad.converted(model) == ["0"]
    assert repr(model) == repr(shared)
    assert type(shared[0]) is type(model[0]) is kind
    assert matmul_grad.converted(shared) == []
    assert parametrize.is_parametrized(model[0], "weight")
    torch.testing.assert_close(strictly(copy.deepcopy(model), x), expected)
    matmul_grad.restore(model)
    assert everything(model).keys() == before.keys()
    assert type(model[0]) is kind
    torch.testing.assert_close(step(model, x), expected, rtol=0, atol=0)
    parametrize.remove_parametrizations(matmul_grad.convert(model)[0], "weight")
    torch.testing.assert_close(strictly(model, x)[0], expected[0])
    assert type(matmul_grad.restore(model)[0]) is nn.Linear


def test_parametrized_after_it_was_converted() -> None:
    model, x = matmul_grad.convert(nn.Sequential(nn.Linear(4, 3))), torch.randn(2, 4)
    parametrizations.weight_norm(model[0])
    expected = strictly(model, x)
    assert matmul_grad.converted(matmul_grad.restore(model)) == []
    assert type(model[0]).__bases__ == (nn.Linear,)
    torch.testing.assert_close(step(model, x), expected)


def test_the_optimizer_and_the_mode_stay() -> None:
    model, x = seeded(Mlp), torch.randn(3, 6)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    twin = copy.deepcopy(model)
    others = torch.optim.SGD(twin.parameters(), lr=0.5)
    matmul_grad.convert(model)
    for one, by in ((model, optimizer), (twin, others)):
        step(one, x)
        by.step()
    torch.testing.assert_close(list(model.parameters()), list(twin.parameters()))
    assert model.training
    assert not matmul_grad.convert(nn.Linear(2, 2).eval()).training
    assert matmul_grad.convert(nn.Linear(2, 2).to("meta").half()).weight.device.type == "meta"


@pytest.mark.parametrize(
    "model", [matmul_grad.Linear(6, 5), matmul_grad.convert(seeded(Mlp))], ids=["Linear", "converted"]
)
def test_copies(model: nn.Module) -> None:
    x = torch.randn(3, 6)
    expected, kinds = strictly(model, x), [type(module) for module in model.modules()]
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(saved, weights_only=False)):
        assert [type(module) for module in twin.modules()] == kinds
        assert_same_bits(strictly(twin, x)[0], expected[0])
        assert matmul_grad.converted(twin) == matmul_grad.converted(model)
        assert matmul_grad.converted(matmul_grad.restore(twin)) == []
    assert matmul_grad.converted(model) == matmul_grad.converted(copy.copy(model))


def test_a_pickle_is_read_by_a_fresh_process(tmp_path: Any) -> None:
    """It is converted there too, although nothing there has imported this package."""
    path = tmp_path / "model.pt"
    torch.save(matmul_grad.convert(nn.Sequential(nn.Linear(2, 3))), path)
    code = f"import torch; model = torch.load({str(path)!r}, weights_only=False); model(torch.ones(1, 2))\n"
    code += "import matmul_grad; print(matmul_grad.converted(model), matmul_grad.nn.calls())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=scaled(120))
    assert done.stdout == "['0'] {'linear': {'float32': 1}}\n", done.stderr


def test_a_state_dict_is_torchs(tmp_path: Any) -> None:
    model, path = matmul_grad.convert(seeded(Mlp)), tmp_path / "state.pt"
    torch.save(model.state_dict(), path)
    plain = Mlp()
    plain.load_state_dict(torch.load(path, weights_only=True))
    x = torch.randn(3, 6)
    torch.testing.assert_close(plain(x), model(x))


def test_a_clone_of_the_attributes_computes_by_its_own_weight() -> None:
    """As torch's DataParallel and libraries of meta-learning clone modules, to put other tensors for parameters."""
    layer, x = matmul_grad.convert(nn.Linear(4, 3)), torch.randn(2, 4)
    for clone in (copy.copy(layer), layer._replicate_for_data_parallel()):
        clone._parameters = {}
        clone.weight, clone.bias = torch.ones(3, 4), torch.zeros(3)  # type: ignore[assignment]
        with counted() as calls:
            assert_same_bits(clone(x), matmul_grad.linear(x, torch.ones(3, 4), torch.zeros(3)))
        assert calls.ours == ["addmm", "addmm"]


def test_import_replaces_nothing_and_an_unmarked_layer_runs_torchs_forward() -> None:
    code = (
        "import torch; before = torch.nn.Linear.forward\nimport matmul_grad\n"
        "print(torch.nn.Linear.forward is before)\nmatmul_grad.convert(torch.nn.Linear(2, 3))\n"
        "torch.nn.Linear(2, 3)(torch.ones(1, 2))\n"
        "print(matmul_grad.nn.calls(), torch.nn.Linear.forward.__wrapped__ is before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=scaled(120))
    assert done.stdout == "True\n{} True\n", done.stderr


@compiles
@pytest.mark.parametrize("dynamic", [None, True], ids=["automatic", "dynamic"])
def test_compiled_model(dynamic: bool | None) -> None:
    torch._dynamo.reset()
    model = seeded(Mlp)
    expected = [step(model, torch.ones(size, 6)) for size in (3, 5)]
    compiled = torch.compile(matmul_grad.convert(model), fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for size, theirs in zip((3, 5), expected, strict=True):
        torch.testing.assert_close(step(compiled, torch.ones(size, 6)), theirs)
    torch._dynamo.reset()


@compiles
def test_compiled_code_follows_convert_and_restore() -> None:
    torch._dynamo.reset()
    layer, x, graphs = nn.Linear(4, 3), torch.randn(2, 4), []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(" ".join(str(node.target) for node in graph.graph.nodes))
        return graph

    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    expected = compiled(x)
    torch.testing.assert_close(matmul_grad.convert(compiled)(x), expected)
    matmul_grad.restore(compiled)(x)
    assert ["matmul_grad" in graph for graph in graphs] == [False, True]
    torch._dynamo.reset()


def test_calls_are_counted_by_dtype() -> None:
    layer = matmul_grad.convert(nn.Linear(4, 3, dtype=torch.bfloat16))
    before = matmul_grad.nn.calls().get("linear", {}).get("bfloat16", 0)
    layer(torch.ones(2, 4, dtype=torch.bfloat16))
    assert matmul_grad.nn.calls()["linear"]["bfloat16"] - before == 1
    matmul_grad.restore(layer)(torch.ones(2, 4, dtype=torch.bfloat16))
    assert matmul_grad.nn.calls()["linear"]["bfloat16"] - before == 1
