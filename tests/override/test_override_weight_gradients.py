"""The switch and gradients that are kept in float32: not rounded, and nothing else is recorded in another way."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import matmul_grad
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


CALLS: dict[str, tuple[Callable[[Tensor, nn.Parameter], Tensor], bool]] = {
    "linear": (lambda x, w: nn.functional.linear(x, w), True),
    "linear-3d": (lambda x, w: nn.functional.linear(x.view(3, -1, K), w, w.detach()[:, 0]).view(M, N), True),
    "module": (module, True),
    "mm": (torch.mm, False),
    "matmul": (lambda x, w: (x.view(3, -1, K) @ w).view(M, N), False),
    "addmm": (lambda x, w: torch.addmm(x.new_ones(N), x, w, beta=2), False),
}


@pytest.mark.parametrize("name", CALLS)
def test_gradients_are_not_rounded(name: str) -> None:
    call, is_linear = CALLS[name]
    x, grad = (integers(M, K, BF16, 1) * 31).requires_grad_(), integers(M, N, BF16, 3)
    weight = leaf(N, K) if is_linear else leaf(K, N)
    with matmul_grad.enabled():
        c = call(x, weight)
        c.backward(grad)
    exact = grad.double().t() @ x.detach().double()
    exact = (exact if is_linear else exact.t()).contiguous().to(WIDE)
    assert weight.grad is not None and weight.grad.dtype == WIDE
    assert_same_bits(weight.grad + 0.0, exact + 0.0)
    assert not torch.equal(exact, exact.to(BF16).to(WIDE))
    assert x.grad is not None
    assert_same_bits(x.grad + 0.0, (grad @ (weight if is_linear else weight.t())).detach() + 0.0)
    if name not in ("module", "linear-3d"):  # whose biases are drawn, or added after a rounding
        with torch.no_grad(), matmul_grad.enabled():
            assert_same_bits(call(x, weight), c.detach())


@pytest.mark.parametrize("keeps", [BF16, None], ids=str)
def test_other_gradients_are_recorded_by_torch(keeps: torch.dtype | None) -> None:
    x = integers(M, K, BF16, 1)
    with matmul_grad.enabled():
        names = [type(call(x, leaf(N, K, BF16)).grad_fn).__name__ for call, is_linear in CALLS.values() if is_linear]
        assert type(torch.mm(x, leaf(K, N, BF16)).grad_fn).__name__ == "MmBackward0"
    assert not any("LinearBackward" in name for name in names), names
    weight = leaf(K, N, keeps)
    with matmul_grad.enabled():
        torch.mm(x, weight).sum().backward()
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
        lambda: torch.mm(weight, weight),
        lambda: torch.addmm(x, weight, weight),
        lambda: torch.mm(x.float(), weight),
        lambda: torch.addmm(x[:, :N], x, weight, alpha=1j),
        lambda: torch.addmm(x[:, :3], x, weight),
        lambda: torch.addmm(x[:, :N].float(), x, weight),
        lambda: torch.mm(x[0], weight),
        lambda: nn.functional.linear(x, weight.t(), weight),
    ):
        with pytest.raises(RuntimeError) as expected:
            call()
        with pytest.raises(RuntimeError) as raised, matmul_grad.enabled():
            call()
        assert str(raised.value) == str(expected.value)


def test_off_means_as_it_was() -> None:
    names = ("aten::linear", "aten::mm", "aten::addmm")
    matmul_grad.disable()
    before = [torch._C._dispatch_dump(name) for name in names]
    matmul_grad.enable()
    assert all("AutogradCPU: registered at matmul_grad" in torch._C._dispatch_dump(name) for name in names)
    matmul_grad.disable()
    assert [torch._C._dispatch_dump(name) for name in names] == before
    weight = leaf(K, N)
    with matmul_grad.enabled():
        pass  # the entries stay, and pass everything on
    torch.mm(integers(M, K, BF16, 1) * 31, weight).backward(integers(M, N, BF16, 3))
    assert weight.grad is not None and torch.equal(weight.grad, weight.grad.to(BF16).to(WIDE))


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_models() -> None:
    layer, x = nn.Linear(K, N, dtype=BF16), integers(M, K, BF16, 1)
    layer.weight.grad_dtype = WIDE
    with matmul_grad.enabled():
        torch.compile(layer, backend="aot_eager", fullgraph=True)(x).sum().backward()
    assert layer.weight.grad is not None
    torch.testing.assert_close(layer.weight.grad.float(), x.float().sum(0).expand(N, K), rtol=0.01, atol=0)
