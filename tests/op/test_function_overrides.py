"""Subclasses, modes and tracers get torch's function; plain tensors, and subclasses that change nothing, run here."""

from typing import Any

import pytest
import torch
from calls import CALLS, LINEAR, Seen, ones
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import matmul_grad


class Functions(TorchFunctionMode):
    """The functions that were called."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(function)
        return function(*args, **(kwargs or {}))


class Overriding(Tensor):
    """Answers every function by its name."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function


class Tagged(Tensor):
    """A subclass that changes nothing."""


class AtenOnly(Tensor):
    """A wrapper that knows aten's operators, by their unwrapped operands, and no other."""

    inner: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor) -> "AtenOnly":
        made = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op.namespace != "aten":
            raise NotImplementedError(op)
        unwrapped = [x.inner if isinstance(x, AtenOnly) else x for x in args]
        return op(*unwrapped, **(kwargs or {}))


@pytest.mark.parametrize("name", CALLS)
def test_overriding_subclass_gets_torch_function(name: str) -> None:
    operands, theirs = CALLS[name]
    for place in range(len(operands)):
        given = [x.as_subclass(Overriding) if i == place else x for i, x in enumerate(operands)]
        with matmul_grad.strict():  # the call is the subclass's, and no fallback
            assert getattr(matmul_grad, name)(*given) is theirs, place


@pytest.mark.parametrize("name", CALLS)
def test_out_of_a_subclass_gets_torch_function(name: str) -> None:
    operands, theirs = CALLS[name]
    if name != "linear":
        assert getattr(matmul_grad, name)(*operands, out=ones(1).as_subclass(Overriding)) is theirs


@pytest.mark.parametrize("name", CALLS)
def test_wrapper_that_knows_aten_alone(name: str) -> None:
    operands, theirs = CALLS[name]
    for place in range(len(operands)):
        given = [AtenOnly(x) if i == place else x for i, x in enumerate(operands)]
        with matmul_grad.strict():
            torch.testing.assert_close(getattr(matmul_grad, name)(*given), theirs(*operands))


@pytest.mark.parametrize("name", CALLS)
def test_subclass_that_changes_nothing_runs_here(name: str) -> None:
    operands, theirs = CALLS[name]
    with matmul_grad.strict(), Seen() as seen:
        result = getattr(matmul_grad, name)(*(x.as_subclass(Tagged) for x in operands))
    assert type(result) is Tagged
    assert seen.ours
    torch.testing.assert_close(result.as_subclass(Tensor), theirs(*operands))


@pytest.mark.parametrize("name", CALLS)
def test_mode_sees_torch_function_alone(name: str) -> None:
    operands, theirs = CALLS[name]
    with Functions() as mode:
        getattr(matmul_grad, name)(*operands)
    assert mode.seen == [theirs]


@pytest.mark.parametrize("name", CALLS)
def test_default_device_does_not_cost_the_kernels(name: str) -> None:
    operands, _ = CALLS[name]
    with torch.device("cpu"), matmul_grad.strict(), Seen() as seen:
        getattr(matmul_grad, name)(*operands)
    assert len(seen.ours) == 1


@pytest.mark.parametrize("name", CALLS)
def test_symbolic_trace_is_one_node(name: str) -> None:
    operands, theirs = CALLS[name]
    names = "xyz"[: len(operands)]
    function = eval(f"lambda {', '.join(names)}: ours({', '.join(names)})", {"ours": getattr(matmul_grad, name)})
    graph = torch.fx.symbolic_trace(function)
    assert [node.target for node in graph.graph.nodes if node.op == "call_function"] == [theirs]
    torch.testing.assert_close(graph(*operands), theirs(*operands))


def test_symbolic_trace_of_mm_backward() -> None:
    graph = torch.fx.symbolic_trace(lambda g, a, b: matmul_grad.mm_backward(g, a, b))
    operands = ones(3, 2), ones(3, 4), ones(4, 2)
    torch.testing.assert_close(graph(*operands), matmul_grad.mm_backward(*operands))
    with pytest.raises(TypeError):
        matmul_grad.mm_backward(operands[0], 3, operands[2])  # type: ignore[arg-type]


def test_weight_that_knows_linear_alone() -> None:
    """As torchao's: a wrapper around integers which overrides linear, and nothing else."""

    class Packed(Tensor):
        codes: Tensor

        @staticmethod
        def __new__(cls, codes: Tensor) -> "Packed":
            made = torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)
            made.codes = codes
            return made

        @classmethod
        def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function is LINEAR:
                return LINEAR(args[0], args[1].codes.float() / 16, *args[2:], **(kwargs or {}))
            with torch._C.DisableTorchFunctionSubclass():
                return function(*args, **(kwargs or {}))

        @classmethod
        def __torch_dispatch__(cls, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if op is torch.ops.aten.detach.default:
                return args[0]
            raise NotImplementedError(op)

    layer = nn.Linear(8, 5)
    layer.weight = nn.Parameter(Packed(torch.randint(-9, 9, (5, 8), dtype=torch.int8)), requires_grad=False)
    x = torch.randn(3, 8)
    expected = layer(x)
    torch.testing.assert_close(matmul_grad.convert(layer)(x), expected)
