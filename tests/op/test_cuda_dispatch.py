"""A product on a GPU that nothing records is dispatched once; on meta tensors that pass for CUDA tensors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from matmul_grad import activations, autograd, cuda, ops
from matmul_grad.kernels.gpu import launch


class Subclass(Tensor):
    pass


class Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Which way each product came."""
    ways: list[str] = []

    def way(name: str, like: int) -> Any:
        return lambda *operands, **scales: ways.append(name) or operands[like].new_empty(3, 3)

    with monkeypatch.context() as patched:
        patched.setattr(Tensor, "is_cuda", property(lambda self: True), raising=False)
        patched.setattr(launch, "supports", lambda _: True)
        patched.setattr(cuda, "status", lambda: "off")
        patched.setattr(ops, "compute", way("direct", 0))
        patched.setattr(autograd, "forward_only", way("dispatched", 0))
        patched.setattr(autograd, "addition_forward_only", way("dispatched", 0))
        yield ways


def matrix(**more: Any) -> Tensor:
    return torch.empty(3, 3, device="meta", **more)


@pytest.mark.parametrize("name", ["mm", "addmm"])
def test_plain_operands_are_dispatched_once(name: str, computed: list[str]) -> None:
    call, count = autograd.make_autograd_kernel(name), 3 if name == "addmm" else 2
    call(*[matrix() for _ in range(count)])
    with torch.no_grad():
        call(*[torch.nn.Parameter(matrix()) for _ in range(count)])
    assert computed == ["direct", "direct"]


@pytest.mark.parametrize("name", ["mm", "addmm"])
def test_what_the_dispatcher_has_more_to_do_with_is_dispatched(name: str, computed: list[str]) -> None:
    call, count = autograd.make_autograd_kernel(name), 3 if name == "addmm" else 2
    others = (
        matrix().as_subclass(Subclass),
        torch._neg_view(matrix()),
        torch._efficientzerotensor((3, 3), device="meta"),
    )
    for other in others:
        for place in range(count):
            operands = [matrix() for _ in range(count)]
            operands[place] = other
            call(*operands)
    with Mode():
        call(*[matrix() for _ in range(count)])
    assert computed == ["dispatched"] * (3 * count + 1)


def test_native_entry_is_reached_by_the_dispatcher(computed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "status", lambda: "")
    autograd.make_autograd_kernel("mm")(matrix(), matrix())
    assert computed == ["dispatched"]


@pytest.mark.usefixtures("computed")
def test_an_activation_is_applied_where_the_product_is_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    epilogues: list[launch.Epilogue] = []

    def addmm(a: Tensor, b: Tensor, epilogue: launch.Epilogue) -> Tensor:
        epilogues.append(epilogue)
        return a.new_empty(a.shape[0], b.shape[1])

    monkeypatch.setattr(launch, "addmm", addmm)
    bias = matrix()[0]
    activations._forward(None, matrix(), matrix(), "gelu")
    _, pre = activations._forward_and_keep(bias, matrix(), matrix(), "silu")
    assert epilogues[0] == launch.Epilogue(1, 1, None, "gelu", None)
    assert epilogues[1].activation == "silu" and epilogues[1].source is bias and epilogues[1].pre is pre


@pytest.mark.usefixtures("computed")
def test_an_activation_falls_back_where_nothing_can_be_built(monkeypatch: pytest.MonkeyPatch) -> None:
    def addmm(*_: Any) -> Tensor:
        raise launch.CannotBuild("no compiler")

    monkeypatch.setattr(launch, "addmm", addmm)
    result, pre = activations._forward_and_keep(None, matrix(), matrix(), "gelu")
    assert result.shape == pre.shape == (3, 3) and result is not pre
