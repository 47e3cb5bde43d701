"""The switch and gradients that are kept in float32: not rounded, and nothing else is recorded in another way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest
import torch
from outcomes import assert_same_outcome, outcome
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import matmul_grad
from matmul_grad.aten_override_cuda import CudaOverride
from matmul_grad.testing import assert_same_bits, integers

pytestmark = pytest.mark.skipif(not hasattr(Tensor, "grad_dtype"), reason="this torch has no grad_dtype")
BF16, WIDE = torch.bfloat16, torch.float32
M, K, N = 300, 20, 11


def leaf(m: int, n: int, keeps: torch.dtype | None = WIDE) -> nn.Parameter:
    made = nn.Parameter(integers(m, n, BF16, 2))
    made.grad_dtype = keeps
    return made


def module(x: Tensor, weight: nn.Parameter) -> Tensor:
    layer = nn.Linear(K, N, dtype=BF16)
    layer.weight = weight
    result: Tensor = layer(x)
    return result


CALLS: dict[str, Callable[[Tensor, nn.Parameter], Tensor]] = {
    "linear": lambda x, w: nn.functional.linear(x, w),
    "linear-3d": lambda x, w: nn.functional.linear(x.view(3, -1, K), w, w.detach()[:, 0]).view(M, N),
    "module": module,
}


@contextmanager
def as_on_cuda() -> Iterator[None]:
    """The kernels in Python that stand under CUDA, here under CPU."""
    matmul_grad.disable()
    switch = CudaOverride("CPU")
    switch.install()
    yield
    switch.uninstall()


@pytest.mark.parametrize("switch", [matmul_grad.enabled, as_on_cuda], ids=["cpu", "cuda"])
@pytest.mark.parametrize("name", CALLS)
def test_gradients_are_not_rounded(name: str, switch: Callable[[], AbstractContextManager[None]]) -> None:
    call = CALLS[name]
    x, grad = (integers(M, K, BF16, 1) * 31).requires_grad_(), integers(M, N, BF16, 3)
    weight = leaf(N, K)
    with switch():
        c = call(x, weight)
        c.backward(grad)
    exact = (grad.double().t() @ x.detach().double()).to(WIDE)
    assert weight.grad is not None and weight.grad.dtype == WIDE
    assert_same_bits(weight.grad + 0.0, exact + 0.0)
    assert not torch.equal(exact, exact.to(BF16).to(WIDE))
    assert x.grad is not None
    assert_same_bits(x.grad + 0.0, (grad @ weight).detach() + 0.0)
    if name == "linear":
        with torch.no_grad(), switch():
            assert_same_bits(call(x, weight), c.detach())


PRODUCTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mm": torch.mm,
    "matmul": lambda x, w: (x.view(3, -1, K) @ w).view(M, N),
    "addmm": lambda x, w: torch.addmm(x.new_ones(N), x, w, beta=0.5),
    "addmm-matrix": lambda x, w: torch.addmm(x.new_ones(M, N), x, w, beta=2),
}


@pytest.mark.parametrize("switch", [matmul_grad.enabled, as_on_cuda], ids=["cpu", "cuda"])
@pytest.mark.parametrize("name", PRODUCTS)
def test_gradients_of_products_are_not_rounded(name: str, switch: Callable[[], AbstractContextManager[None]]) -> None:
    call = PRODUCTS[name]
    x, grad = (integers(M, K, BF16, 1) * 31).requires_grad_(), integers(M, N, BF16, 3)
    weight = leaf(K, N)
    with switch():
        c = call(x, weight)
        c.backward(grad)
    exact = (x.detach().double().t() @ grad.double()).to(WIDE)
    assert weight.grad is not None and weight.grad.dtype == WIDE
    assert_same_bits(weight.grad + 0.0, exact + 0.0)
    assert not torch.equal(exact, exact.to(BF16).to(WIDE))
    assert x.grad is not None
    assert_same_bits(x.grad + 0.0, (grad @ weight.t()).detach() + 0.0)
    with torch.no_grad(), switch():
        assert_same_bits(call(x, weight), c.detach())


def test_the_first_operand_may_keep_its_gradient() -> None:
    first, w, grad = leaf(N, K), integers(K, M, BF16, 1) * 31, integers(N, M, BF16, 3)
    with matmul_grad.enabled():
        torch.mm(first, w).backward(grad)
    assert first.grad is not None
    assert_same_bits(first.grad + 0.0, (grad.double() @ w.double().t()).to(WIDE) + 0.0)


@pytest.mark.parametrize("switch", [matmul_grad.enabled, as_on_cuda], ids=["cpu", "cuda"])
def test_what_our_products_do_not_take_is_torch_s(switch: Callable[[], AbstractContextManager[None]]) -> None:
    """Results, gradients and errors: nothing to multiply, other dtypes and shapes, numbers that are no float."""
    x, weight, added = integers(M, K, BF16, 1), leaf(K, N), torch.ones(N, dtype=BF16)
    calls: list[Callable[[], Tensor]] = [
        lambda: torch.mm(x.float(), weight),
        lambda: torch.mm(x[:, 1:], weight),
        lambda: torch.mm(x[0], weight),
        lambda: torch.mm(x[:0], weight),
        lambda: torch.addmm(added[1:], x, weight),
        lambda: torch.addmm(added.float(), x, weight),
        lambda: torch.addmm(added, x, weight, alpha=1j),
        lambda: torch.addmm(added, x, weight, alpha=0),
        lambda: torch.addmm(added, x, weight, beta=1e39),
        lambda: torch.addmm(added, x[:, :0], weight[:0].detach().requires_grad_()),
    ]
    for call in calls:
        expected = outcome(call)
        with switch():
            assert_same_outcome(outcome(call), expected)


@pytest.mark.parametrize("keeps", [BF16, None], ids=str)
def test_other_gradients_are_recorded_by_torch(keeps: torch.dtype | None) -> None:
    x = integers(M, K, BF16, 1)
    with matmul_grad.enabled():
        names = [type(call(x, leaf(N, K, BF16)).grad_fn).__name__ for call in CALLS.values()]
    assert not any("LinearBackward" in name for name in names), names
    weight = leaf(N, K, keeps)
    with matmul_grad.enabled():
        nn.functional.linear(x, weight).sum().backward()
    assert weight.grad is not None and weight.grad.dtype == BF16


def test_what_follows_a_product_sees_that_of_torch() -> None:
    seen = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            seen.append(operator.name())
            return operator(*args, **(kwargs or {}))

    x, weight = integers(M, K, BF16, 1), leaf(N, K)
    with matmul_grad.enabled(), Mode():
        nn.functional.linear(x, weight)
    assert {"aten::t", "aten::mm"} <= set(seen), seen
    with matmul_grad.enabled():
        transformed = torch.func.grad(lambda w: nn.functional.linear(x, w).sum())(weight)
    assert_same_bits(transformed.to(BF16), x.double().sum(0).expand(N, K).to(BF16))


def test_errors_are_those_of_torch() -> None:
    x, weight = integers(M, K, BF16, 1), leaf(K, N)
    for call in (
        lambda: nn.functional.linear(x, weight),
        lambda: nn.functional.linear(x.float(), leaf(N, K)),
        lambda: nn.functional.linear(x, leaf(N, K), weight),
        lambda: nn.functional.linear(x, leaf(N, K), x[0]),
    ):
        with pytest.raises(RuntimeError) as expected:
            call()
        with pytest.raises(RuntimeError) as raised, matmul_grad.enabled():
            call()
        assert str(raised.value) == str(expected.value)


def test_off_means_as_it_was() -> None:
    matmul_grad.disable()
    before = torch._C._dispatch_dump("aten::linear")
    matmul_grad.enable()
    assert "AutogradCPU: registered at matmul_grad" in torch._C._dispatch_dump("aten::linear")
    matmul_grad.disable()
    assert torch._C._dispatch_dump("aten::linear") == before
    weight = leaf(N, K)
    with matmul_grad.enabled():
        pass  # the entries stay, and pass everything on
    nn.functional.linear(integers(M, K, BF16, 1) * 31, weight).backward(integers(M, N, BF16, 3))
    assert weight.grad is not None and torch.equal(weight.grad, weight.grad.to(BF16).to(WIDE))


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_models() -> None:
    layer, x = nn.Linear(K, N, dtype=BF16), integers(M, K, BF16, 1)
    layer.weight.grad_dtype = WIDE
    with matmul_grad.enabled():
        torch.compile(layer, backend="aot_eager", fullgraph=True)(x).sum().backward()
    assert layer.weight.grad is not None
    torch.testing.assert_close(layer.weight.grad.float(), x.float().sum(0).expand(N, K), rtol=0.01, atol=0)
