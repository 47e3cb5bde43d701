"""From the Autograd key of ``mm`` straight to the kernel: for ordinary tensors alone, and never past anybody's turn."""

import textwrap
from collections.abc import Callable

import processes
import pytest
import torch
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import matmul_grad
from matmul_grad import ops
from matmul_grad.kernels.native import state
from matmul_grad.testing import assert_same_bits, integers

MM = torch.ops.matmul_grad.mm.default


def operands() -> tuple[Tensor, Tensor]:
    return integers(5, 7, torch.float32, seed=1), integers(7, 3, torch.float32, seed=2)


def test_the_keys_of_a_tensor_are_found_here() -> None:
    assert ops.native_status() == ""
    assert state.words[state.KEYS_AT] > 0
    keys = torch._C._dispatch_keys(torch.empty(1))
    assert state.words[state.PLAIN_KEYS] == keys.raw_repr()
    assert all(keys.has(key) for key in (torch._C.DispatchKey.CPU, torch._C.DispatchKey.AutogradCPU))


@pytest.mark.parametrize("first_call_in", ["FakeTensorMode()", "torch.inference_mode()", "torch.device('meta')"])
def test_modes_of_the_first_call_do_not_matter(first_call_in: str) -> None:
    code = f"""
        import torch, matmul_grad
        from torch._subclasses.fake_tensor import FakeTensorMode
        from matmul_grad.kernels.native import register, state
        with {first_call_in}:
            register._fill_state()
        assert state.words[state.PLAIN_KEYS] == torch._C._dispatch_keys(torch.empty(1)).raw_repr()
        """
    done = processes.run(textwrap.dedent(code))
    assert done.returncode == 0, done.stderr[-2000:]


class Between(torch.library.Library):
    """A kernel of one operator under ADInplaceOrView, between autograd and CPU, that takes note of its calls."""

    def __init__(self, name: str) -> None:
        super().__init__("matmul_grad", "IMPL")
        self.calls = 0
        operator = getattr(torch.ops.matmul_grad, name).default

        def note(keys: torch._C.DispatchKeySet, *operands: Tensor, **scales: float) -> Tensor:
            self.calls += 1
            return operator.redispatch(keys & torch._C._after_ADInplaceOrView_keyset, *operands, **scales)

        self.impl(name, note, "ADInplaceOrView", with_keyset=True)


@pytest.mark.parametrize("name", ["mm", "addmm", "bmm", "baddbmm"])
def test_plain_tensors_skip_to_the_kernel(name: str) -> None:
    operator = getattr(torch.ops.matmul_grad, name).default
    a, b = operands()
    if "bmm" in name:
        a, b = a.unsqueeze(0), b.unsqueeze(0)
    added = (torch.ones(3),) if "add" in name else ()
    expected = operator(*added, a, b)
    between = Between(name)
    try:
        assert_same_bits(operator(*added, a, b), expected)
        with torch.no_grad():
            assert_same_bits(operator(*added, a.requires_grad_(), b), expected)
        assert between.calls == 0
        operator(*added, torch._neg_view(a.detach()), b)
        assert between.calls == 1
    finally:
        between._destroy()


def functionalized(a: Tensor, b: Tensor) -> Tensor:
    """The mode of torch.compile: its tensors are wrapped, so the call is traced and the wrapper comes back."""
    with FunctionalTensorMode():
        wrapped = FunctionalTensor.to_functional(a), FunctionalTensor.to_functional(b)
        result = MM(*wrapped)
        assert isinstance(result, FunctionalTensor)
        return torch._from_functional_tensor(result.elem)


def noted(a: Tensor, b: Tensor) -> Tensor:
    class Note(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            self.seen += op is MM
            return op(*args, **(kwargs or {}))

    with Note() as note:
        result = MM(a, b)
    assert note.seen == 1
    return result


def negated(a: Tensor, b: Tensor) -> Tensor:
    """A view whose bit says that its memory holds the negative: it is resolved between autograd and CPU."""
    return -MM(torch._neg_view(a), b)


def traced(a: Tensor, b: Tensor) -> Tensor:
    graph = make_fx(torch.func.functionalize(lambda x, y: MM(x, y)))(a, b)
    assert [node.target for node in graph.graph.nodes if node.op == "call_function"] == [MM]
    return graph(a, b)


def inner_constant(a: Tensor, b: Tensor) -> Tensor:
    """Inside a transform, a product of tensors that no level has wrapped."""
    _, value = torch.func.grad_and_value(lambda x: (MM(a, b) * x).sum())(torch.ones(()))
    assert value == matmul_grad.mm(a, b).sum()
    return torch.func.vmap(lambda x: MM(a, b) + 0 * x)(torch.zeros(2))[1]


@pytest.mark.parametrize("way", [functionalized, noted, negated, traced, inner_constant])
def test_keys_between_autograd_and_the_kernel_are_not_skipped(way: Callable[[Tensor, Tensor], Tensor]) -> None:
    a, b = operands()
    assert_same_bits(way(a, b), matmul_grad.mm(a, b))
