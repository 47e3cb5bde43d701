"""Products with two gradients, recorded by a C++ node of torch: all cases in which it must behave as torch.mm."""

import gc
import platform
import sys
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo import compiled_autograd
from torch._dynamo.backends.common import aot_autograd
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import matmul_grad
from matmul_grad.testing import assert_same_bits, exact_product, integers, normal

DOUBLE = torch.float64
HERE = sys.platform == "linux" and platform.machine() in ("x86_64", "AMD64")
pytestmark = [
    pytest.mark.skipif(not HERE, reason="recorded by Functions in Python on other systems: see graph.prepare"),
    # The first dual number of a process makes torch script its own formulas, and torch.jit warns of that.
    pytest.mark.filterwarnings("ignore:.*torch.jit.*"),
]


@pytest.fixture(autouse=True)
def strict() -> Iterator[None]:
    matmul_grad.mm(*leaves()[:2])  # the first one, by a Function, tries the others
    with matmul_grad.strict():
        yield


def leaves(*batch: int, dtype: torch.dtype = DOUBLE) -> tuple[Tensor, Tensor, Tensor]:
    """A (3, 4) and B (4, 2) of small integers that need a gradient, and the gradient of their product."""
    a, b, grad = (integers(max(1, *batch, 1) * m, n, dtype, seed=m) for m, n in ((3, 4), (4, 2), (3, 2)))
    a, b, grad = (x.view(*batch, -1, x.shape[-1]) for x in (a, b, grad))
    return a.requires_grad_(), b.requires_grad_(), grad


def is_recorded(c: Tensor) -> bool:
    return type(c.grad_fn).__name__ == "MatmulBackward0"


