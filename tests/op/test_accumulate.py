"""``Linear(..., accumulate=True)``: backward adds to the weight's gradient in the product, and the rest is torch's."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from dtypes import ACCELERATED
from torch import Tensor, nn
from torch._dynamo import compiled_autograd
from torch.utils.checkpoint import checkpoint

import matmul_grad
from matmul_grad import weight_gradients
from matmul_grad.testing import assert_model_within_budget, assert_same_bits, integers, normal, roundings_of_sums

WIDE, BF16 = torch.float32, torch.bfloat16
K, N, ROWS, PARTS = 20, 11, 24, 3
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*")
needs_grad_dtype = pytest.mark.skipif(not hasattr(Tensor, "grad_dtype"), reason="this torch has no grad_dtype")


@pytest.fixture
def added(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each weight gradient since, whether it was added in the product."""
    found: list[bool] = []
    real = weight_gradients._add

    def add(*operands: Tensor) -> bool:
        found.append(real(*operands))
        return found[-1]

    monkeypatch.setattr(weight_gradients, "_add", add)
    return found


def layer(dtype: torch.dtype = WIDE, keeps: torch.dtype | None = None, **named: Any) -> matmul_grad.Linear:
    made = matmul_grad.Linear(K, N, dtype=dtype, accumulate=True, **named)
    with torch.no_grad():
        made.weight.copy_(integers(N, K, dtype, 9))
        if made.bias is not None:
            made.bias.copy_(integers(1, N, dtype, 8)[0])
    if keeps is not None:
        made.weight.grad_dtype = keeps
    return made


def batch(dtype: torch.dtype = WIDE) -> tuple[Tensor, Tensor]:
    """A and dC of all parts."""
    return integers(PARTS * ROWS, K, dtype, 1) * 31, integers(PARTS * ROWS, N, dtype, 2)


def train(made: nn.Module, parts: int = PARTS, dtype: torch.dtype = WIDE) -> None:
    for a, grad in zip(*(x.chunk(parts) for x in batch(dtype)), strict=True):
        made(a).backward(grad)


def exact(dtype: torch.dtype = WIDE) -> Tensor:
    a, grad = (x.double() for x in batch(dtype))
    return grad.t() @ a


def assert_exact(found: Tensor | None, expected: Tensor) -> None:
    assert found is not None
    assert_same_bits(found.contiguous() + 0.0, expected.to(found.dtype) + 0.0)


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


# --- what surrounds a step ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not-reentrant"])
def test_checkpoints(reentrant: bool, added: list[bool]) -> None:
    made = layer()
    for a, grad in zip(*(x.chunk(PARTS) for x in batch()), strict=True):
        checkpoint(made, a.requires_grad_(), use_reentrant=reentrant).backward(grad)
    assert_exact(made.weight.grad, exact())
    assert added == [True] * PARTS


@pytest.mark.parametrize("inside", [True, False], ids=["backward-inside", "backward-outside"])
def test_autocast_of_float32_weights(inside: bool, added: list[bool]) -> None:
    """The product of 16-bit operands is added to a float32 gradient, unrounded."""
    made = layer()
    for a, grad in zip(*(x.chunk(PARTS) for x in batch()), strict=True):
        with torch.autocast("cpu", BF16):
            c = made(a)
            if inside:
                c.backward(grad.to(c.dtype))
        assert c.dtype == BF16
        if not inside:
            c.backward(grad.to(c.dtype))
    assert made.weight.grad.dtype == made.bias.grad.dtype == WIDE
    assert_exact(made.weight.grad, exact())
    assert_exact(made.bias.grad, batch()[1].double().sum(0))
    assert not torch.equal(made.weight.grad, made.weight.grad.bfloat16().float())
    assert added == [True] * PARTS


def test_gradient_scaling(added: list[bool]) -> None:
    made = layer()
    scaler, optimizer = torch.amp.GradScaler("cpu", init_scale=8.0), torch.optim.SGD(made.parameters(), 1.0)
    before = made.weight.detach().clone()
    for a, grad in zip(*(x.chunk(PARTS) for x in batch()), strict=True):
        scaler.scale((made(a) * grad).sum()).backward()
    assert_exact(made.weight.grad, 8 * exact())
    scaler.step(optimizer)
    assert_exact(made.weight.detach(), before.double() - exact())
    scaler.update()
    optimizer.zero_grad()
    (made(batch()[0]) * float("inf")).sum().backward()
    assert not made.weight.grad.isfinite().all()
    assert added == [True] * (PARTS + 1)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@needs_grad_dtype
def test_activations(activation: str, added: list[bool]) -> None:
    made, plain = layer(activation=activation), nn.Linear(K, N)
    plain.load_state_dict(made.state_dict())
    exact = copy.deepcopy(plain).double()
    for shape in ((ROWS, K), (2, ROWS, K)):
        x = normal(1, torch.Size(shape).numel(), WIDE, 3).view(shape)
        made(x).square().sum().backward()
        for other in (plain, exact):
            getattr(nn.functional, activation)(other(x.to(other.weight.dtype))).square().sum().backward()
    ours, theirs, truth = ({name: p.grad for name, p in net.named_parameters()} for net in (made, plain, exact))
    assert_model_within_budget(ours, theirs, truth, activation)
    assert added == [True] * 2


