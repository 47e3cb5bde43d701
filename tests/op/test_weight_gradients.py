"""Gradients of 16-bit leaves that are kept in float32: stored from the sums, without a rounding to 16 bits."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from dtypes import ACCELERATED
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import matmul_grad
from matmul_grad.testing import assert_same_bits, integers, normal

pytestmark = pytest.mark.skipif(not hasattr(Tensor, "grad_dtype"), reason="this torch has no grad_dtype")
WIDE = torch.float32
NARROW = [dtype for name, dtype in ACCELERATED.items() if name in ("bf16", "f16")]
every_dtype = pytest.mark.parametrize("dtype", NARROW, ids=str)
M, K, N = 300, 20, 11


def kept_wide(x: Tensor) -> Tensor:
    """A leaf whose gradient is kept in float32."""
    leaf = x.detach().clone().requires_grad_()
    leaf.grad_dtype = WIDE
    return leaf


# By name: of A (m, k), the leaf and dC: the product, and a function of exact operands to the gradient of the leaf.
Call = Callable[[Tensor, Tensor], Tensor]
CALLS: dict[str, tuple[Call, bool]] = {
    "mm": (lambda a, w: matmul_grad.mm(a, w), False),
    "matmul": (lambda a, w: matmul_grad.matmul(a.view(2, -1, K), w).flatten(0, 1), False),
    "addmm": (lambda a, w: matmul_grad.addmm(a.new_ones(N), a, w), False),
    "linear": (lambda a, w: matmul_grad.linear(a, w), True),
    "linear-3d": (lambda a, w: matmul_grad.linear(a.view(2, -1, K), w, w.detach()[:, 0]).flatten(0, 1), True),
    "linear-1d": (lambda a, w: torch.stack([matmul_grad.linear(row, w) for row in a]), True),
}


def leaf_of(dtype: torch.dtype, is_linear: bool) -> Tensor:
    return kept_wide(integers(N, K, dtype, 2) if is_linear else integers(K, N, dtype, 2))


def exact_gradient(a: Tensor, grad: Tensor, is_linear: bool) -> Tensor:
    sums = a.double().t() @ grad.double()
    return (sums.t() if is_linear else sums).contiguous().to(WIDE)


@every_dtype
@pytest.mark.parametrize("needs_a", [True, False], ids=["both", "alone"])
@pytest.mark.parametrize("name", CALLS)
def test_sums_are_not_rounded(name: str, needs_a: bool, dtype: torch.dtype) -> None:
    call, is_linear = CALLS[name]
    a, grad = (integers(M, K, dtype, 1) * 31).requires_grad_(needs_a), integers(M, N, dtype, 3)
    leaf = leaf_of(dtype, is_linear)
    with matmul_grad.strict():
        call(a, leaf).backward(grad)
    expected = exact_gradient(a.detach(), grad, is_linear)
    assert leaf.grad.dtype == WIDE
    assert_same_bits(leaf.grad + 0.0, expected + 0.0)
    assert not torch.equal(leaf.grad, leaf.grad.to(dtype).to(WIDE)), "the case is too easy"
    if needs_a:
        plain = a.detach().requires_grad_()
        call(plain, leaf.detach()).backward(grad)
        assert_same_bits(a.grad, plain.grad)


@every_dtype
@pytest.mark.parametrize("name", ["bmm", "baddbmm"])
def test_batches(name: str, dtype: torch.dtype) -> None:
    a, grad = (integers(3 * M, n, dtype, n).view(3, M, n) for n in (K, N))
    first, second = (a.mT * 31).contiguous(), kept_wide(integers(3 * M, N, dtype, 5).view(3, M, N))
    inputs = (first.new_zeros(N),) if name == "baddbmm" else ()
    c = getattr(matmul_grad, name)(*inputs, first, second)
    c.backward(grad[:, :K])
    expected = (first.double().mT @ grad[:, :K].double()).to(WIDE)
    assert_same_bits(second.grad + 0.0, expected + 0.0)
    assert not torch.equal(second.grad, second.grad.to(dtype).to(WIDE))


def test_the_first_operand_may_be_the_leaf() -> None:
    leaf, b, grad = kept_wide(integers(N, K, torch.bfloat16, 1)), integers(K, M, torch.bfloat16, 2) * 31, None
    grad = integers(N, M, torch.bfloat16, 3)
    matmul_grad.mm(leaf, b).backward(grad)
    assert_same_bits(leaf.grad + 0.0, (grad.double() @ b.double().t()).to(WIDE) + 0.0)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_activations(activation: str, bias: bool) -> None:
    """Beside the derivative of the activation in 16 bits, which both have."""
    a, weight, grad = (normal(m, n, torch.bfloat16, m) for m, n in ((M, K), (N, K), (M, N)))
    weight, added = kept_wide(weight), kept_wide(normal(1, N, torch.bfloat16)[0]) if bias else None
    matmul_grad.linear(a.view(2, -1, K), weight, added, activation).backward(grad.view(2, -1, N))
    argument = matmul_grad.linear(a, weight.detach(), None if added is None else added.detach()).requires_grad_()
    (dargument,) = torch.autograd.grad(getattr(nn.functional, activation)(argument), argument, grad)
    exact = dargument.double().t() @ a.double()
    assert weight.grad.dtype == WIDE
    assert (weight.grad - exact).abs().max() <= 0.005 * exact.abs().max()  # the derivative of gelu is a rounding apart
    assert not torch.equal(weight.grad, weight.grad.bfloat16().float())
    if added is not None:
        assert added.grad.dtype == WIDE
        assert (added.grad - dargument.double().sum(0)).abs().max() <= 0.005 * exact.abs().max()


@every_dtype
@pytest.mark.parametrize("case", ["both", "value", "gate", "gate-frozen", "autocast"])
def test_gated_layers(case: str, dtype: torch.dtype) -> None:
    """relu of a gate that is positive: C = P · S, dP = dC · S, dS = dC · P, all of small integers."""
    a, grad = (integers(M, K, dtype, 1).sign() * 31).requires_grad_(), integers(M, N, dtype, 3).sign()
    weight, gate = integers(N, K, dtype, 2).sign() * 0, integers(N, K, dtype, 5).sign() * 0
    weight[:, 0], gate[:, 0], shift = 1, 1, torch.full((N,), 64.0, dtype=dtype)
    pairs = (weight, "gate"), (gate, "value")
    leaves = [x.requires_grad_() if case == other else kept_wide(x) for x, other in pairs]
    if case == "gate-frozen":
        leaves = [weight.requires_grad_(False), leaves[1]]
    bias, gate_bias = kept_wide(shift), shift.clone().requires_grad_()
    with torch.autocast("cpu", dtype=dtype, enabled=case == "autocast"):
        x = a.float() if case == "autocast" else a
        matmul_grad.gated_linear(x, *leaves, bias, gate_bias, "relu").backward(grad)
    plain = [z.detach().double().requires_grad_() for z in (a, *leaves, bias, gate_bias)]
    wide = nn.functional.linear(plain[0], plain[2], plain[4]) * nn.functional.linear(plain[0], plain[1], plain[3])
    exact = torch.autograd.grad(wide, plain, grad.double())
    for leaf, right in zip((a, *leaves, bias, gate_bias), exact, strict=True):
        if leaf.requires_grad:
            assert leaf.grad is not None
            assert leaf.grad.dtype == (WIDE if getattr(leaf, "grad_dtype", dtype) == WIDE else dtype)
            assert_same_bits(leaf.grad + 0.0, right.to(leaf.grad.dtype) + 0.0)
    assert not torch.equal(exact[1].to(dtype).to(WIDE), exact[1].to(WIDE)), "the case is too easy"


def test_gated_layers_have_second_derivatives() -> None:
    a, weight, gate = normal(M, K, torch.bfloat16, 1), normal(N, K, torch.bfloat16, 2), normal(N, K, torch.bfloat16, 3)
    leaves, wide = [kept_wide(x) for x in (weight, gate)], [x.double().requires_grad_() for x in (weight, gate)]

    def second(x: Tensor, given: list[Tensor], function: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        first = torch.autograd.grad(function(x, *given).square().mean(), given, create_graph=True)
        return torch.autograd.grad(sum(one.double().square().sum() for one in first), given)

    def plain(x: Tensor, w: Tensor, g: Tensor) -> Tensor:
        return nn.functional.silu(x @ g.t()) * (x @ w.t())

    found, expected = second(a, leaves, matmul_grad.gated_linear), second(a.double(), wide, plain)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == WIDE
        assert (one.double() - other).abs().max() <= 0.05 * other.abs().max()


@pytest.mark.parametrize("convert", [True, False], ids=["converted", "Linear"])
def test_modules(convert: bool) -> None:
    module = matmul_grad.convert(nn.Linear(K, N, dtype=torch.bfloat16)) if convert else matmul_grad.Linear(
        K, N, dtype=torch.bfloat16
    )  # fmt: skip
    module.weight.grad_dtype = WIDE
    a, grad = integers(M, K, torch.bfloat16, 1) * 31, integers(M, N, torch.bfloat16, 3)
    checkpoint(module, a.requires_grad_(), use_reentrant=False).backward(grad)
    assert_same_bits(module.weight.grad + 0.0, exact_gradient(a.detach(), grad, True) + 0.0)
    assert module.bias.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["mm", "linear"])
def test_a_gradient_lies_as_its_leaf(name: str) -> None:
    call, is_linear = CALLS[name]
    values = leaf_of(torch.bfloat16, is_linear).detach()
    leaf = kept_wide(values.t().contiguous().t())
    a, grad = integers(M, K, torch.bfloat16, 1) * 31, integers(M, N, torch.bfloat16, 3)
    call(a, leaf).backward(grad)
    assert leaf.grad.stride() == leaf.stride() != values.stride()
    assert_same_bits(leaf.grad.contiguous() + 0.0, exact_gradient(a, grad, is_linear) + 0.0)


@pytest.mark.parametrize("name", ["mm", "linear", "linear-3d", "addmm"])
def test_second_derivatives(name: str) -> None:
    call, is_linear = CALLS[name]

    def second(dtype: torch.dtype) -> tuple[Tensor, ...]:
        a = normal(M, K, torch.bfloat16, 1).to(dtype).requires_grad_()
        leaf = (normal(N, K, torch.bfloat16, 2) if is_linear else normal(K, N, torch.bfloat16, 2)).to(dtype)
        leaf = kept_wide(leaf) if dtype == torch.bfloat16 else leaf.requires_grad_()
        function = call if dtype == torch.bfloat16 else lambda a, w: a @ (w.t() if is_linear else w)
        first = torch.autograd.grad(function(a, leaf).square().mean(), (a, leaf), create_graph=True)
        assert first[1].dtype == (WIDE if dtype == torch.bfloat16 else dtype)
        return torch.autograd.grad(sum(x.double().square().sum() for x in first), (a, leaf))

    for one, other in zip(second(torch.bfloat16), second(torch.float64), strict=True):
        scale = 0.05 if "3d" not in name and name != "addmm" else 10  # those add something to the product
        assert (one.double() - other).abs().max() <= scale * other.abs().max()


def test_only_what_is_kept_otherwise_is_recorded_in_python() -> None:
    a, leaf = integers(4, K, torch.bfloat16), leaf_of(torch.bfloat16, False)
    matmul_grad.mm(a, leaf.detach().requires_grad_())
    for dtype, recorded in ((torch.bfloat16, True), (WIDE, False), (None, False), (torch.bfloat16, True)):
        weight = leaf.detach().requires_grad_()
        weight.grad_dtype = dtype
        node = type(matmul_grad.mm(a, weight).grad_fn).__name__
        assert node == ("LinearBackward0" if recorded and _compiled_records() else "MmBackward")
    weight = leaf.float().detach().requires_grad_()
    weight.grad_dtype = torch.float64
    matmul_grad.mm(a.float(), weight).sum().backward()
    assert weight.grad.dtype == torch.float64


def _compiled_records() -> bool:
    from matmul_grad.kernels.native import state

    return state.words[state.RECORD] == 1


def test_autograd_grad_and_transforms() -> None:
    a, leaf = integers(M, K, torch.bfloat16, 1) * 31, leaf_of(torch.bfloat16, True)
    grad = integers(M, N, torch.bfloat16, 3)
    (found,) = torch.autograd.grad(matmul_grad.linear(a, leaf), leaf, grad)
    assert leaf.grad is None
    assert_same_bits(found + 0.0, exact_gradient(a, grad, True) + 0.0)
    many = torch.stack([grad, -grad])
    (both,) = torch.autograd.grad(matmul_grad.linear(a, leaf), leaf, many, is_grads_batched=True)
    assert_same_bits(both.float() + 0.0, torch.stack([found, -found]).to(both.dtype).float() + 0.0)
    transformed = torch.func.grad(lambda w: (matmul_grad.linear(a, w) * grad).sum())(leaf)
    assert_same_bits(transformed.bfloat16(), found.bfloat16())


def test_products_with_a_float32_result() -> None:
    """Of operands that are leaves themselves: their gradient is the product of a float32 one."""
    a, leaf = integers(M, K, torch.bfloat16, 1) * 31, kept_wide(integers(K, N, torch.bfloat16, 2))
    grad = integers(M, N, WIDE, 3)
    matmul_grad.mm(a, leaf, out_dtype=WIDE).backward(grad)
    assert_same_bits(leaf.grad + 0.0, exact_gradient(a, grad, False) + 0.0)
