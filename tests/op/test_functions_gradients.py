"""Derivatives of the functions beside mm, of every order and mode, and what autograd's neighbours see of them."""

import copy
import functools
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

import matmul_grad
from matmul_grad.testing import normal

func = torch.func
DOUBLE = torch.float64
OPERATORS = torch.ops.matmul_grad
# The first dual number of a process makes torch script its own formulas, and torch.jit warns that it is deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*")
traces = pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node:UserWarning")


@pytest.fixture(autouse=True)
def strict() -> Iterator[None]:
    with matmul_grad.strict():
        yield


def draw(*shape: int, seed: int = 0) -> Tensor:
    return normal(1, torch.Size(shape).numel(), DOUBLE, seed).view(shape)


# By name: the function, torch's, and the shapes of what it is called with.
Product = Callable[..., Tensor]
SCALES = {"beta": 0.5, "alpha": 2.0}


def scaled(product: Product, **scales: float) -> Product:
    return functools.partial(product, **scales)


ADDMM, BADDBMM = (matmul_grad.addmm, torch.addmm), (matmul_grad.baddbmm, torch.baddbmm)
CASES: dict[str, tuple[Product, Product, tuple[tuple[int, ...], ...]]] = {
    "bmm": (matmul_grad.bmm, torch.bmm, ((2, 3, 4), (2, 4, 2))),
    "addmm": (*ADDMM, ((3, 2), (3, 4), (4, 2))),
    "addmm-bias": (*ADDMM, ((2,), (3, 4), (4, 2))),
    "addmm-scales": (*(scaled(call, **SCALES) for call in ADDMM), ((3, 1), (3, 4), (4, 2))),
    "addmm-beta-0": (*(scaled(call, beta=0) for call in ADDMM), ((3, 2), (3, 4), (4, 2))),
    "baddbmm": (*BADDBMM, ((2, 3, 2), (2, 3, 4), (2, 4, 2))),
    "baddbmm-scales": (*(scaled(call, **SCALES) for call in BADDBMM), ((3, 1), (2, 3, 4), (2, 4, 2))),
    "matmul": (matmul_grad.matmul, torch.matmul, ((2, 1, 3, 4), (2, 4, 2))),
    "matmul-folded": (matmul_grad.matmul, torch.matmul, ((2, 3, 4), (4, 2))),
    "matmul-vectors": (matmul_grad.matmul, torch.matmul, ((4,), (4,))),
    "linear": (matmul_grad.linear, torch.nn.functional.linear, ((2, 3, 4), (2, 4), (2,))),
}
OURS = {name: ours for name, (ours, _, _) in CASES.items()}
TORCHS = {name: theirs for name, (_, theirs, _) in CASES.items()}
SHAPES = {name: shapes for name, (_, _, shapes) in CASES.items()}
every_case = pytest.mark.parametrize("name", CASES)
# The operators themselves, and of the compositions one each: the rest is made of these.
SOME = ["bmm", "addmm-bias", "addmm-scales", "baddbmm-scales", "matmul", "linear"]
some_cases = pytest.mark.parametrize("name", SOME)


def leaves(name: str, needs: bool = True) -> tuple[Tensor, ...]:
    return tuple(draw(*shape, seed=1 + i).requires_grad_(needs) for i, shape in enumerate(SHAPES[name]))


def assert_close(actual: Any, expected: Any, what: str = "") -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9, msg=lambda text: f"{what}: {text}")