class Products(TorchDispatchMode):
    """The operators of this package that a mode sees."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names += [op.name()] if "matmul" in op.name() else []
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", [(), (5,)], ids=["mm", "bmm"])
def test_both_gradients_are_exact(batch: tuple[int, ...], dtype: torch.dtype) -> None:
    a, b, grad = leaves(*batch, dtype=dtype)
    matmul_grad.mm(torch.ones(1, 1, dtype=dtype), torch.ones(1, 1, dtype=dtype))  # which loads the kernels
    c = (matmul_grad.bmm if batch else matmul_grad.mm)(a, b)
    assert is_recorded(c)
    assert_same_bits(c.detach(), exact_product(a.detach(), b.detach()))
    c.backward(grad)
    assert_same_bits(a.grad, exact_product(grad, b.detach().mT))
    assert_same_bits(b.grad, exact_product(a.detach().mT, grad))


SHAPES: list[tuple[int, ...]] = [(2,), (1,), (3, 2), (1, 2), (3, 1), ()]


@pytest.mark.parametrize("needs", [True, False], ids=["needs", "constant"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_addmm_has_the_gradients_of_torch(shape: tuple[int, ...], needs: bool) -> None:
    a, b, grad = leaves()
    added = integers(1, 6, DOUBLE, seed=9)[0, : torch.Size(shape).numel()].view(shape).clone().requires_grad_(needs)
    c, expected = (function(added, a, b) for function in (matmul_grad.addmm, torch.addmm))
    assert type(c.grad_fn).__name__ == "MkldnnLinearBackward0" and c._version == 0
    assert_same_bits(c.detach(), expected.detach())
    inputs = (a, b, added) if needs else (a, b)
    for ours, theirs in zip(
        torch.autograd.grad(c, inputs, grad), torch.autograd.grad(expected, inputs, grad), strict=True
    ):
        assert_same_bits(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE, torch.bfloat16], ids=str)
@pytest.mark.parametrize("m,n,k", [(3, 2, 4), (17, 33, 129), (64, 64, 64), (300, 120, 7)])
def test_addmm_has_the_bits_of_the_epilogue(m: int, n: int, k: int, dtype: torch.dtype) -> None:
    a, b = normal(m, k, dtype, 1), normal(k, n, dtype, 2)
    added = normal(1, n, dtype, 3)[0]
    matmul_grad.mm(a, b)
    expected = matmul_grad.addmm(added, a, b)
    c = matmul_grad.addmm(added, a.requires_grad_(), b.requires_grad_())
    assert type(c.grad_fn).__name__ == "MkldnnLinearBackward0"
    assert_same_bits(c.detach(), expected)
    one = matmul_grad.addmm(added, a.detach(), b)
    assert (type(one.grad_fn).__name__ == "AddBackward0") == (dtype != torch.bfloat16 and m * n <= 1 << 15)
    assert one._version == 0
    assert_same_bits(one.detach(), expected)


def test_other_addmms_are_recorded_by_functions() -> None:
    a, b, _ = leaves()
    added = torch.ones(2, dtype=DOUBLE, requires_grad=True)

    def node(*operands: Tensor, **scales: float) -> str:
        return type(matmul_grad.addmm(*operands, **scales).grad_fn).__name__

    assert node(added, a, b) == "MkldnnLinearBackward0"
    assert node(added, a, b.detach()) == node(added, a.detach(), b) == "AddBackward0"
    assert node(added, a, b, beta=2) == node(added, a, b, alpha=0.5) == "AddmmBackward"
    assert node(torch._neg_view(added), a, b) == node(added, a.detach(), b.detach()) == "AddmmBackward"
    with forward_ad.dual_level():
        assert node(forward_ad.make_dual(added, torch.ones_like(added)), a, b) == "AddmmBackward"
    for wrong in (torch.ones(3, dtype=DOUBLE), torch.ones(1, 3, 2, dtype=DOUBLE)):
        messages = []
        for addmm in (matmul_grad.addmm, torch.addmm):
            with pytest.raises(RuntimeError) as raised:
                addmm(wrong, a, b)
            messages.append(str(raised.value))
        assert messages[0] == messages[1]
    freed = torch.ones(2, dtype=DOUBLE)
    freed.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="data is not allocated"):
        matmul_grad.addmm(freed, a, b)


@pytest.mark.parametrize("m,n,k", [(1, 1, 1), (70, 65, 129), (1, 300, 7), (33, 1, 500)])
def test_same_bits_as_recorded_by_functions(m: int, n: int, k: int) -> None:
    a, b = normal(m, k, torch.float32, 1).requires_grad_(), normal(k, n, torch.float32, 2).requires_grad_()
    grad = normal(m, n, torch.float32, 3)
    c = matmul_grad.mm(a, b)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        other = matmul_grad.mm(a, b)
    assert is_recorded(c) and not is_recorded(other)
    assert_same_bits(c.detach(), other.detach())
    for x, y in zip(torch.autograd.grad(c, (a, b), grad), torch.autograd.grad(other, (a, b), grad), strict=True):
        assert_same_bits(x, y)


@pytest.mark.parametrize("wanted", [0, 1], ids=["a", "b"])
def test_gradient_of_one_operand_is_one_product(wanted: int) -> None:
    pair, grad = leaves()[:2], leaves()[2]
    c = matmul_grad.mm(*pair)
    with Products() as seen:
        (counted,) = torch.autograd.grad(c, pair[wanted], grad, retain_graph=True)
    assert seen.names == ["matmul_grad::mm"]
    (found,) = torch.autograd.grad(c, pair[wanted], grad)
    assert_same_bits(found, counted)


ONE_GRADIENT: dict[str, tuple[str, tuple[int, ...], tuple[int, ...]]] = {
    "mm": ("mm", (3, 4), (4, 2)),
    "bmm": ("bmm", (5, 3, 4), (5, 4, 2)),
    "matmul of a vector": ("matmul", (5, 3, 4), (4,)),
    "matmul of a matrix": ("matmul", (5, 3, 4), (4, 2)),
    "matmul of batches": ("matmul", (2, 5, 3, 4), (2, 5, 4, 2)),
    "linear": ("linear", (5, 3, 4), (2, 4)),
}


@pytest.mark.parametrize("wanted", [0, 1], ids=["a", "b"])
@pytest.mark.parametrize("case", ONE_GRADIENT)
def test_one_gradient_saves_what_it_uses(case: str, wanted: int) -> None:
    name, *shapes = ONE_GRADIENT[case]
    function, torch_function = getattr(matmul_grad, name), getattr(torch, name, torch.nn.functional.linear)
    pair = [integers(1, torch.Size(shape).numel(), DOUBLE, seed=len(shape)).view(shape).clone() for shape in shapes]
    pair[wanted].requires_grad_()
    c, expected = function(*pair), torch_function(*(x.detach().clone().requires_grad_(x.requires_grad) for x in pair))
    assert type(c.grad_fn).__name__ == "LinearBackward0" and c._version == 0
    assert_same_bits(c.detach(), expected.detach())
    grad = integers(1, c.numel(), DOUBLE, seed=7).view(c.shape)
    (right,) = torch.autograd.grad(torch_function(*pair), pair[wanted], grad)
    with torch.no_grad():
        pair[wanted].zero_()  # it is not saved
    (found,) = torch.autograd.grad(c, pair[wanted], grad, retain_graph=True)
    assert_same_bits(found, right)
    pair[1 - wanted].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(c, pair[wanted], grad)


NOT_RECORDED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "one gradient": lambda a, b: matmul_grad.mm(a, b.detach()),
    "the other gradient": lambda a, b: matmul_grad.mm(a.detach(), b),
    "conjugate": lambda a, b: matmul_grad.mm(torch._neg_view(a), b),
    "no elements": lambda a, b: matmul_grad.mm(a[:0], b),
    "other dtype": lambda a, b: matmul_grad.mm(a, b.to(torch.complex128).real),
}


@pytest.mark.parametrize("name", NOT_RECORDED)
def test_other_products_have_the_gradients_of_torch(name: str) -> None:
    a, b, grad = leaves()
    c = NOT_RECORDED[name](a, b)
    (c * grad[: c.shape[0]]).sum().backward()
    x, y, _ = leaves()
    real, matmul_grad_mm = torch.mm, matmul_grad.mm
    try:
        matmul_grad.mm = real
        expected = NOT_RECORDED[name](x, y)
    finally:
        matmul_grad.mm = matmul_grad_mm
    (expected * grad[: c.shape[0]]).sum().backward()
    assert_same_bits(c.detach(), expected.detach())
    for ours, theirs in ((a, x), (b, y)):
        assert (ours.grad is None) == (theirs.grad is None)
        if ours.grad is not None:
            assert_same_bits(ours.grad, theirs.grad)


def test_under_a_mode_of_python_functions_record() -> None:
    a, b, _ = leaves()
    with Products() as seen:
        c = matmul_grad.mm(a, b)
    assert seen.names == ["matmul_grad::mm"]
    assert not is_recorded(c)


def test_modes_of_backward_see_the_operators_of_this_package() -> None:
    a, b, grad = leaves()
    c = matmul_grad.mm(a, b)
    with Products() as seen:
        c.backward(grad)
    assert seen.names == ["matmul_grad::mm"] * 2
    with FlopCounterMode(display=False) as flops:
        matmul_grad.mm(a, b).backward(grad)
    assert flops.get_total_flops() == 3 * 2 * 3 * 4 * 2


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


def test_errors_are_torch_s() -> None:
    a, b, grad = leaves()

    def error(call: Callable[[], Any]) -> str:
        with pytest.raises(RuntimeError) as raised:
            call()
        return str(raised.value).split("[", maxsplit=1)[0]

    for pair in ((a, a), (a.view(12), b), (a.view(1, 3, 4), b.view(1, 4, 2))):
        assert error(lambda: matmul_grad.mm(*pair)) == error(lambda: torch.mm(*pair))  # noqa: B023
    for mm in (matmul_grad.mm, torch.mm):
        c = mm(a, b)
        c.backward(grad)
        assert "backward through the graph a second time" in error(lambda: c.backward(grad))  # noqa: B023
    assert error(lambda: matmul_grad.mm(a, b).backward(grad.t())) == error(lambda: torch.mm(a, b).backward(grad.t()))


def test_storage_that_is_freed_before_backward_is_an_error() -> None:
    a, b, grad = leaves()
    c = matmul_grad.mm(a, b)
    b.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="storage"):
        torch.autograd.grad(c, (a, b), grad)


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
