"""Linear, convert and restore: the same module in all but what computes it, and back."""

import logging
from types import SimpleNamespace
from typing import Any

import processes
import pytest
import torch
from small_models import NAMES, Mlp, counted, everything, seeded, step, strictly
from torch import Tensor, nn

import matmul_grad
from matmul_grad.layers import MARK
from matmul_grad.testing import assert_same_bits

# --- the module ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("named", [{}, {"bias": False}, {"dtype": torch.float64}, {"device": "meta"}], ids=str)
def test_linear_matches_torch_module(named: dict[str, Any]) -> None:
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


def test_reset_parameters_draws_the_same_numbers_as_torch() -> None:
    ours, theirs = matmul_grad.Linear(7, 5), nn.Linear(7, 5)
    for layer in (ours, theirs):
        torch.manual_seed(3)
        layer.reset_parameters()
    assert_same_bits(ours.weight.detach(), theirs.weight.detach())


def test_on_meta_and_then_on_cpu() -> None:
    layer = nn.utils.skip_init(matmul_grad.Linear, 4, 3)
    assert type(layer) is matmul_grad.Linear
    assert layer.weight.device.type == "cpu"


# --- convert and restore -------------------------------------------------------------------------------------


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


def test_convert_logs_what_it_swaps(caplog: pytest.LogCaptureFixture) -> None:
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


def test_another_forward_is_not_converted_and_the_reason_is_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
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


def test_a_subclass_with_torch_forward_is_converted() -> None:
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


# --- forwards that are wrapped -------------------------------------------------------------------------------


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
    done = processes.run(code)
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


def test_the_forward_of_a_converted_class_takes_objects_of_other_classes() -> None:
    """``nn.Linear.forward(self, x)`` as a borrowed method, and on a stand-in that is no module."""

    class Borrower(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.ones(2, 4)), None

        def forward(self, x: Tensor) -> Tensor:
            return nn.Linear.forward(self, x)  # type: ignore[arg-type]

    matmul_grad.convert(nn.Linear(2, 2))
    x = torch.ones(3, 4)
    assert Borrower()(x).tolist() == [[4.0, 4.0]] * 3
    stand_in: Any = SimpleNamespace(weight=torch.ones(2, 4), bias=None)
    assert nn.Linear.forward(stand_in, x).tolist() == [[4.0, 4.0]] * 3
    assert torch.compile(Borrower(), backend="eager", fullgraph=True)(x).tolist() == [[4.0, 4.0]] * 3
