"""``Linear(..., accumulate=True)`` under checkpoints, autocast, gradient scaling, compilers, and in whole models."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable

import pytest
import torch
from accumulating import BF16, PARTS, ROWS, WIDE, K, N, assert_exact, batch, exact, layer, train
from torch import Tensor, nn
from torch._dynamo import compiled_autograd
from torch.utils.checkpoint import checkpoint

import matmul_grad
from matmul_grad.testing import assert_model_within_budget, normal

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*")
needs_grad_dtype = pytest.mark.skipif(not hasattr(Tensor, "grad_dtype"), reason="this torch has no grad_dtype")


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


@needs_grad_dtype
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("dtype", [WIDE, BF16], ids=str)
def test_compiled_code_computes_each_gradient(dtype: torch.dtype, added: list[bool]) -> None:
    """Rounded to the dtype of the weight, as torch's; AccumulateGrad adds it to what was added in the product."""
    made = layer(dtype, WIDE if dtype == BF16 else None)
    compiled, seen, expected = torch.compile(made, fullgraph=True, backend="aot_eager"), [], exact(dtype) * 0
    made.weight.register_post_accumulate_grad_hook(lambda weight: seen.append(weight.grad.clone()))
    for step, (a, grad) in enumerate(zip(*(x.chunk(PARTS) for x in batch(dtype)), strict=True)):
        sums = grad.double().t() @ a.double()
        (made if step == 1 else compiled)(a).backward(grad)
        expected += sums if step == 1 else sums.to(dtype).double()
        assert_exact(seen[step], expected)
    assert made.weight.grad is not None and made.weight.grad.dtype == WIDE
    assert_exact(made.weight.grad, expected)
    assert added == [True] and len(seen) == PARTS


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_code_leaves_main_grad_to_the_trainer() -> None:
    """Its hook adds what is in ``grad`` where the layer has not: ``grad_added_to_main_grad`` tells."""
    made = layer()
    made.weight.main_grad, made.weight.grad_added_to_main_grad = torch.zeros(N, K), False
    train(torch.compile(made, fullgraph=True, backend="aot_eager"))
    assert_exact(made.weight.grad, exact())
    assert not made.weight.grad_added_to_main_grad and not made.weight.main_grad.any()


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
