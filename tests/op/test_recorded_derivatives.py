"""What torch does with a recorded graph, it does with the C++ node of these products: derivatives of every kind."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import recorded
import torch
from recorded import DOUBLE, is_recorded, leaves
from torch import Tensor
from torch._dynamo import compiled_autograd
from torch._dynamo.backends.common import aot_autograd
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

import matmul_grad
from matmul_grad.testing import assert_same_bits, exact_product, normal

pytestmark = recorded.MARKS


def test_derivatives_of_addmm_numerically() -> None:
    pair = normal(3, 4, DOUBLE, 1).requires_grad_(), normal(4, 2, DOUBLE, 2).requires_grad_()
    added = normal(1, 2, DOUBLE, 3)[0].clone().requires_grad_()
    assert gradcheck(matmul_grad.addmm, (added, *pair), check_batched_grad=True, check_undefined_grad=True)
    assert gradgradcheck(matmul_grad.addmm, (added, *pair), check_fwd_over_rev=True)


def test_derivatives_numerically() -> None:
    pair = normal(3, 4, DOUBLE, 1).requires_grad_(), normal(4, 2, DOUBLE, 2).requires_grad_()
    assert is_recorded(matmul_grad.mm(*pair))
    assert gradcheck(matmul_grad.mm, pair, check_batched_grad=True, check_undefined_grad=True)
    assert gradgradcheck(matmul_grad.mm, pair, check_fwd_over_rev=True, check_batched_grad=True)
    batches = tuple(x.detach().expand(3, *x.shape).contiguous().requires_grad_() for x in pair)
    assert is_recorded(matmul_grad.bmm(*batches))
    assert gradcheck(matmul_grad.bmm, batches, check_batched_grad=True, check_undefined_grad=True)
    assert gradgradcheck(matmul_grad.bmm, batches)


def test_third_derivatives_are_torch_s() -> None:
    def third(mm: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
        a, b = normal(3, 4, DOUBLE, 1).requires_grad_(), normal(4, 2, DOUBLE, 2).requires_grad_()
        first = torch.autograd.grad(mm(a, b).sin().pow(2).sum(), (a, b), create_graph=True)
        second = torch.autograd.grad(sum(x.cos().sum() for x in first), (a, b), create_graph=True)
        return list(torch.autograd.grad(sum(x.sin().sum() for x in second), (a, b)))

    torch.testing.assert_close(third(matmul_grad.mm), third(torch.mm), rtol=1e-9, atol=1e-9)


def test_batched_and_dual_gradients_of_a_recorded_graph() -> None:
    a, b, grad = leaves()
    c, expected = matmul_grad.mm(a, b), torch.mm(a, b)
    many = torch.stack([grad, grad + 1, grad * 3])
    ours = torch.autograd.grad(c, (a, b), many, is_grads_batched=True, retain_graph=True)
    theirs = torch.autograd.grad(expected, (a, b), many, is_grads_batched=True, retain_graph=True)
    assert all(map(torch.equal, ours, theirs))
    vjp = torch.vmap(lambda g: torch.autograd.grad(c, (a, b), g, retain_graph=True))(many)
    assert all(map(torch.equal, vjp, theirs))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(grad, torch.ones_like(grad))
        found = [forward_ad.unpack_dual(x).tangent for x in torch.autograd.grad(c, (a, b), dual)]
    ones = torch.ones_like(grad)
    assert_same_bits(found[0], exact_product(ones, b.detach().t()))
    assert_same_bits(found[1], exact_product(a.detach().t(), ones))


class NoGradient(torch.autograd.Function):
    """Passes its input on, and no gradient back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> None:
        return None