def test_anomaly_detection_sees_each_contribution(added: list[bool]) -> None:
    made = layer()
    with torch.autograd.set_detect_anomaly(True), pytest.raises(RuntimeError, match="returned nan values"):
        (made(batch()[0]) * float("nan")).sum().backward()
    assert added == []


def test_threads_add_in_turn() -> None:
    made, threads = layer(), 4
    a, grad = batch()

    def work() -> None:
        for _ in range(20):
            made(a).backward(grad)

    started = [threading.Thread(target=work) for _ in range(threads)]
    for thread in started:
        thread.start()
    for thread in started:
        thread.join()
    assert_exact(made.weight.grad, 20 * threads * exact())


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_code_computes_each_gradient(added: list[bool]) -> None:
    made = layer()
    compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
    train(compiled)
    assert_exact(made.weight.grad, exact())
    assert added == []


def test_modes_and_transforms(added: list[bool]) -> None:
    made = layer()
    a, grad = batch()
    parameters = dict(made.named_parameters())
    found = torch.func.grad(lambda p: (torch.func.functional_call(made, p, (a,)) * grad).sum())(parameters)
    assert_exact(found["weight"], exact())
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(a, a)
        tangent = torch.autograd.forward_ad.unpack_dual(made(dual)).tangent
    assert_exact(tangent, (a @ made.weight.t()).detach())
    assert made.weight.grad is None and added == []


@pytest.mark.parametrize("hooks", ["saved", "offloaded"])
def test_hooks_of_saved_tensors(hooks: str, added: list[bool]) -> None:
    made = layer()
    pack: Callable[[Tensor], Tensor] = torch.clone
    way = torch.autograd.graph.saved_tensors_hooks(pack, pack) if hooks == "saved" else (
        torch.autograd.graph.save_on_cpu()
    )  # fmt: skip
    with way:
        train(made)
    assert_exact(made.weight.grad, exact())
    assert added == [True] * PARTS


# --- models ---------------------------------------------------------------------------------------------------------


def test_convert_and_restore(added: list[bool]) -> None:
    made = matmul_grad.convert(nn.Linear(K, N), accumulate=True)
    train(made)
    assert_exact(made.weight.grad, exact())
    assert added == [True] * PARTS
    for again in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        again.zero_grad()
        train(again)
        assert_exact(again.weight.grad, exact())
    assert len(added) == 3 * PARTS
    train(matmul_grad.convert(made))  # which changes it
    assert_exact(made.weight.grad, 2 * exact())
    train(matmul_grad.restore(made))
    assert_exact(made.weight.grad, 3 * exact())
    assert len(added) == 3 * PARTS


def test_attention(added: list[bool]) -> None:
    torch.manual_seed(0)
    plain = nn.MultiheadAttention(16, 2, batch_first=True)
    made = matmul_grad.convert(copy.deepcopy(plain), accumulate=True)
    x = torch.randn(2, 5, 16)
    for module in (plain, made):
        for _ in range(2):
            module(x, x, x)[0].square().sum().backward()
    for one, other in zip(made.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    assert added == [True] * 4


def test_how_it_is_shown() -> None:
    made = matmul_grad.Linear(3, 2, accumulate=True)
    assert repr(made) == "Linear(in_features=3, out_features=2, bias=True, accumulate=True)"
    assert list(made.state_dict()) == ["weight", "bias"]


@needs_grad_dtype
@pytest.mark.parametrize("dtype", [WIDE, BF16], ids=str)
def test_errors_are_those_of_torch(dtype: torch.dtype) -> None:
    other = BF16 if dtype == WIDE else WIDE
    made, plain = layer(dtype, WIDE), nn.Linear(K, N, dtype=dtype)
    for wrong in (torch.ones(2, K + 1, dtype=dtype), torch.ones(2, K, dtype=other), torch.ones(2, K, device="meta")):
        with pytest.raises(RuntimeError) as expected:
            plain(wrong)
        for call in (made, lambda x: matmul_grad.linear(x, made.weight, made.bias)):
            with pytest.raises(RuntimeError) as raised:
                call(wrong)
            assert str(raised.value) == str(expected.value)
    with pytest.raises(TypeError):
        made(None)


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_autograd(added: list[bool]) -> None:
    made = layer()
    with compiled_autograd._enable(torch.compile(backend="eager", fullgraph=True)):
        train(made)
    assert_exact(made.weight.grad, exact())
    a, grad = batch()
    c = made(a)
    with compiled_autograd._enable(torch.compile(backend="eager")):
        c.backward(grad)  # of a node that was recorded before
    assert_exact(made.weight.grad, 2 * exact())
