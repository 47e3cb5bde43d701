"""Grouped products: results, gradients of every order, transforms, tracing, errors, and torch's under the switch."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from dtypes import EVERY
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck
from torch.nn.functional import grouped_mm
from torch.utils.flop_counter import FlopCounterMode

import matmul_grad
from matmul_grad.testing import assert_same_bits

ENDS = torch.tensor([2, 2, 6], dtype=torch.int32)  # one group is empty, and one row of seven is in none
SHAPES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "rows": ((7, 3), (3, 3, 4)),
    "columns": ((3, 2, 3), (3, 7)),
    "steps": ((5, 7), (7, 2)),
    "batches": ((3, 2, 3), (3, 3, 4)),
}
every_form = pytest.mark.parametrize("form", SHAPES)
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*")
reads_grad = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
OPERATOR = torch.ops.matmul_grad.grouped_mm.default


def offs_of(form: str) -> Tensor | None:
    return None if form == "batches" else ENDS


def operands(form: str, dtype: torch.dtype = torch.float64, transposed: bool = False) -> tuple[Tensor, Tensor]:
    """Leaves, or leaves' transposes, that need a gradient."""
    found = []
    for seed, shape in enumerate(SHAPES[form]):
        generator = torch.Generator().manual_seed(seed)
        order = (*shape[:-2], shape[-1], shape[-2]) if transposed else shape
        leaf = torch.randint(-4, 5, order, generator=generator).to(dtype).requires_grad_()
        found.append(leaf.mT if transposed else leaf)
    return found[0], found[1]


def reference(a: Tensor, b: Tensor, offs: Tensor | None) -> Tensor:
    """By masks, in one einsum, so that its gradients are torch's."""
    if offs is None:
        return a @ b
    whole = b.shape[-1] if a.dim() > b.dim() else a.shape[-1 if a.dim() == b.dim() else 0]
    begins = torch.cat([offs.new_zeros(1), offs[:-1]])
    at = torch.arange(whole)
    mask = ((at >= begins[:, None]) & (at < offs[:, None])).to(a.dtype)
    equation = {(2, 3): "rk,gkn,gr->rn", (3, 2): "gmk,kr,gr->mr", (2, 2): "mr,rn,gr->gmn"}[a.dim(), b.dim()]
    return torch.einsum(equation, a, b, mask)


@every_form
@pytest.mark.parametrize("dtype", EVERY)
@pytest.mark.parametrize("transposed", [False, True], ids=["as-is", "transposed"])
def test_products_and_gradients_are_exact(form: str, dtype: torch.dtype, transposed: bool) -> None:
    """With the gradient of a plain sum too, which has no strides."""
    a, b = operands(form, dtype, transposed)
    with matmul_grad.strict():
        result = matmul_grad.grouped_mm(a, b, offs=offs_of(form))
        expected = reference(a.double(), b.double(), offs_of(form)).to(dtype)
        assert_same_bits(result + 0.0, expected + 0.0)
        grad = torch.ones(()).to(dtype).expand(result.shape)
        found = torch.autograd.grad(result.sum(), (a, b))
        alone = [torch.autograd.grad(matmul_grad.grouped_mm(*pair, offs=offs_of(form)).sum(), x)[0] for x, pair in
                 ((a, (a, b.detach())), (b, (a.detach(), b)))]  # fmt: skip
    for ours, torchs, one in zip(found, torch.autograd.grad(expected, (a, b), grad), alone, strict=True):
        assert_same_bits(ours + 0.0, torchs + 0.0)
        assert_same_bits(one, ours)
    if form == "rows" and transposed:
        assert found[1].stride() == b.stride()  # as torch's, so that no copy is needed where it is accumulated


@every_form
@pytest.mark.parametrize("transposed", [False, True], ids=["as-is", "transposed"])
def test_derivatives_of_both_orders_and_tangents(form: str, transposed: bool) -> None:
    def call(a: Tensor, b: Tensor) -> Tensor:
        a, b = (a.mT, b.mT) if transposed else (a, b)
        return matmul_grad.grouped_mm(a, b, offs=offs_of(form))

    a, b = (x.detach().mT if transposed else x.detach() for x in operands(form, transposed=transposed))
    leaves = (a.requires_grad_(), b.requires_grad_())
    assert gradcheck(call, leaves, check_forward_ad=True, fast_mode=True)
    assert gradgradcheck(call, leaves, fast_mode=True)