def test_no_gradient_from_above_is_none_below() -> None:
    for mm in (matmul_grad.mm, torch.mm):
        a, b, _ = leaves()
        NoGradient.apply(mm(a, b)).sum().backward()
        assert a.grad is None and b.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_backward_under_autocast(dtype: torch.dtype) -> None:
    def gradients(mm: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
        a, b, grad = leaves(dtype=dtype)
        c = mm(a, b)
        with torch.autocast("cpu", torch.bfloat16):
            return list(torch.autograd.grad(c, (a, b), grad / 3))

    for ours, theirs in zip(gradients(matmul_grad.mm), gradients(torch.mm), strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02)


def test_backward_in_inference_mode() -> None:
    def outcome(mm: Callable[[Tensor, Tensor], Tensor]) -> Any:
        a, b, grad = leaves()
        c = mm(a, b)
        try:
            with torch.inference_mode():
                return [x.tolist() for x in torch.autograd.grad(c, (a, b), grad)]
        except RuntimeError as error:
            return str(error)

    assert outcome(matmul_grad.mm) == outcome(torch.mm)


def test_nothing_is_kept_after_a_step() -> None:
    gone = []
    for early_stop in (None, True):
        a, b, grad = leaves()
        added = torch.ones(2, dtype=DOUBLE, requires_grad=True)
        c = matmul_grad.mm(a, b) if early_stop is None else checkpoint(matmul_grad.mm, a, b, use_reentrant=False)
        d = matmul_grad.addmm(added, a, b)
        gone += [weakref.ref(x.untyped_storage()) for x in (a, b, c, d, added, grad)]
        (c + d).backward(grad)
        del a, b, c, d, added, grad
    gc.collect()
    assert [x() for x in gone] == [None] * len(gone)


def test_nothing_is_kept_of_operands_that_a_hook_refuses() -> None:
    def refuse(_: Tensor) -> Tensor:
        raise KeyError("as raised")

    a, b, _ = leaves()
    with pytest.raises(KeyError, match="as raised"), torch.autograd.graph.saved_tensors_hooks(refuse, refuse):
        matmul_grad.mm(a, b)
    gone = [weakref.ref(x.untyped_storage()) for x in (a, b)]
    del a, b
    gc.collect()
    assert [x() for x in gone] == [None, None]


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("batch", [(), (2,)], ids=["mm", "bmm"])
def test_compiled_autograd_traces_the_operators_of_this_package(batch: tuple[int, ...]) -> None:
    a, b, grad = leaves(*batch)
    c = (matmul_grad.bmm if batch else matmul_grad.mm)(a, b)
    assert is_recorded(c)
    seen: list[str] = []

    def compiler(graph: torch.fx.GraphModule) -> Callable[..., Any]:
        return torch.compile(graph, backend=aot_autograd(fw_compiler=note))

    def note(graph: torch.fx.GraphModule, _: Any) -> torch.fx.GraphModule:
        seen.extend(str(node.target) for node in graph.graph.nodes if "matmul" in str(node.target))
        return graph

    with compiled_autograd._enable(compiler):
        c.backward(grad)
    assert seen == ["matmul_grad.bmm.default" if batch else "matmul_grad.mm.default"] * 2
    assert_same_bits(a.grad, exact_product(grad, b.detach().mT))
    assert_same_bits(b.grad, exact_product(a.detach().mT, grad))


def test_transforms_do_not_meet_the_node() -> None:
    a, b, _ = leaves()
    expected = torch.func.jacrev(lambda x: torch.func.grad(lambda y: torch.mm(x, y).sin().sum())(b))(a)
    found = torch.func.jacrev(lambda x: torch.func.grad(lambda y: matmul_grad.mm(x, y).sin().sum())(b))(a)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("ignore:.*nested tensors:UserWarning")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
def test_nested_tensors_keep_the_backward_of_torch(layout: torch.layout) -> None:
    def nested(rows: list[Tensor]) -> Tensor:
        return torch.nested.nested_tensor(rows, layout=layout, requires_grad=True)

    rows, weight = [normal(n, 4, DOUBLE, n) for n in (2, 3)], normal(4, 5, DOUBLE, 9)
    x = nested(rows)
    other = nested([weight, weight]) if layout is torch.strided else weight.clone().requires_grad_()
    c = torch.matmul(x, other)
    c.backward(torch.ones_like(c))
    ones = [torch.ones(len(row), 5, dtype=DOUBLE) for row in rows]
    for found, row, grad in zip(x.grad.unbind(), rows, ones, strict=True):
        torch.testing.assert_close(found, grad @ weight.t(), msg=f"{row.shape}")
    expected = [row.t() @ grad for row, grad in zip(rows, ones, strict=True)]
    if layout is torch.strided:
        torch.testing.assert_close(list(other.grad.unbind()), expected)
    else:
        torch.testing.assert_close(other.grad, sum(expected))
