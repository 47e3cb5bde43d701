"""Derivatives of every order and mode, and what autograd is left with."""

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import matmul_grad
from matmul_grad.testing import assert_same_bits, exact_product, integers, normal

func = torch.func
DOUBLE = torch.float64
# The first dual number of a process makes torch script its own formulas, and torch.jit warns that it is deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*")
# linearize traces, and torch.fx warns of the constants that it meets itself; torch.mm brings the same.
traces = pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node:UserWarning")


@pytest.fixture(autouse=True)
def strict() -> Iterator[None]:
    with matmul_grad.strict():
        yield


def leaves(m: int = 3, n: int = 2, k: int = 4, a: bool = True, b: bool = True) -> tuple[Tensor, Tensor]:
    """Operands in double precision, each a leaf that needs a gradient or not."""
    return (
        normal(m, k, DOUBLE, seed=1).requires_grad_(a),
        normal(k, n, DOUBLE, seed=2).requires_grad_(b),
    )


def assert_close(actual: Any, expected: Any, what: str = "") -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9, msg=lambda text: f"{what}: {text}")


class Products(TorchDispatchMode):
    """Counts the products that reach the kernels, by the shapes of their operands."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: Counter[tuple[tuple[int, ...], tuple[int, ...]]] = Counter()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op is torch.ops.matmul_grad.mm.default:
            self.shapes[tuple(args[0].shape), tuple(args[1].shape)] += 1
        assert op.name() not in ("aten::mm", "aten::matmul", "aten::addmm"), f"{op.name()} was called"
        return op(*args, **(kwargs or {}))


# --- numerically --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)], ids=["both", "a", "b"])
@pytest.mark.parametrize("m,n,k", [(3, 2, 4), (1, 1, 1), (1, 5, 2), (7, 1, 3), (0, 2, 3), (2, 3, 0)])
def test_gradcheck(m: int, n: int, k: int, needs: tuple[bool, bool]) -> None:
    pair = leaves(m, n, k, *needs)
    batched = m * n * k > 0
    assert gradcheck(
        matmul_grad.mm,
        pair,
        check_forward_ad=True,
        check_batched_grad=batched,
        check_batched_forward_grad=batched,
        check_undefined_grad=True,
    )


@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)], ids=["both", "a", "b"])
def test_gradgradcheck(needs: tuple[bool, bool]) -> None:
    pair = leaves(3, 2, 4, *needs)
    assert gradgradcheck(
        matmul_grad.mm, pair, check_fwd_over_rev=True, check_rev_over_rev=True, check_batched_grad=True
    )


@pytest.mark.parametrize("mask", [(True, True), (True, False), (False, True)], ids=["both", "a", "b"])
def test_backward_of_the_backward(mask: tuple[bool, bool]) -> None:
    grad = normal(3, 2, DOUBLE, seed=3).requires_grad_()

    def wanted(grad: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        return tuple(x for x in matmul_grad.mm_backward(grad, a, b, mask) if x is not None)

    assert gradcheck(wanted, (grad, *leaves()), check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(wanted, (grad, *leaves()))


def test_transposed_and_sliced_operands() -> None:
    big = normal(9, 9, DOUBLE).requires_grad_()
    assert gradcheck(lambda x: matmul_grad.mm(x[1::2, 2:8].t(), x[:4, ::3]), (big,))
    assert gradcheck(lambda x: matmul_grad.mm(x[:1].expand(5, 9), x[:, :1].expand(9, 4)), (big,))


# --- what is computed and what is kept ----------------------------------------------------------------------


@pytest.mark.parametrize("a_needs", [True, False])
@pytest.mark.parametrize("b_needs", [True, False])
def test_only_wanted_products_run(a_needs: bool, b_needs: bool) -> None:
    a, b = leaves(3, 2, 4, a_needs, b_needs)
    with Products() as counted:
        c = matmul_grad.mm(a, b)
        assert c.requires_grad == (a_needs or b_needs)
        if c.requires_grad:
            c.backward(torch.ones_like(c))
    expected = {((3, 4), (4, 2)): 1}
    if a_needs:
        expected[(3, 2), (2, 4)] = 1
    if b_needs:
        expected[(4, 3), (3, 2)] = 1
    assert counted.shapes == expected
    assert (a.grad is not None) == a_needs
    assert (b.grad is not None) == b_needs


@pytest.mark.parametrize("a_needs", [True, False])
@pytest.mark.parametrize("b_needs", [True, False])
def test_an_operand_is_saved_only_for_the_others_gradient(a_needs: bool, b_needs: bool) -> None:
    a, b = leaves(3, 2, 4, a_needs, b_needs)
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        matmul_grad.mm(a, b)
    assert saved == [a.data_ptr()] * b_needs + [b.data_ptr()] * a_needs


def test_nothing_is_recorded_without_gradients() -> None:
    a, b = leaves()
    with torch.no_grad():
        assert matmul_grad.mm(a, b).grad_fn is None
    with torch.inference_mode():
        assert matmul_grad.mm(a, b).is_inference()
    assert matmul_grad.mm(a.detach(), b.detach()).grad_fn is None


# --- awkward gradients --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
@pytest.mark.parametrize("m,n,k", [(3, 2, 4), (65, 129, 33), (1, 70, 1)])
def test_expanded_gradient_of_a_sum(m: int, n: int, k: int, dtype: torch.dtype) -> None:
    a, b = integers(m, k, dtype, seed=1).requires_grad_(), integers(k, n, dtype, seed=2).requires_grad_()
    seen: list[tuple[int, ...]] = []
    c = matmul_grad.mm(a, b)
    c.register_hook(lambda grad: seen.append(grad.stride()))
    c.sum().backward()
    assert seen == [(0, 0)]
    ones = torch.ones(m, n, dtype=dtype)
    assert_same_bits(a.grad, exact_product(ones, b.detach().t()))
    assert_same_bits(b.grad, exact_product(a.detach().t(), ones))


@pytest.mark.parametrize("dim", [0, 1])
def test_gradient_from_cat_is_a_view(dim: int) -> None:
    a, b = integers(13, 9, DOUBLE, seed=1).requires_grad_(), integers(9, 13, DOUBLE, seed=2).requires_grad_()
    parts = [matmul_grad.mm(a, b), torch.ones(13, 13, dtype=DOUBLE), matmul_grad.mm(b.t(), a.t())]
    grad = integers(39, 13, DOUBLE, seed=3) if dim == 0 else integers(13, 39, DOUBLE, seed=3)
    torch.cat(parts, dim).backward(grad)
    first, _, last = grad.chunk(3, dim)
    assert_same_bits(a.grad, exact_product(first, b.detach().t()) + exact_product(last.t(), b.detach().t()))
    assert_same_bits(b.grad, exact_product(a.detach().t(), first) + exact_product(a.detach().t(), last.t()))


def test_one_tensor_as_both_operands() -> None:
    x = integers(5, 5, DOUBLE).requires_grad_()
    matmul_grad.mm(x, x).sum().backward()
    ones, plain = torch.ones(5, 5, dtype=DOUBLE), x.detach()
    assert_same_bits(x.grad, exact_product(ones, plain.t()) + exact_product(plain.t(), ones))


# --- the graph ----------------------------------------------------------------------------------------------


def test_hooks_see_and_change_the_gradient() -> None:
    a, b = leaves()
    a.register_hook(lambda grad: 2 * grad)
    c = matmul_grad.mm(a, b)
    seen: list[tuple[Any, Any]] = []
    c.grad_fn.register_hook(lambda ins, outs: seen.append((ins, outs)))
    c.register_hook(lambda grad: 3 * grad)
    c.sum().backward()
    ones = torch.ones(3, 2, dtype=DOUBLE)
    assert_close(a.grad, 6 * ones @ b.detach().t())
    assert_close(seen[0][1][0], 3 * ones)
    assert_close(seen[0][0][1], 3 * a.detach().t() @ ones)


def test_graph_is_freed_unless_retained() -> None:
    a, b = leaves()
    c = matmul_grad.mm(a, b)
    grad = torch.ones_like(c)
    c.backward(grad, retain_graph=True)
    once = a.grad.clone()
    c.backward(grad)
    assert_close(a.grad, 2 * once)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        c.backward(grad)


@pytest.mark.parametrize("changed", ["a", "b"])
def test_change_in_place_of_a_saved_operand_is_an_error(changed: str) -> None:
    def outcome(mm: Callable[[Tensor, Tensor], Tensor]) -> str:
        a, b = leaves()
        x, y = a * 1, b * 1
        c = mm(x, y)
        (x if changed == "a" else y).add_(1)
        with pytest.raises(RuntimeError) as raised:
            c.sum().backward()
        return str(raised.value)

    ours, theirs = outcome(matmul_grad.mm), outcome(torch.mm)
    assert "modified by an inplace operation" in ours
    assert "is at version 1; expected version 0" in ours
    assert "is at version 1; expected version 0" in theirs


def test_change_in_place_of_what_is_not_saved_is_allowed() -> None:
    a, b = leaves(b=False)
    x = a * 1
    c = matmul_grad.mm(x, b)
    x.add_(1)
    c.sum().backward()
    assert_close(a.grad, torch.ones_like(c) @ b.t())


def test_result_can_be_changed_in_place() -> None:
    a, b = leaves()
    c = matmul_grad.mm(a, b)
    c.mul_(2).relu_().sum().backward()
    expected = torch.autograd.grad((torch.mm(a, b) * 2).relu().sum(), (a, b))
    assert_close((a.grad, b.grad), expected)


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled:UserWarning")
def test_anomaly_mode() -> None:
    a, b = leaves()
    with torch.autograd.detect_anomaly():
        matmul_grad.mm(a, b).sum().backward()
        with pytest.raises(RuntimeError, match=r"Function 'M.*Backward0?' returned nan values in its 0th output"):
            matmul_grad.mm(a, b).backward(torch.full((3, 2), float("nan"), dtype=DOUBLE))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint(use_reentrant: bool) -> None:
    def block(x: Tensor, y: Tensor) -> Tensor:
        return matmul_grad.mm(matmul_grad.mm(x, y).tanh(), y.t())

    a, b = leaves()
    checkpoint(block, a, b, use_reentrant=use_reentrant).sum().backward()
    assert_close((a.grad, b.grad), torch.autograd.grad(block(a, b).sum(), (a, b)))


def test_backward_in_several_threads() -> None:
    """A shared leaf gets every thread's gradient; each thread's own leaf its own."""
    shared = integers(33, 41, DOUBLE, seed=1).requires_grad_()
    own = [integers(41, 20 + i, DOUBLE, seed=i).requires_grad_() for i in range(4)]
    failures: list[BaseException] = []
    grads: list[Any] = [None] * 4

    def work(i: int) -> None:
        try:
            for _ in range(10):
                grads[i] = torch.autograd.grad(matmul_grad.mm(shared, own[i]).sum(), (shared, own[i]))
        except BaseException as error:
            failures.append(error)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures
    for (dshared, down), b in zip(grads, own, strict=True):
        ones = torch.ones(33, b.shape[1], dtype=DOUBLE)
        assert_same_bits(dshared, exact_product(ones, b.detach().t()))
        assert_same_bits(down, exact_product(shared.detach().t(), ones))


# --- forward mode and torch.func ----------------------------------------------------------------------------


@pytest.mark.parametrize("tangents", [(True, True), (True, False), (False, True)], ids=["both", "a", "b"])
@pytest.mark.parametrize("recording", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("needs", [True, False], ids=["leaves", "constants"])
def test_dual_numbers(tangents: tuple[bool, bool], recording: bool, needs: bool) -> None:
    pair = leaves(a=needs, b=needs)
    ways = [normal(*x.shape, DOUBLE, seed=5 + i) for i, x in enumerate(pair)]
    with forward_ad.dual_level(), torch.set_grad_enabled(recording):
        duals = [forward_ad.make_dual(x, way) if has else x for x, way, has in zip(pair, ways, tangents, strict=True)]
        value, tangent = forward_ad.unpack_dual(matmul_grad.mm(*duals))
        (a, b), (da, db) = pair, ways
        assert_close(value, a @ b, "value")
        assert_close(tangent, tangents[0] * (da @ b) + tangents[1] * (a @ db), "tangent")
        assert value.requires_grad == (needs and recording)


def test_dual_numbers_outside_forward_mode_have_no_tangent() -> None:
    a, b = leaves()
    with forward_ad.dual_level():
        assert forward_ad.unpack_dual(matmul_grad.mm(a, b)).tangent is None
        with forward_ad._set_fwd_grad_enabled(False):
            dual = forward_ad.make_dual(a, torch.ones_like(a))
            assert forward_ad.unpack_dual(matmul_grad.mm(dual, b)).tangent is None


def scalar(mm: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda a, b: mm(mm(a, b).sin(), b.t()).pow(2).sum()


Mm = Callable[[Tensor, Tensor], Tensor]
TRANSFORMS: dict[str, Callable[[Mm], Callable[[Tensor, Tensor], Any]]] = {
    "grad": lambda mm: func.grad(scalar(mm), (0, 1)),
    "grad-a": lambda mm: func.grad(scalar(mm), 0),
    "grad-b": lambda mm: func.grad(scalar(mm), 1),
    "grad-and-value": lambda mm: func.grad_and_value(scalar(mm), (0, 1)),
    "grad-grad": lambda mm: func.grad(lambda a, b: func.grad(scalar(mm))(a, b).pow(2).sum(), (0, 1)),
    "vjp": lambda mm: lambda a, b: func.vjp(mm, a, b)[1](torch.ones(3, 2, dtype=DOUBLE)),
    "jvp": lambda mm: lambda a, b: func.jvp(mm, (a, b), (a.cos(), b.sin())),
    "jvp-grad": lambda mm: lambda a, b: func.jvp(func.grad(scalar(mm), (0, 1)), (a, b), (b.t()[:1] + a, b)),
    "grad-jvp": lambda mm: func.grad(lambda a, b: func.jvp(mm, (a, b), (a.cos(), b))[1].sum(), (0, 1)),
    "linearize": lambda mm: lambda a, b: func.linearize(mm, a, b)[1](a.cos(), b),
    "jacrev": lambda mm: func.jacrev(mm, (0, 1)),
    "jacfwd": lambda mm: func.jacfwd(mm, (0, 1)),
    "hessian": lambda mm: func.hessian(scalar(mm), (0, 1)),
    "jacrev-jacrev": lambda mm: func.jacrev(func.jacrev(scalar(mm), (0, 1)), (0, 1)),
    "jacfwd-jacfwd": lambda mm: func.jacfwd(func.jacfwd(scalar(mm), (0, 1)), (0, 1)),
    "functionalize": lambda mm: func.functionalize(func.grad(scalar(mm), (0, 1))),
}


@traces
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transform(name: str) -> None:
    a, b = leaves(a=False, b=False)
    assert_close(TRANSFORMS[name](matmul_grad.mm)(a, b), TRANSFORMS[name](torch.mm)(a, b), name)


@pytest.mark.parametrize("in_dims", [(0, 0), (0, None), (None, 0), (1, 2)], ids=str)
@pytest.mark.parametrize("name", sorted(TRANSFORMS.keys() - {"functionalize", "linearize"}))
def test_transform_of_a_batch(name: str, in_dims: tuple[int | None, int | None]) -> None:
    sides = zip(in_dims, leaves(a=False, b=False), strict=True)
    a, b = (x if dim is None else torch.stack([x, 2 * x, x - 1], dim) for dim, x in sides)
    ours = func.vmap(TRANSFORMS[name](matmul_grad.mm), in_dims)(a, b)
    assert_close(ours, func.vmap(TRANSFORMS[name](torch.mm), in_dims)(a, b), name)


@pytest.mark.parametrize("in_dims", [(0, 0), (0, None), (None, 0), (1, 2)], ids=str)
def test_gradient_through_a_batch(in_dims: tuple[int | None, int | None]) -> None:
    sides = zip(in_dims, leaves(), strict=True)
    a, b = (x if dim is None else torch.stack([x, 2 * x, x - 1], dim) for dim, x in sides)

    def grads(mm: Mm) -> Any:
        return torch.autograd.grad(func.vmap(scalar(mm), in_dims)(a, b).sum(), (a, b))

    assert_close(grads(matmul_grad.mm), grads(torch.mm))
    nested = [func.vmap(func.vmap(mm, (0, None)), (None, 0)) for mm in (matmul_grad.mm, torch.mm)]
    x, y = torch.stack([a.flatten()[:12].view(3, 4)] * 2), torch.stack([b.flatten()[:8].view(4, 2)] * 5)
    assert_close(nested[0](x, y), nested[1](x, y))
