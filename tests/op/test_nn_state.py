"""A converted model keeps hooks, parametrizations, optimizer, copies, pickles and state, and compiles as before."""

import copy
import io
import pickle
from typing import Any

import processes
import pytest
import torch
from small_models import Mlp, counted, everything, seeded, step, strictly
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import matmul_grad
from matmul_grad.testing import assert_same_bits

compiles = pytest.mark.filterwarnings("ignore:.*torch.jit.*")


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
    done = processes.run(code)
    assert done.stdout == "['0'] {'linear': {'float32': 1}}\n", done.stderr


def test_state_dict_is_the_same_as_torchs(tmp_path: Any) -> None:
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


def test_import_replaces_nothing_and_an_unmarked_layer_runs_torch_forward() -> None:
    code = (
        "import torch; before = torch.nn.Linear.forward\nimport matmul_grad\n"
        "print(torch.nn.Linear.forward is before)\nmatmul_grad.convert(torch.nn.Linear(2, 3))\n"
        "torch.nn.Linear(2, 3)(torch.ones(1, 2))\n"
        "print(matmul_grad.nn.calls(), torch.nn.Linear.forward.__wrapped__ is before)"
    )
    done = processes.run(code)
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
