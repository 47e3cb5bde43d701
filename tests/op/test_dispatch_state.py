"""What stands between a call and its kernel: convolutions go past the dispatcher only where it has nothing to do."""

import contextlib
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch_warnings import PROFILER

import matmul_grad
from matmul_grad import dispatch_state
from matmul_grad.dispatch_state import is_idle


class Subclass(Tensor):
    pass


class Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def operands() -> tuple[Tensor, Tensor]:
    return torch.ones(1, 2, 5), torch.ones(3, 2, 3)


STATES: dict[str, Callable[[], Any]] = {
    "mode": Seen,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "profiler": lambda: torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]),
    "fake": FakeTensorMode,
    "below autograd": lambda: torch._C._AutoDispatchBelowAutograd(),
}


@PROFILER
@pytest.mark.parametrize("name", STATES)
def test_states_that_follow_a_call(name: str) -> None:
    x, w = operands()
    with STATES[name]():
        assert not is_idle(x, w)
    assert is_idle(x, w)


@pytest.mark.parametrize("state", [torch.no_grad, torch.inference_mode, torch.enable_grad, contextlib.nullcontext])
def test_states_that_do_not(state: Callable[[], Any]) -> None:
    with state():
        x, w = operands()
        assert is_idle(x, w) and is_idle(x, torch.nn.Parameter(w), w[:, 0, 0])


def test_operands_that_are_not_plain() -> None:
    x, w = operands()
    for other in (x.as_subclass(Subclass), torch._neg_view(x), torch._efficientzerotensor(x.shape)):
        assert not is_idle(other, w) and not is_idle(w, other) and not is_idle(w, w, other)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
def test_transforms_and_tracers_see_the_operator() -> None:
    found: list[bool] = []

    def convolve(x: Tensor, w: Tensor) -> Tensor:
        found.append(is_idle(x, w))
        return matmul_grad.conv1d(x, w)

    x, w = operands()
    torch.vmap(convolve, (0, None))(x.expand(3, 1, 2, 5), w)
    torch.func.grad(lambda x: convolve(x, w).sum())(x)
    torch.func.jvp(convolve, (x, w), (x, w))
    torch.func.functionalize(convolve)(x, w)
    graph = torch.fx.experimental.proxy_tensor.make_fx(convolve)(x, w).graph
    assert found == [False] * 5
    assert "matmul_grad.convolution.default" in [str(node.target) for node in graph.nodes]


def test_modes_and_profilers_see_the_operators_of_both_passes() -> None:
    x, w = (t.requires_grad_() for t in operands())
    with Seen() as seen:
        matmul_grad.conv1d(x, w).sum().backward()
    convolutions = [name for name in seen.names if name.startswith("matmul_grad::")]
    assert convolutions == [*["matmul_grad::convolution"] * 2, "matmul_grad::convolution_weight_gradient"]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        matmul_grad.conv1d(x, w)
    assert "matmul_grad::convolution" in [event.name for event in profile.events()]


def test_every_thread_is_idle_at_first() -> None:
    x, w = operands()
    found: list[bool] = []
    thread = threading.Thread(target=lambda: found.append(is_idle(x, w)))
    thread.start()
    thread.join()
    assert found == [True]


def test_without_threads_or_callbacks_calls_are_dispatched(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    x, w = operands()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        assert dispatch_state._idle_keys() == frozenset()
    with monkeypatch.context() as patch:
        patch.setattr(dispatch_state, "_has_callbacks", None)
        assert not is_idle(x, w)
        assert matmul_grad.conv1d(x, w).shape == (1, 3, 3)
