"""``Linear(..., accumulate=True)``: backward adds to the weight's gradient in the product, and the rest is torch's."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from accumulating import BF16, PARTS, ROWS, WIDE, K, N, assert_exact, batch, exact, layer, train
from dtypes import ACCELERATED
from torch import Tensor, nn

import matmul_grad
from matmul_grad import weight_gradients
from matmul_grad.testing import integers, normal, roundings_of_sums

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*")
needs_grad_dtype = pytest.mark.skipif(not hasattr(Tensor, "grad_dtype"), reason="this torch has no grad_dtype")


# --- sums -----------------------------------------------------------------------------------------------------------

KINDS = [pytest.param(dtype, None, id=str(dtype)) for dtype in (WIDE, torch.float64)] + [
    pytest.param(dtype, WIDE, id=f"{dtype}-in-float32", marks=needs_grad_dtype)
    for name, dtype in ACCELERATED.items()
    if name in ("bf16", "f16")
]


@pytest.mark.parametrize("parts", [1, 3, 8])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("dtype,keeps", KINDS)
def test_sums_are_exact_however_a_batch_is_cut(
    dtype: torch.dtype, keeps: torch.dtype | None, bias: bool, parts: int, added: list[bool]
) -> None:
    made = layer(dtype, keeps, bias=bias)
    with matmul_grad.strict():
        train(made, parts, dtype)
    assert made.weight.grad.dtype == (keeps or dtype)
    assert_exact(made.weight.grad, exact(dtype))
    assert added == [True] * parts
    if bias:
        assert made.bias.grad.dtype == dtype


@pytest.mark.parametrize("shape", [(ROWS, K), (2, ROWS // 2, K), (K,), (0, K), (2, 0, K)], ids=str)
def test_inputs_of_any_rank(shape: tuple[int, ...]) -> None:
    made, plain = layer(), nn.Linear(K, N)
    plain.load_state_dict(made.state_dict())
    x = integers(1, max(1, ROWS * K), WIDE, 3).flatten()[: torch.Size(shape).numel()].view(shape)
    for _ in range(2):
        for one in (made, plain):
            one(x).sum().backward()
    assert_exact(made.weight.grad, plain.weight.grad)
    assert_exact(made.bias.grad, plain.bias.grad)


def test_gradients_of_the_input_and_expanded_ones() -> None:
    made = layer()
    x = (integers(ROWS, K, WIDE, 3)).requires_grad_()
    for _ in range(2):
        made(x).sum().backward()
    assert_exact(x.grad, 2 * made.weight.detach().sum(0).expand(ROWS, K))
    assert_exact(made.weight.grad, 2 * x.detach().sum(0).expand(N, K))


@pytest.mark.filterwarnings("ignore:grad and param do not obey the gradient layout contract")
def test_the_gradient_stays_where_it_is_and_is_written_once(added: list[bool]) -> None:
    made = layer()
    train(made)
    first, version = made.weight.grad, made.weight.grad._version
    for place in (first, torch.zeros(2 * N, 3 * K)[::2, ::3], torch.zeros(K, N).t()):
        made.weight.grad = place
        before = place.clone()
        train(made)
        assert made.weight.grad is place
        assert_exact(place, before + exact())
    assert first._version > version, "autograd sees that it was written"
    made.zero_grad(set_to_none=False)
    train(made)
    assert_exact(made.weight.grad, exact())
    made.zero_grad()
    train(made)
    assert_exact(made.weight.grad, exact())
    assert all(added) and len(added) == 6 * PARTS


def test_writes_nothing_beside_the_gradient() -> None:
    made = layer()
    whole = torch.full((N + 2, K + 3), float("nan"))
    whole[1:-1, 2:-1] = 0
    made.weight.grad = whole[1:-1, 2:-1]
    train(made)
    assert_exact(whole[1:-1, 2:-1], exact())
    whole[1:-1, 2:-1] = float("nan")
    assert whole.isnan().all()


def test_a_weight_by_columns_has_a_gradient_by_columns() -> None:
    made = layer()
    made.weight = nn.Parameter(made.weight.detach().t().contiguous().t())
    train(made)
    assert made.weight.grad.stride() == (1, N)
    assert_exact(made.weight.grad, exact())


@needs_grad_dtype
@pytest.mark.parametrize("parts", [1, 16, 256])
def test_error_of_microbatches(parts: int) -> None:
    """Root mean square: 2 float32 roundings of the sum of |products|; each element: a rounding for each addition."""
    a, grad = normal(8 * parts, 48, BF16, 1), normal(8 * parts, 40, BF16, 2)
    made = matmul_grad.Linear(48, 40, bias=False, dtype=BF16, accumulate=True)
    made.weight.grad_dtype = WIDE
    for x, dc in zip(a.chunk(parts), grad.chunk(parts), strict=True):
        made(x).backward(dc)
    typical, worst = roundings_of_sums(made.weight.grad, grad.t(), a)
    assert typical <= 2 and worst <= 8 + parts


# --- who sees what --------------------------------------------------------------------------------------------------


def test_hooks_after_accumulation_see_the_sum(added: list[bool]) -> None:
    made, seen = layer(), []
    made.weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    node = made.weight.view_as(made.weight).grad_fn.next_functions[0][0]
    called: list[int] = []
    node.register_hook(lambda *_: called.append(1))
    train(made)
    assert len(called) == PARTS == len(added) and all(added)
    parts = [grad.double().t() @ a.double() for a, grad in zip(*(x.chunk(PARTS) for x in batch()), strict=True)]
    for index, found in enumerate(seen):
        assert_exact(found, sum(parts[: index + 1]))


def test_an_optimizer_may_run_in_the_hook() -> None:
    made = layer()
    gone: list[Tensor] = []

    def step(p: Tensor) -> None:
        gone.append(p.grad)
        p.grad = None

    made.weight.register_post_accumulate_grad_hook(step)
    train(made)
    assert made.weight.grad is None
    assert_exact(sum(gone), exact())


def test_hooks_of_the_tensor_see_the_contribution(added: list[bool]) -> None:
    made, seen = layer(), []
    handle = made.weight.register_hook(lambda grad: seen.append(grad.clone()) or 2 * grad)
    train(made)
    assert_exact(sum(seen), exact())
    assert_exact(made.weight.grad, 2 * exact())
    assert added == []
    handle.remove()
    train(made)
    assert_exact(made.weight.grad, 3 * exact())
    assert added == [True] * PARTS


def test_hooks_of_several_tensors_see_the_contributions(added: list[bool]) -> None:
    made, seen = layer(), []
    handle = torch.autograd.graph.register_multi_grad_hook(list(made.parameters()), lambda grads: seen.append(grads))
    train(made)
    assert len(seen) == PARTS and added == []
    assert_exact(sum(grads[0] for grads in seen), exact())
    handle.remove()
    train(made)
    assert added == [True] * PARTS


def test_autograd_grad_leaves_the_gradient_alone(added: list[bool]) -> None:
    made = layer()
    a, grad = batch()
    a.requires_grad_()
    for inputs in ((made.weight,), (a,), (a, made.weight)):
        found = torch.autograd.grad(made(a), inputs, grad)
        assert_exact(found[-1], exact() if inputs[-1] is made.weight else grad @ made.weight.detach())
    made(a).backward(grad, inputs=[a])
    assert made.weight.grad is None and added == []
    made(a).backward(grad, inputs=[made.weight])
    assert_exact(made.weight.grad, exact())
    assert added == [True]


def test_derivatives_of_gradients() -> None:
    def second(made: nn.Module) -> list[Tensor]:
        a = normal(ROWS, K, torch.float64, 3).requires_grad_()
        made.weight.grad = torch.ones_like(made.weight)
        made(a).square().sum().backward(create_graph=True)
        total = a.grad.square().sum() + made.weight.grad.square().sum()
        return list(torch.autograd.grad(total, (a, made.weight)))

    made, plain = layer(torch.float64), nn.Linear(K, N, dtype=torch.float64)
    plain.load_state_dict(made.state_dict())
    with pytest.warns(UserWarning, match="Using backward.. with create_graph"):
        torch.testing.assert_close(second(made), second(plain))
    torch.autograd.gradcheck(made, normal(3, K, torch.float64).requires_grad_())
    parameters = [normal(3, K, torch.float64).requires_grad_(), made.weight, made.bias]
    layer_of = weight_gradients.layer_of(parameters[0], made.weight, made.bias, True)
    assert layer_of is not None
    torch.autograd.gradgradcheck(lambda *x: weight_gradients.record(*x, layer_of[1]), parameters)


def test_the_original_of_a_weight_that_was_cast() -> None:
    made = layer()
    a = normal(ROWS, K, WIDE, 3).requires_grad_()
    with torch.autocast("cpu", BF16):
        c = made(a)
    (first,) = torch.autograd.grad(c.float().square().sum(), a, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), made.weight)
    assert second.dtype == WIDE and second.abs().sum() > 0
    with torch.autocast("cpu", BF16):
        c = made(a)
    with torch.no_grad():
        made.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(c.float().square().sum(), a, create_graph=True)


def test_frozen_operands() -> None:
    made = layer()
    made.weight.requires_grad_(False)
    x = integers(ROWS, K, WIDE, 3).requires_grad_()
    made(x).sum().backward()
    assert made.weight.grad is None
    assert_exact(x.grad, made.weight.sum(0).expand(ROWS, K))
    made.weight.requires_grad_(True)
    c = made(x.detach())
    made.weight.requires_grad_(False)
    c.sum().backward()  # frozen after it was used: AccumulateGrad stores nothing
    assert made.weight.grad is None
    with torch.no_grad():
        assert made(x).grad_fn is None
    with torch.inference_mode():
        assert made(x).is_inference()


# --- what else adds to the gradient ---------------------------------------------------------------------------------


def test_a_weight_used_twice(added: list[bool]) -> None:
    made = matmul_grad.Linear(K, K, bias=False, accumulate=True)
    plain = copy.deepcopy(made).double()
    for _ in range(2):
        x = normal(ROWS, K, WIDE, 3)
        made(made(x)).square().mean().backward()
        nn.functional.linear(nn.functional.linear(x.double(), plain.weight), plain.weight).square().mean().backward()
    torch.testing.assert_close(made.weight.grad.double(), plain.weight.grad)
    assert added == [True] * 4


@needs_grad_dtype
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("dtype", [WIDE, BF16], ids=str)
def test_a_weight_tied_to_an_embedding(dtype: torch.dtype, sparse: bool, added: list[bool]) -> None:
    embedding, head = nn.Embedding(N, K, dtype=dtype, sparse=sparse), layer(dtype, WIDE, bias=False)
    embedding.weight = head.weight
    text, grad = torch.arange(ROWS) % N, integers(ROWS, N, dtype, 4)
    for _ in range(2):
        head(embedding(text)).backward(grad)
    weight = head.weight.detach().double().requires_grad_()
    nn.functional.linear(nn.functional.embedding(text, weight), weight).backward(grad.double())
    assert head.weight.grad.layout == torch.strided
    assert_exact(head.weight.grad, 2 * weight.grad)
    assert added == [True] * 2


@needs_grad_dtype
def test_gradients_of_another_kind_are_left_to_torch(added: list[bool]) -> None:
    made = layer(BF16)  # whose gradient has 16 bits
    train(made, dtype=BF16)
    assert made.weight.grad.dtype == BF16 and added == [False] * PARTS
    made = layer(BF16, WIDE)
    made.weight.grad_dtype = None  # of any dtype
    made.weight.grad = torch.zeros(N, K, dtype=torch.float64)
    train(made, dtype=BF16)
    assert made.weight.grad.dtype == torch.float64
    made = layer()
    made.weight.grad = torch.zeros(1, K).expand(N, K)
    with pytest.raises(RuntimeError, match="more than one element of the written-to tensor"):
        train(made)
    made.weight.grad = torch.empty(N, K, layout=torch.sparse_coo)
    train(made)
    assert_exact(made.weight.grad.to_dense(), exact())
    assert not any(added[PARTS:-PARTS])


def test_the_gradient_may_be_the_input() -> None:
    made, plain = (matmul_grad.Linear(K, K, bias=False, accumulate=flag) for flag in (True, False))
    plain.load_state_dict(made.state_dict())
    for one in (made, plain):
        one.weight.grad = normal(K, K, WIDE, 3)
        one(one.weight.grad.detach()).sum().backward()
    torch.testing.assert_close(made.weight.grad, plain.weight.grad)


# --- main_grad ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [WIDE, BF16], ids=str)
def test_main_grad_gets_the_sums(dtype: torch.dtype, added: list[bool]) -> None:
    made, called = layer(dtype), []
    made.weight.main_grad = torch.ones(N, K)
    made.weight.grad_added_to_main_grad = False

    def hook(p: Any) -> None:
        called.append(p.grad_added_to_main_grad)
        p.main_grad.add_(p.grad)  # of a trainer that does not know: it adds nothing
        p.grad = None

    made.weight.register_post_accumulate_grad_hook(hook)
    train(made, dtype=dtype)
    assert called == [True] * PARTS == added
    assert made.weight.grad is None
    assert_exact(made.weight.main_grad, 1 + exact(dtype))


def test_a_main_grad_that_cannot_be_added_to(added: list[bool]) -> None:
    for unfit, named in ((torch.zeros(N, K, dtype=BF16), {}), (torch.zeros(N, K), {"overwrite_main_grad": True})):
        made = layer()
        made.weight.main_grad = unfit
        vars(made.weight).update(named)
        train(made)
        assert_exact(made.weight.grad, exact())
        assert not unfit.any() and not any(added)