@every_form
def test_transforms(form: str) -> None:
    a, b = (x.detach() for x in operands(form))
    items = torch.stack([a, 2 * a])

    def call(one: Tensor, other: Tensor) -> Tensor:
        return matmul_grad.grouped_mm(one, other, offs=offs_of(form))

    assert_same_bits(torch.vmap(call, (0, None))(items, b), torch.stack([call(a, b), call(2 * a, b)]))
    assert_same_bits(torch.vmap(call, (None, -1))(a, torch.stack([b, b], -1)), torch.stack([call(a, b)] * 2))
    value, tangent = torch.func.jvp(call, (a, b), (a, b))
    assert_same_bits(tangent, 2 * value)

    def loss(one: Tensor) -> Tensor:
        return call(one, b).square().sum()

    found = torch.vmap(torch.func.grad(loss))(items)
    for one, x in zip(found, items, strict=True):
        assert_same_bits(one + 0.0, torch.func.grad(lambda y: reference(y, b, offs_of(form)).square().sum())(x) + 0.0)
    hessian = torch.func.hessian(loss)(a)
    expected = torch.func.hessian(lambda y: reference(y, b, offs_of(form)).square().sum())(a)
    torch.testing.assert_close(hessian, expected)


@reads_grad
@every_form
def test_opcheck(form: str) -> None:
    for transposed in (False, True):
        a, b = operands(form, transposed=transposed)
        assert set(opcheck(OPERATOR, (a, b, offs_of(form))).values()) == {"SUCCESS"}
        if form != "batches":
            grad = torch.ones_like(matmul_grad.grouped_mm(a, b, offs=ENDS))
            backward = torch.ops.matmul_grad._grouped_mm_backward.default
            assert set(opcheck(backward, (grad, a, b, ENDS)).values()) == {"SUCCESS"}


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_and_export(dynamic: bool) -> None:
    def step(x: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
        return matmul_grad.grouped_mm(x * 2, weight.mT, offs=offs).relu()

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic)
    for rows in (7, 9, 12):
        x = torch.arange(rows * 3.0).view(rows, 3).requires_grad_()
        weight = torch.arange(36.0).view(3, 4, 3).requires_grad_()
        with matmul_grad.strict():
            value, expected = compiled(x, weight, ENDS), step(x, weight, ENDS)
        assert_same_bits(value, expected)
        for ours, eager in zip(*(torch.autograd.grad(y.sum(), (x, weight)) for y in (value, expected)), strict=True):
            assert_same_bits(ours, eager)

    class Layer(torch.nn.Module):
        def forward(self, x: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
            return step(x, weight, offs)

    rows = torch.export.Dim("rows", min=6, max=64)
    shapes: Any = ({0: rows}, None, None) if dynamic else None
    program = torch.export.export(Layer(), (x.detach(), weight.detach(), ENDS), dynamic_shapes=shapes)
    assert OPERATOR in [node.target for node in program.graph.nodes]
    assert_same_bits(program.module()(x.detach(), weight.detach(), ENDS), expected.detach())


def test_autocast_flops_and_empty_sizes() -> None:
    a, b = operands("rows", torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = matmul_grad.grouped_mm(a, b, offs=ENDS)
    assert result.dtype == torch.bfloat16
    assert [x.dtype for x in torch.autograd.grad(result.sum(), (a, b))] == [torch.float32] * 2
    for form, flops in (("rows", 2 * 7 * 3 * 4), ("columns", 2 * 2 * 3 * 7), ("steps", 2 * 5 * 7 * 2)):
        a, b = operands(form)
        with FlopCounterMode(display=False) as counter:
            matmul_grad.grouped_mm(a, b, offs=ENDS).sum().backward()
        assert counter.get_total_flops() == 3 * flops
    for form, (one, other) in SHAPES.items():
        for sizes in itertools.product((0, 1), repeat=2):
            a = torch.ones(*one[:-2], one[-2] * sizes[0] if form != "rows" else one[-2], one[-1]).requires_grad_()
            b = torch.ones(*other[:-1], other[-1] * sizes[1] if form != "columns" else other[-1]).requires_grad_()
            result = matmul_grad.grouped_mm(a, b, offs=offs_of(form))
            assert_same_bits(result, reference(a, b, offs_of(form)))
            result.sum().backward()
            assert a.grad is not None and a.grad.shape == a.shape and b.grad is not None and b.grad.shape == b.shape
    none = torch.empty(0, dtype=torch.int32)
    assert_same_bits(matmul_grad.grouped_mm(torch.ones(3, 2), torch.ones(0, 2, 4), offs=none), torch.zeros(3, 4))


def bfloat(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.bfloat16)


INT64 = ENDS.long()
WRONG: dict[str, Callable[[Callable[..., Tensor]], Tensor]] = {
    "rank 1": lambda f: f(bfloat(8), bfloat(3, 8, 8), offs=ENDS),
    "rank 4": lambda f: f(bfloat(8, 8), bfloat(1, 3, 8, 8), offs=ENDS),
    "rank 0": lambda f: f(bfloat(), bfloat(3, 8, 8), offs=ENDS),
    "two dtypes": lambda f: f(bfloat(8, 8).float(), bfloat(3, 8, 8), offs=ENDS),
    "one of integers": lambda f: f(bfloat(8, 8), bfloat(3, 8, 8).int(), offs=ENDS),
    "complex": lambda f: f(bfloat(8, 8).to(torch.complex64), bfloat(3, 8, 8), offs=ENDS),
    "integers": lambda f: f(bfloat(8, 8).int(), bfloat(3, 8, 8).int(), offs=ENDS),
    "no offs": lambda f: f(bfloat(8, 8), bfloat(3, 8, 8)),
    "offs of batches": lambda f: f(bfloat(3, 8, 8), bfloat(3, 8, 8), offs=ENDS),
    "offs of int64": lambda f: f(bfloat(8, 8), bfloat(3, 8, 8), offs=INT64),
    "offs of rank 2": lambda f: f(bfloat(8, 8), bfloat(3, 8, 8), offs=ENDS[None]),
    "offs of rank 0": lambda f: f(bfloat(3, 8, 8), bfloat(8, 8), offs=ENDS[0]),
    "too few offs": lambda f: f(bfloat(8, 8), bfloat(3, 8, 8), offs=ENDS[:2]),
    "too few offs of columns": lambda f: f(bfloat(3, 8, 8), bfloat(8, 8), offs=ENDS[:2]),
    "k": lambda f: f(bfloat(8, 8), bfloat(3, 16, 8), offs=ENDS),
    "k of columns": lambda f: f(bfloat(3, 8, 8), bfloat(16, 8), offs=ENDS),
    "k of batches": lambda f: f(bfloat(3, 8, 8), bfloat(3, 16, 8)),
    "no offs of steps": lambda f: f(bfloat(8, 8), bfloat(8, 8)),
    "k and offs and a bias": lambda f: f(bfloat(8, 8), bfloat(3, 16, 8), offs=INT64, bias=bfloat(8)),
    "offs and a bias": lambda f: f(bfloat(8, 8), bfloat(3, 8, 8), offs=INT64, bias=bfloat(8)),
    "batches": lambda f: f(bfloat(2, 8, 8), bfloat(3, 8, 8)),
    "bias": lambda f: f(bfloat(8, 8), bfloat(3, 8, 8), offs=ENDS, bias=bfloat(3, 8)),
    "out_dtype": lambda f: f(bfloat(8, 8), bfloat(3, 8, 8), offs=ENDS, out_dtype=torch.float16),
    "out_dtype of steps": lambda f: f(bfloat(8, 8), bfloat(8, 8), offs=ENDS, out_dtype=torch.float16),
    "out_dtype of integers": lambda f: f(bfloat(8, 8), bfloat(3, 8, 8), offs=ENDS, out_dtype=torch.int32),
    "no dtype": lambda f: f(bfloat(8, 8), bfloat(3, 8, 8), offs=ENDS, out_dtype="float32"),
    "no tensor of bias": lambda f: f(bfloat(8, 8), bfloat(3, 8, 8), offs=ENDS, bias=1),
    "no tensor": lambda f: f(bfloat(8, 8), 3, offs=ENDS),
    "None": lambda f: f(None, bfloat(3, 8, 8), offs=ENDS),
    "no tensor of offs": lambda f: f(bfloat(8, 8), bfloat(3, 8, 8), offs=[1, 2, 3]),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors_are_those_of_torch(name: str) -> None:
    with pytest.raises((RuntimeError, TypeError)) as expected:
        WRONG[name](grouped_mm)
    with pytest.raises(type(expected.value)) as raised:
        WRONG[name](matmul_grad.grouped_mm)
    assert str(raised.value).split("\n")[0] == str(expected.value).split("\n")[0]


def like(function: Callable[..., Tensor], dtype: torch.dtype, device: str) -> Callable[..., Tensor]:
    """A function of bfloat16 tensors, called with others."""

    def move(x: Any) -> Any:
        return x.to(device, dtype if x.dtype == torch.bfloat16 else x.dtype) if isinstance(x, Tensor) else x

    return lambda *tensors, **more: function(*map(move, tensors), **{name: move(x) for name, x in more.items()})


@pytest.mark.parametrize("name", [name for name in WRONG if name not in ("two dtypes", "one of integers", "complex")])
def test_errors_of_float64_and_of_traced_operands_are_not_those_of_the_dtype(name: str) -> None:
    """torch refuses float64, and traces bfloat16 alone: what is wrong besides is told as for bfloat16."""
    for dtype, device in ((torch.float64, "cpu"), (torch.float32, "meta"), (torch.float64, "meta")):
        with pytest.raises((RuntimeError, TypeError)) as expected:
            WRONG[name](like(grouped_mm, torch.bfloat16, device))
        with pytest.raises(type(expected.value)) as raised:
            WRONG[name](like(matmul_grad.grouped_mm, dtype, device))
        assert str(raised.value).split("\n")[0] == str(expected.value).split("\n")[0], (dtype, device)


def test_errors_where_torch_has_none_or_one_of_strides() -> None:
    """What torch refuses for its strides or its dtype is refused here for what is wrong with it."""
    with pytest.raises(RuntimeError, match="contraction dimension of mat_a and mat_b must match"):
        matmul_grad.grouped_mm(
            torch.ones(7, 3, dtype=torch.float64), torch.ones(3, 5, 4, dtype=torch.float64), offs=ENDS
        )
    with pytest.raises(RuntimeError, match=r"expected two dense matrices, .* got \(5, 7\)"):
        matmul_grad.grouped_mm(torch.ones(5, 7), torch.ones(8, 2), offs=ENDS)
    with pytest.raises(RuntimeError, match=r"expected two dense matrices, .* of torch.float32 on meta"):
        matmul_grad.grouped_mm(torch.ones(7, 3, device="meta"), torch.ones(3, 3, 4), offs=ENDS)
    for wrong in ([2, 1, 6], [-1, 2, 6], [2, 4, 8]):
        with pytest.raises(RuntimeError, match="offs has to be ascending, from 0 to 7 at most, got"):
            matmul_grad.grouped_mm(*operands("rows"), offs=torch.tensor(wrong, dtype=torch.int32))


def test_freed_storage() -> None:
    a, b = (x.detach() for x in operands("rows"))
    b.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="its data is not allocated yet"):
        matmul_grad.grouped_mm(a, b, offs=ENDS)


@every_form
def test_other_dtypes_fall_back_to_a_loop(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CPU without conversions of float16; an error in a strict block."""
    a, b = operands(form, torch.float16)
    expected = reference(a.double(), b.double(), offs_of(form)).half()
    monkeypatch.setattr("matmul_grad.grouped._has_kernel", lambda tensor: False)
    if form == "batches":
        return
    assert_same_bits(matmul_grad.grouped_mm(a, b, offs=ENDS) + 0.0, expected + 0.0)
    with matmul_grad.strict(), pytest.raises(RuntimeError, match="this product goes to torch's kernel"):
        matmul_grad.grouped_mm(a, b, offs=ENDS)