class Products(TorchDispatchMode):
    """Counts the products that reach the kernels; none is torch's."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        assert op.name().removeprefix("aten::") not in ("mm", "bmm", "addmm", "baddbmm", "mv", "dot"), op.name()
        if op.namespace == "matmul_grad":
            self.calls[op.name().removeprefix("matmul_grad::")] += 1
        return op(*args, **(kwargs or {}))


# --- numerically --------------------------------------------------------------------------------------------


@every_case
def test_gradcheck(name: str) -> None:
    assert gradcheck(
        OURS[name],
        leaves(name),
        check_forward_ad=True,
        check_batched_grad=True,
        check_batched_forward_grad=True,
        check_undefined_grad=True,
    )


@every_case
def test_gradgradcheck(name: str) -> None:
    assert gradgradcheck(OURS[name], leaves(name), check_fwd_over_rev=True, check_rev_over_rev=True)


# --- what is computed and what is kept ----------------------------------------------------------------------


@pytest.mark.parametrize("which", range(1, 8))
@pytest.mark.parametrize("name", ["addmm-bias", "baddbmm-scales", "linear"])
def test_only_wanted_products_run_and_only_theirs_is_saved(name: str, which: int) -> None:
    operands = leaves(name, needs=False)
    needs = [bool(which >> i & 1) for i in range(3)]
    for x, needed in zip(operands, needs, strict=True):
        x.requires_grad_(needed)
    saved: list[int] = []
    with (
        Products() as forward,
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t),
    ):
        c = OURS[name](*operands)
    with Products() as backward:
        c.backward(torch.ones_like(c))
    assert sum(forward.calls.values()) == 1
    matrices = [x for x in operands if x.dim() > 1] if name != "baddbmm-scales" else operands[1:]
    assert sum(backward.calls.values()) == sum(x.requires_grad for x in matrices)
    others = matrices[::-1]
    assert set(saved) == {x.data_ptr() for x, other in zip(matrices, others, strict=True) if other.requires_grad}
    for x, needed in zip(operands, needs, strict=True):
        assert (x.grad is not None) == needed


@every_case
def test_gradients_match_torch(name: str) -> None:
    """Of an expanded gradient, as ``sum`` hands it, and of a transposed one."""
    for reduce in (lambda c: c.sum(), lambda c: (c.mT if c.dim() > 1 else c).pow(3).flatten()[::2].sum()):
        ours, theirs = leaves(name), leaves(name)
        reduce(OURS[name](*ours)).backward()
        reduce(TORCHS[name](*theirs)).backward()
        assert_close([x.grad for x in ours], [x.grad for x in theirs], name)


@pytest.mark.parametrize("sizes", [(2, 3, 4, 5), (1, 1, 1, 1), (0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0)])
def test_both_gradients_of_a_batch(sizes: tuple[int, ...]) -> None:
    count, m, n, k = sizes
    grad, a, b = draw(count, m, n, seed=3), draw(count, m, k, seed=1), draw(count, k, n, seed=2)
    assert_close(matmul_grad.mm_backward(grad, a, b), (torch.bmm(grad, b.mT), torch.bmm(a.mT, grad)))
    assert matmul_grad.mm_backward(grad, a, b, (True, False))[1] is None


def test_nothing_is_recorded_without_gradients() -> None:
    for name, ours in OURS.items():
        with torch.no_grad():
            assert ours(*leaves(name)).grad_fn is None
        with torch.inference_mode():
            assert ours(*leaves(name)).is_inference()
        assert ours(*leaves(name, needs=False)).grad_fn is None


# --- the graph ----------------------------------------------------------------------------------------------


@some_cases
def test_hooks(name: str) -> None:
    def run(product: Product) -> list[Any]:
        operands, seen = leaves(name), []
        for x in operands:
            x.register_hook(lambda grad: 2 * grad)
        c = product(*operands)
        c.register_hook(lambda grad: 3 * grad)
        c.grad_fn.register_prehook(lambda grads: seen.append(grads[0]))
        c.sin().sum().backward()
        return [*(x.grad for x in operands), *seen]

    assert_close(run(OURS[name]), run(TORCHS[name]))


@some_cases
def test_saved_tensor_hooks(name: str) -> None:
    operands = leaves(name)
    with torch.autograd.graph.save_on_cpu():
        c = OURS[name](*operands)
    packed = leaves(name)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.numpy(force=True).copy(), torch.from_numpy):
        d = OURS[name](*packed)
    assert_close(torch.autograd.grad(c.sin().sum(), operands), torch.autograd.grad(d.sin().sum(), packed))


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled:UserWarning")
@pytest.mark.parametrize(
    ("name", "node"), [("bmm", "Mm|Matmul"), ("addmm", "Addmm|MkldnnLinear"), ("baddbmm", "Addmm|MkldnnLinear")]
)
def test_anomaly_mode(name: str, node: str) -> None:
    with torch.autograd.detect_anomaly():
        OURS[name](*leaves(name)).sum().backward()
        c = OURS[name](*leaves(name))
        with pytest.raises(RuntimeError, match=rf"Function '({node})Backward0?' returned nan values in its 0th output"):
            c.backward(torch.full_like(c, float("nan")))


@some_cases
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint(name: str, use_reentrant: bool) -> None:
    def block(*operands: Tensor) -> Tensor:
        return OURS[name](*(x.tanh() for x in operands)).sin()

    ours, theirs = leaves(name), leaves(name)
    checkpoint(block, *ours, use_reentrant=use_reentrant).sum().backward()
    TORCHS[name](*(x.tanh() for x in theirs)).sin().sum().backward()
    assert_close([x.grad for x in ours], [x.grad for x in theirs])


@pytest.mark.parametrize(("name", "product"), [("bmm", "bmm"), ("linear", "addmm"), ("matmul-folded", "mm")])
@pytest.mark.parametrize("policy", [CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_RECOMPUTE])
def test_selective_checkpoint(name: str, product: str, policy: CheckpointPolicy) -> None:
    """A product that is to be saved is not computed again, and one that is not, is."""
    operator = getattr(OPERATORS, product).default

    def decide(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return policy if op is operator else CheckpointPolicy.PREFER_RECOMPUTE

    ours, theirs = leaves(name), leaves(name)
    contexts = functools.partial(create_selective_checkpoint_contexts, decide)
    c = checkpoint(lambda *x: OURS[name](*x).sin().cos(), *ours, use_reentrant=False, context_fn=contexts)
    with Products() as counted:
        c.sum().backward()
    again = policy is CheckpointPolicy.PREFER_RECOMPUTE
    backward = {"bmm": "bmm", "linear": "mm", "matmul-folded": "mm"}[name]
    expected = Counter({backward: 2}) + Counter({product: int(again)})
    assert counted.calls == expected
    TORCHS[name](*theirs).sin().cos().sum().backward()
    assert_close([x.grad for x in ours], [x.grad for x in theirs])


@every_case
def test_flops(name: str) -> None:
    counts = []
    for product in (OURS[name], TORCHS[name]):
        operands = leaves(name)
        with FlopCounterMode(display=False) as forward:
            c = product(*operands)
        with FlopCounterMode(display=False) as backward:
            c.sum().backward()
        counts.append((forward.get_total_flops(), backward.get_total_flops()))
    if name == "matmul-vectors":  # torch counts no dot
        assert counts[0] == (8, 16)
    else:
        assert counts[0] == counts[1]
        assert counts[0][1] == 2 * counts[0][0] > 0


def test_graphs_of_deep_copies() -> None:
    """A parameter and its copy go through products of their own."""
    a, w = draw(3, 4), torch.nn.Parameter(draw(2, 4))
    twin = copy.deepcopy(w)
    (matmul_grad.linear(a, w) * matmul_grad.linear(a, twin)).sum().backward()
    assert_close(w.grad, twin.grad)


# --- forward mode and torch.func ----------------------------------------------------------------------------


@every_case
@pytest.mark.parametrize("needs", [True, False], ids=["leaves", "constants"])
def test_dual_numbers(name: str, needs: bool) -> None:
    for which in range(1, 2 ** len(SHAPES[name])):
        operands = leaves(name, needs)
        ways = [torch.full_like(x, 0.25 + i) for i, x in enumerate(operands)]
        with forward_ad.dual_level():
            duals = [
                forward_ad.make_dual(x, way) if which >> i & 1 else x
                for i, (x, way) in enumerate(zip(operands, ways, strict=True))
            ]
            ours, theirs = (forward_ad.unpack_dual(call(*duals)) for call in (OURS[name], TORCHS[name]))
            assert_close(ours.primal, theirs.primal)
            assert_close(ours.tangent, theirs.tangent)
            assert ours.primal.requires_grad == needs


def scalar(product: Product) -> Product:
    return lambda *operands: product(*(x.sin() for x in operands)).pow(2).sum()


def every(operands: tuple[Tensor, ...]) -> tuple[int, ...]:
    return tuple(range(len(operands)))


TRANSFORMS: dict[str, Callable[[Product], Callable[..., Any]]] = {
    "grad": lambda p: lambda *x: func.grad(scalar(p), every(x))(*x),
    "grad-last": lambda p: lambda *x: func.grad(scalar(p), len(x) - 1)(*x),
    "grad-grad": lambda p: lambda *x: func.grad(lambda *y: func.grad(scalar(p))(*y).pow(2).sum(), every(x))(*x),
    "vjp": lambda p: lambda *x: func.vjp(p, *x)[1](torch.ones_like(p(*x))),
    "jvp": lambda p: lambda *x: func.jvp(p, x, tuple(y.cos() for y in x)),
    "jvp-grad": lambda p: lambda *x: func.jvp(func.grad(scalar(p), every(x)), x, tuple(y.cos() for y in x)),
    "grad-jvp": lambda p: (
        lambda *x: func.grad(lambda *y: func.jvp(p, y, tuple(z.cos() for z in y))[1].sum(), every(x))(*x)
    ),
    "jacrev": lambda p: lambda *x: func.jacrev(p, every(x))(*x),
    "jacfwd": lambda p: lambda *x: func.jacfwd(p, every(x))(*x),
    "hessian": lambda p: lambda *x: func.hessian(scalar(p), every(x))(*x),
    "jacrev-jacrev": lambda p: lambda *x: func.jacrev(func.jacrev(scalar(p), every(x)), every(x))(*x),
    "functionalize": lambda p: lambda *x: func.functionalize(func.grad(scalar(p), every(x)))(*x),
}


@traces
@pytest.mark.parametrize("transform", TRANSFORMS)
@some_cases
def test_transform(name: str, transform: str) -> None:
    operands = leaves(name, needs=False)
    ours, theirs = (TRANSFORMS[transform](call)(*operands) for call in (OURS[name], TORCHS[name]))
    assert_close(ours, theirs, f"{name} {transform}")


def batched(name: str, which: int, where: int) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
    """The operands of a case, those of the bits of ``which`` in batches of three, and where their batches lie."""
    in_dims = tuple((min(where, x.dim()) if which >> i & 1 else None) for i, x in enumerate(leaves(name, needs=False)))
    operands = leaves(name, needs=False)
    return tuple(
        x if dim is None else torch.stack([x, 2 * x, x - 1], dim) for x, dim in zip(operands, in_dims, strict=True)
    ), in_dims


@some_cases
@pytest.mark.parametrize("where", [0, 1, 2])
def test_batches_by_vmap(name: str, where: int) -> None:
    """Every choice of batched operands: values, gradients through them, gradients of each, batches of batches."""
    for which in range(1, 2 ** len(SHAPES[name])):
        operands, in_dims = batched(name, which, where)
        for transform in (lambda p: p, lambda p: TRANSFORMS["grad"](p), lambda p: TRANSFORMS["jvp"](p)):
            ours, theirs = (func.vmap(transform(call), in_dims)(*operands) for call in (OURS[name], TORCHS[name]))
            assert_close(ours, theirs, f"{name} {in_dims}")
        graphs = []
        for call in (OURS[name], TORCHS[name]):
            found = [x.clone().requires_grad_() for x in operands]
            graphs.append(torch.autograd.grad(func.vmap(call, in_dims)(*found).sin().sum(), found))
        assert_close(*graphs)
        twice = [torch.stack([x, x + 1]) for x in operands]
        nested = [func.vmap(func.vmap(call, in_dims))(*twice) for call in (OURS[name], TORCHS[name])]
        assert_close(*nested)


def test_a_batch_is_one_product() -> None:
    a, b, w, bias = draw(5, 3, 4), draw(5, 4, 2), draw(4, 2), draw(2)
    for call, expected in (
        (lambda: func.vmap(matmul_grad.mm)(a, b), {"bmm": 1}),
        (lambda: func.vmap(matmul_grad.mm, (0, None))(a, w), {"mm": 1}),
        (lambda: func.vmap(func.vmap(matmul_grad.mm))(a[None], b[None]), {"bmm": 1}),
        (lambda: func.vmap(matmul_grad.bmm, (0, None))(a[None], b), {"bmm": 1}),
        (lambda: func.vmap(matmul_grad.addmm, (None, 0, None))(bias, a, w), {"baddbmm": 1}),
        (lambda: func.vmap(matmul_grad.linear)(a, b.mT), {"bmm": 1}),
    ):
        with Products() as counted:
            call()
        assert counted.calls == expected
