"""bmm, addmm, baddbmm, matmul and linear as functions: exact integers, ``out=``, what torch means by the rest."""

import contextlib
import gc
import itertools
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from limits import scaled
from outcomes import outcome
from torch import Tensor

import matmul_grad
from matmul_grad.testing import DTYPES, STRIDINGS, assert_same_bits, assert_within_budget, integers, lay_out, normal

DOUBLE = torch.float64
EVERY = [pytest.param(dtype, id=name) for name, dtype in DTYPES.items()]
SHAPES = ((1, 1, 1), (1, 64, 5), (5, 1, 9), (7, 65, 9), (13, 33, 17), (3, 5, 1031))
BATCHES = ((1, 7, 5, 3), (4, 6, 9, 8), (3, 1, 70, 40), (2, 33, 1, 20))
SCALES: list[dict[str, Any]] = [{}, {"beta": 2}, {"alpha": -1}, {"beta": 0.5, "alpha": 2}, {"beta": 0, "alpha": 0.5}]
PRODUCTS = ("mm", "bmm", "addmm", "baddbmm")
LAYERED = "source", "product"  # of the operands of a sum


def batch_of(draw: Callable[..., Tensor], batch: int, m: int, n: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.stack([draw(m, n, dtype, seed=seed * 100 + item) for item in range(batch)])


def exact(a: Tensor, b: Tensor, source: Tensor | None = None, beta: float = 1, alpha: float = 1) -> Tensor:
    """By NumPy, without any rounding but the last."""
    product = alpha * torch.from_numpy(a.double().numpy() @ b.double().numpy())
    return (product if source is None or beta == 0 else product + beta * source.double()).to(a.dtype)


def assert_exact(actual: Tensor, expected: Tensor, what: str = "") -> None:
    assert_same_bits(actual + 0.0, expected + 0.0, what)  # 0 and -0 are one


def operands(name: str, dtype: torch.dtype = torch.float32, draw: Callable[..., Tensor] = integers) -> list[Tensor]:
    """What one of PRODUCTS is called with, without scales."""
    if "bmm" in name:
        found = [batch_of(draw, 3, 5, 7, dtype, 1), batch_of(draw, 3, 7, 4, dtype, 2)]
        return [batch_of(draw, 3, 5, 4, dtype, 3), *found] if "add" in name else found
    found = [draw(5, 7, dtype, seed=1), draw(7, 4, dtype, seed=2)]
    return [draw(5, 4, dtype, seed=3), *found] if "add" in name else found


def pair_of(name: str) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """This package's function and torch's."""
    return getattr(matmul_grad, name), torch.nn.functional.linear if name == "linear" else getattr(torch, name)


# --- values -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", EVERY)
def test_addmm(dtype: torch.dtype) -> None:
    with matmul_grad.strict():
        for (m, n, k), scales in itertools.product(SHAPES, SCALES):
            layouts = itertools.cycle(itertools.product(STRIDINGS, STRIDINGS))
            vectors = integers(1, n, dtype, 4)[0], integers(m, 1, dtype, 5), integers(1, 1, dtype, 6)[0, 0]
            for source in (*(lay_out(integers(m, n, dtype, 3), striding) for striding in STRIDINGS), *vectors):
                one, other = next(layouts)
                a, b = lay_out(integers(m, k, dtype, 1), one), lay_out(integers(k, n, dtype, 2), other)
                c = matmul_grad.addmm(source, a, b, **scales)
                assert_exact(c, exact(a, b, source, **scales), f"{m}x{n}x{k} {one} {other} {source.shape} {scales}")
                assert c.is_contiguous()


@pytest.mark.parametrize("dtype", EVERY)
@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (1, 0, 2), (2, 1, 0)], ids=str)
def test_batches(dtype: torch.dtype, order: tuple[int, ...]) -> None:
    def laid_out(x: Tensor) -> Tensor:
        return x.permute(order).contiguous().permute([order.index(dim) for dim in range(3)])

    with matmul_grad.strict():
        for batch, m, n, k in BATCHES:
            a, b = (
                laid_out(batch_of(integers, batch, *size, dtype, seed)) for size, seed in (((m, k), 1), ((k, n), 2))
            )
            assert_exact(matmul_grad.bmm(a, b), exact(a, b))
            assert_exact(matmul_grad.bmm(a[:1].expand_as(a), b), exact(a[:1].expand_as(a), b))
            whole = batch_of(integers, batch, m, n, dtype, 3)
            for source, scales in itertools.product(
                (laid_out(whole), whole[0], whole[:, :, :1], whole[0, 0, 0]), SCALES
            ):
                c = matmul_grad.baddbmm(source, a, b, **scales)
                assert_exact(c, exact(a, b, source, **scales), f"{batch}x{m}x{n}x{k} {source.shape} {scales}")
                assert c.is_contiguous()


@pytest.mark.parametrize("dtype", EVERY)
def test_rounding(dtype: torch.dtype) -> None:
    """A sum is rounded once: the product of [A, I] and [B; bias], as one product, is as exact."""
    a, b, bias = normal(33, 257, dtype, 1), normal(257, 65, dtype, 2), normal(33, 65, dtype, 3)
    wide, tall = torch.cat([a, torch.eye(33, dtype=dtype)], 1), torch.cat([b, bias])
    assert_within_budget(matmul_grad.addmm(bias, a, b), wide, tall, "addmm")
    batches = matmul_grad.baddbmm(bias[None], a[None], b[None])[0]
    assert_same_bits(batches, matmul_grad.addmm(bias, a, b))


@pytest.mark.parametrize("dtype", EVERY)
def test_an_item_has_the_bits_of_mm(dtype: torch.dtype) -> None:
    a, b = batch_of(normal, 4, 17, 300, dtype, 1), batch_of(normal, 4, 300, 23, dtype, 2)
    alone = torch.stack([matmul_grad.mm(x, y) for x, y in zip(a, b, strict=True)])
    assert_same_bits(matmul_grad.bmm(a, b), alone)
    assert_same_bits(matmul_grad.matmul(a[:, None], b[None])[1, 1], alone[1])
    assert_same_bits(matmul_grad.addmm(torch.full((1,), float("nan"), dtype=dtype), a[0], b[0], beta=0), alone[0])
    assert_same_bits(matmul_grad.linear(a, b[0].t())[0, 3:5], alone[0, 3:5])
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert_same_bits(matmul_grad.bmm(a[2:], b[2:]), alone[2:])
    finally:
        torch.set_num_threads(threads)


MATMULS = [
    ((3,), (3,)), ((2, 3), (3,)), ((3,), (3, 2)), ((2, 3), (3, 2)), ((5, 2, 3), (3, 2)), ((5, 2, 3), (3,)),
    ((2, 3), (5, 3, 2)), ((3,), (5, 3, 2)), ((5, 2, 3), (5, 3, 2)), ((1, 2, 3), (5, 3, 2)), ((5, 2, 3), (1, 3, 2)),
    ((4, 1, 2, 3), (5, 3, 2)), ((4, 5, 2, 3), (3, 2)), ((4, 1, 2, 3), (1, 5, 3, 2)), ((0, 2, 3), (3, 2)),
    ((5, 0, 3), (3, 2)), ((5, 2, 0), (0, 2)), ((0, 2, 3), (0, 3, 2)), ((2, 3), (4, 5, 3, 0)), ((0,), (0,)),
    ((2, 3), (0, 3, 2)), ((4, 1, 2, 3), (3,)), ((3,), (4, 5, 3, 2)),
]  # fmt: skip


@pytest.mark.parametrize(("one", "other"), MATMULS, ids=str)
@pytest.mark.parametrize("needs", [(False, False), (True, False), (False, True), (True, True)], ids=str)
def test_matmul(one: tuple[int, ...], other: tuple[int, ...], needs: tuple[bool, bool]) -> None:
    """Values, strides and gradients are torch's, whatever is folded or copied: contiguous, and with batches inside."""
    for inside in (False, True):
        a, b = (normal(1, torch.Size(size).numel(), DOUBLE, 1 + i).view(size) for i, size in enumerate((one, other)))
        if inside and a.dim() > 2:
            a = a.transpose(0, -2).contiguous().transpose(0, -2)
        a, b = a.requires_grad_(needs[0]), b.requires_grad_(needs[1])
        expected = torch.matmul(a, b)
        with matmul_grad.strict():
            c = matmul_grad.matmul(a, b)
        torch.testing.assert_close(c, expected, check_stride=expected.numel() > 0)
        wanted = [x for x in (a, b) if x.requires_grad]
        if wanted:
            grad = torch.randn_like(c)
            ours, theirs = (torch.autograd.grad(x, wanted, grad) for x in (c, expected))
            torch.testing.assert_close(ours, theirs)


class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
    """Elements of each tensor that is made, and in sum of those that are copied."""

    def __init__(self) -> None:
        super().__init__()
        self.largest, self.copied = 0, 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **(kwargs or {}))
        for made in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(made, Tensor) and not made._is_view():
                self.largest = max(self.largest, made.untyped_storage().nbytes() // made.element_size())
        if op.overloadpacket in (torch.ops.aten.clone, torch.ops.aten.copy_, torch.ops.aten._to_copy):
            self.copied += result.numel()
        return result


@pytest.mark.parametrize(("one", "other"), MATMULS, ids=str)
@pytest.mark.parametrize("inside", [False, True])
def test_matmul_copies_no_more_than_torch(one: tuple[int, ...], other: tuple[int, ...], inside: bool) -> None:
    a, b = torch.ones(one), torch.ones(other)
    if inside and a.dim() > 2:
        a = a.transpose(0, -2).contiguous().transpose(0, -2)
    with Sizes() as ours:
        matmul_grad.matmul(a, b)
    with Sizes() as theirs:
        torch.matmul(a, b)
    assert ours.copied <= theirs.copied


BROADCASTS = [
    ((64, 8, 1, 10), (8, 10, 10)), ((96, 96), (24, 96, 1)), ((5, 5), (10, 5, 3)), ((10, 3, 5), (5, 5)),
    ((7, 1, 4, 6), (1, 9, 6, 3)), ((7, 1, 1, 6), (9, 6, 1)), ((7, 1, 3, 4, 6), (8, 1, 6, 3)), ((6,), (8, 5, 6, 1)),
    ((1, 40, 30), (20, 30, 2)), ((20, 2, 30), (1, 30, 40)), ((8, 9, 1, 6), (6,)), ((3, 1, 5, 2, 6), (3, 4, 1, 6, 2)),
]  # fmt: skip


@pytest.mark.parametrize(("one", "other"), BROADCASTS, ids=str)
@pytest.mark.parametrize("needs", [(False, False), (True, False), (False, True), (True, True)], ids=str)
@pytest.mark.parametrize("order", ["contiguous", "inside", "transposed"])
def test_matmul_makes_nothing_larger_than_result_and_operands(one: Any, other: Any, needs: Any, order: str) -> None:
    """Forward and backward: a batch that is broadcast is read where it lies."""

    def laid_out(x: Tensor) -> Tensor:
        if order == "inside" and x.dim() > 2:
            return x.transpose(0, -2).contiguous().transpose(0, -2)
        return x.mT.contiguous().mT if order == "transposed" and x.dim() > 1 else x

    made = [integers(1, torch.Size(size).numel(), DOUBLE, i).view(size) for i, size in enumerate((one, other))]
    a, b = (laid_out(x).detach().requires_grad_(need) for x, need in zip(made, needs, strict=True))
    expected = torch.matmul(a, b)
    largest = max(a.numel(), b.numel(), expected.numel())
    with matmul_grad.strict(), Sizes() as sizes:
        c = matmul_grad.matmul(a, b)
    assert_exact(c, expected)
    assert c.is_contiguous()
    assert sizes.largest <= largest
    wanted = [x for x in (a, b) if x.requires_grad]
    if wanted:
        grad = integers(1, c.numel(), DOUBLE, 3).view(c.shape)
        theirs = torch.autograd.grad(expected, wanted, grad)
        with Sizes() as sizes:
            ours = torch.autograd.grad(c, wanted, grad)
        for x, y in zip(ours, theirs, strict=True):
            assert_exact(x, y)
        assert sizes.largest <= largest


LINEARS = [
    ((3,), (2, 3), (2,)), ((3,), (2, 3), None), ((5, 3), (2, 3), (2,)), ((5, 3), (2, 3), ()), ((5, 3), (2, 3), (5, 2)),
    ((4, 5, 3), (2, 3), (2,)), ((4, 5, 3), (2, 3), None), ((4, 5, 3), (3,), None), ((0, 3), (2, 3), (2,)),
    ((4, 0, 3), (2, 3), (2,)), ((4, 5, 0), (2, 0), (2,)), ((4, 6, 5, 3), (2, 3), (2,)), ((4, 5, 3), (2, 3), (1,)),
]  # fmt: skip


@pytest.mark.parametrize(("size", "weight", "bias"), LINEARS, ids=str)
@pytest.mark.parametrize("inside", [False, True])
def test_linear(size: Any, weight: Any, bias: Any, inside: bool) -> None:
    x, w = torch.randn(size, dtype=DOUBLE), torch.randn(weight, dtype=DOUBLE)
    b = None if bias is None else torch.randn(bias, dtype=DOUBLE).requires_grad_()
    if inside and x.dim() > 2:
        x = x.transpose(0, -2).contiguous().transpose(0, -2)
    x, w = x.requires_grad_(), w.requires_grad_()
    expected = torch.nn.functional.linear(x, w, b)
    with matmul_grad.strict():
        c = matmul_grad.linear(x, w, b)
    torch.testing.assert_close(c, expected, check_stride=True)
    wanted = [x, w, *([] if b is None else [b])]
    grad = torch.randn_like(c)
    torch.testing.assert_close(torch.autograd.grad(c, wanted, grad), torch.autograd.grad(expected, wanted, grad))


# --- what torch means by the rest ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["addmm", "baddbmm"])
def test_scales_of_zero(name: str) -> None:
    """With beta = 0 the input is not read, and with alpha = 0 the product is left out, NaN or not."""
    ours, theirs = pair_of(name)
    source, a, b = operands(name)
    with matmul_grad.strict():
        assert_same_bits(ours(torch.full_like(source, float("nan")), a, b, beta=0), theirs(source, a, b, beta=0))
        for scales in ({"alpha": 0}, {"alpha": 0.0, "beta": 2.0}, {"alpha": 0, "beta": 0}):
            spoilt = torch.full_like(a, float("nan"))
            assert_same_bits(ours(source, spoilt, b, **scales), theirs(source, spoilt, b, **scales), str(scales))
        assert ours(torch.full_like(source, float("nan")), a, b).isnan().all()


@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("zero", ["m", "n", "k", "batch"])
def test_empty(name: str, zero: str) -> None:
    size = {"batch": 3, "m": 5, "k": 7, "n": 4} | {zero: 0}
    batch = (size["batch"],) if "bmm" in name else ()
    found = [torch.ones(*batch, size["m"], size["k"]), torch.ones(*batch, size["k"], size["n"])]
    if "add" in name:
        found.insert(0, torch.ones(*batch, size["m"], size["n"]))
    ours, theirs = pair_of(name)
    with matmul_grad.strict():
        assert_same_bits(ours(*found), theirs(*found))
        out = torch.full_like(theirs(*found), float("nan"))
        assert_same_bits(ours(*found, out=out), theirs(*found))


KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "int64": lambda x: x.to(torch.int64), "int8": lambda x: x.to(torch.int8), "uint8": lambda x: x.abs().byte(),
    "complex64": lambda x: torch.complex(x, x + 1).to(torch.complex64), "complex128": lambda x: torch.complex(x, x + 1),
    "conjugate": lambda x: torch.complex(x, x + 1).conj(), "meta": lambda x: x.to("meta"),
}  # fmt: skip
FURTHER: list[dict[str, Any]] = [
    {}, {"beta": 2, "alpha": 3}, {"beta": 0.5}, {"alpha": 0.5}, {"alpha": 1j}, {"beta": 2 + 1j}, {"alpha": True},
    {"alpha": 2**70}, {"beta": torch.tensor(2)},
]  # fmt: skip


@pytest.mark.parametrize("kind", [*KINDS, "float32"])
@pytest.mark.parametrize("name", PRODUCTS)
def test_other_dtypes_and_scales_are_torchs(name: str, kind: str) -> None:
    ours, theirs = pair_of(name)
    make = KINDS.get(kind, Tensor.float)
    for scales in FURTHER if "add" in name else [{}]:
        found = [make(x) for x in operands(name, DOUBLE)]
        actual, expected = (outcome(call, *found, **scales) for call in (ours, theirs))
        if isinstance(expected, Tensor):
            assert (actual.shape, actual.dtype, actual.device) == (expected.shape, expected.dtype, expected.device)
            if kind != "meta":
                torch.testing.assert_close(actual, expected)
        else:
            assert actual == expected


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - {"meta"}))
@pytest.mark.parametrize("name", PRODUCTS)
def test_strict_refuses_to_hand_over(name: str, kind: str) -> None:
    ours, _ = pair_of(name)
    found = [KINDS[kind](x) for x in operands(name, DOUBLE)]
    with matmul_grad.strict(), pytest.raises(RuntimeError, match=r"matmul_grad\.strict\(\)"):
        ours(*found)
    with matmul_grad.strict(), pytest.raises(RuntimeError, match=r"matmul_grad\.strict\(\)"):
        getattr(torch.ops.matmul_grad, name)(*found)


@pytest.mark.parametrize(
    "scales", [{"alpha": 1j}, {"beta": True}, {"alpha": 2**60 + 1}, {"alpha": torch.tensor(True)}], ids=str
)
def test_strict_refuses_other_scales(scales: dict[str, Any]) -> None:
    with matmul_grad.strict(), pytest.raises(RuntimeError, match=r"matmul_grad\.strict\(\)"):
        matmul_grad.addmm(*operands("addmm"), **scales)


def test_the_switch_has_no_part_in_it() -> None:
    before = matmul_grad.info()["accelerated"]
    with matmul_grad.enabled(), matmul_grad.strict():
        for name in PRODUCTS:
            ours, _ = pair_of(name)
            found = [x.requires_grad_() for x in operands(name)]
            ours(*found).sum().backward()
    assert matmul_grad.info()["accelerated"] == before


# --- out= ---------------------------------------------------------------------------------------------------


def places(shape: torch.Size, dtype: torch.dtype) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(name, where to write, the buffer of NaN around it) for each layout of a result."""
    *batch, m, n = shape
    front = [size + 2 for size in batch]
    inner = tuple(slice(1, 1 + size) for size in batch)
    for name, size, part in (
        ("rows", (m + 2, n + 3), lambda whole: whole[(*inner, slice(1, m + 1), slice(2, n + 2))]),
        ("columns", (n + 2, m + 3), lambda whole: whole[(*inner, slice(1, n + 1), slice(2, m + 2))].mT),
        ("sliced", (2 * m + 1, 3 * n + 1), lambda whole: whole[(*inner, slice(1, None, 2), slice(1, None, 3))]),
    ):
        whole = torch.full((*front, *size), float("nan"), dtype=dtype)
        yield name, part(whole), whole


@pytest.mark.parametrize("dtype", EVERY)
@pytest.mark.parametrize("name", [*PRODUCTS, "matmul"])
def test_out(name: str, dtype: torch.dtype) -> None:
    found, (ours, theirs) = operands(name.replace("matmul", "bmm"), dtype), pair_of(name)
    for scales in SCALES if "add" in name else [{}]:
        expected = theirs(*found, **scales)
        for place, out, whole in places(expected.shape, dtype):
            version = out._version
            with matmul_grad.strict():
                assert ours(*found, **scales, out=out) is out
            assert_exact(out, expected, place)
            assert int((~whole.isnan()).sum()) == out.numel(), f"{place}: written outside of the result"
            assert out._version == version + 1


@pytest.mark.parametrize("name", ["addmm", "baddbmm"])
def test_out_is_what_is_added(name: str) -> None:
    ours, theirs = pair_of(name)
    source, a, b = operands(name)
    for _, out, _ in places(source.shape, source.dtype):
        out.copy_(source)
        with matmul_grad.strict():
            ours(out, a, b, beta=2, out=out)
        assert_exact(out, theirs(source, a, b, beta=2))


@pytest.mark.parametrize("name", [*PRODUCTS, "matmul"])
@pytest.mark.parametrize("size", [(0,), (2, 2), (1, 2, 3, 4)], ids=str)
def test_out_is_resized_as_torch_does(name: str, size: tuple[int, ...]) -> None:
    found = operands(name.replace("matmul", "bmm"))
    results, said = [], []
    for call in pair_of(name):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            results.append(call(*found, out=torch.full(size, float("nan"))))
        said.append([str(warning.message).split("(Triggered")[0] for warning in caught])
    assert_exact(*results)
    assert results[0].stride() == results[1].stride()
    assert said[0] == said[1]
    assert len(said[0]) == (size != (0,))


@pytest.mark.parametrize("name", PRODUCTS)
def test_out_under_gradient_is_torchs_error(name: str) -> None:
    ours, theirs = pair_of(name)
    found = operands(name)
    out = torch.full_like(theirs(*found), 7.0)
    for needs in range(len(found) + 1):
        given = [x.detach().requires_grad_(i == needs) for i, x in enumerate((*found, out))]
        errors = [outcome(call, *given[:-1], out=given[-1]) for call in (ours, theirs)]
        assert errors[0] == errors[1]
        assert "don't support automatic differentiation" in errors[0][1]
        assert (given[-1] == 7).all()
    with torch.no_grad():
        needing = [x.requires_grad_() for x in found]
        assert_exact(ours(*needing, out=out), theirs(*needing))


@pytest.mark.parametrize("name", PRODUCTS)
def test_out_that_shares_memory_with_itself_or_the_input_is_torchs(name: str) -> None:
    """With a matrix it may: tests/op/test_out.py."""
    ours, theirs = pair_of(name)

    def arguments(kind: str) -> tuple[list[Tensor], Tensor]:
        batch = (2,) if "bmm" in name else ()
        whole = torch.arange(1000.0)
        square = [whole[100 * i : 100 * i + torch.Size((*batch, 4, 4)).numel()].view(*batch, 4, 4) for i in range(4)]
        found = square[1:4] if "add" in name else square[2:4]
        return found, found[0].mT if kind == "input" else whole[500:501].expand(*batch, 4, 4)

    for kind in ("itself", *(["input"] if "add" in name else [])):
        results = []
        for call in (ours, theirs):
            found, out = arguments(kind)
            results.append(outcome(call, *found, out=out))
        if isinstance(results[1], tuple):
            assert results[0] == results[1], kind
        else:
            assert_same_bits(*results, kind)
        found, out = arguments(kind)
        with matmul_grad.strict(), pytest.raises(RuntimeError, match=r"matmul_grad\.strict\(\)"):
            ours(*found, out=out)


@pytest.mark.parametrize("name", [*PRODUCTS, "matmul"])
def test_wrong_out_is_torchs_error(name: str) -> None:
    ours, theirs = pair_of(name)
    found = operands(name.replace("matmul", "bmm"))
    right = theirs(*found)
    for out in (right.double(), right.half(), right.to("meta"), 3, right.to_sparse()):
        actual, expected = (outcome(call, *found, out=out) for call in (ours, theirs))
        assert isinstance(expected, tuple)
        assert actual == expected


@pytest.mark.parametrize("name", PRODUCTS)
def test_out_dtype_is_torchs(name: str) -> None:
    ours, theirs = pair_of(name)
    found = operands(name, torch.bfloat16)
    for named in ({"out_dtype": torch.float32}, {"out_dtype": torch.float32, "out": torch.zeros(1)}):
        actual, expected = (outcome(call, *found, **named) for call in (ours, theirs))
        assert isinstance(expected, tuple)  # torch has it on CUDA
        assert actual == expected
    with matmul_grad.strict(), pytest.raises(RuntimeError, match=r"matmul_grad\.strict\(\)"):
        ours(*found, torch.float32)


# --- errors -------------------------------------------------------------------------------------------------


def bad_operands() -> Iterator[tuple[str, tuple[Any, ...], dict[str, Any]]]:
    """(name, arguments, named) that torch refuses, most of them."""
    one = torch.ones
    wrong: list[Any] = [
        one(4), one(2, 3), one(3, 4, 5), one(1), one(()), one(2, 3, 4, 5), 3, None, "a", one(4, 4).double(),
        one(4, 4).int(), one(4, 4, device="meta"), one(4, 4).to_sparse(), [1.0],
    ]  # fmt: skip
    for x, y in itertools.product(wrong, wrong):
        for name in ("mm", "bmm", "matmul", "linear"):
            yield name, (x, y), {}
    right = {"addmm": (one(2, 5), one(2, 3), one(3, 5)), "baddbmm": (one(4, 2, 5), one(4, 2, 3), one(4, 3, 5)),
             "linear": (one(2, 3), one(5, 3), one(5))}  # fmt: skip
    for name, operands in right.items():
        for place, x in itertools.product(range(3), wrong):
            yield name, (*operands[:place], x, *operands[place + 1 :]), {}
    for name, scales in itertools.product(
        ("addmm", "baddbmm"), ({"alpha": "a"}, {"beta": None}, {"alpha": 1e300}, {"beta": one(2)})
    ):
        yield name, right[name], scales


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state:UserWarning")  # once in a process
def test_bad_operands() -> None:
    """torch's error, of its type and to the letter; or its result."""
    compared = 0
    for name, arguments, named in bad_operands():
        ours, theirs = pair_of(name)
        actual, expected = (outcome(call, *arguments, **named) for call in (ours, theirs))
        if isinstance(expected, tuple):
            compared += 1
            assert actual == expected, (name, arguments, named)
        else:
            assert isinstance(actual, Tensor), (name, arguments, actual)
            assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
    assert compared > 500
    with matmul_grad.strict():
        for name in PRODUCTS:
            ours, theirs = pair_of(name)
            assert_exact(ours(*operands(name)), theirs(*operands(name)))


def test_an_error_of_a_hook_passes_through() -> None:
    def stop(_: Any) -> Any:
        raise KeyError("as raised")

    for name in PRODUCTS:
        ours, _ = pair_of(name)
        found = [x.requires_grad_() for x in operands(name)]
        with pytest.raises(KeyError, match="as raised"), torch.autograd.graph.saved_tensors_hooks(stop, stop):
            ours(*found)


def test_no_call_keeps_its_operands() -> None:
    """Done, handed over, refused or failed, with a graph or without: afterwards each tensor is held once, as before."""
    one, i, a, b = torch.ones, torch.ones(4, 5), torch.ones(4, 3), torch.ones(3, 5)
    calls: list[tuple[str, tuple[Tensor, ...], dict[str, Any]]] = [
        ("addmm", (i, a, b), {}), ("addmm", (i, a, b), {"beta": 0}), ("addmm", (i, a, b), {"alpha": 0}),
        ("addmm", (i, a, a), {}), ("addmm", (one(7), a, b), {}), ("addmm", (i.double(), a, b), {}),
        ("addmm", (i.int(), a.int(), b.int()), {}), ("addmm", (i, a[:, :0], b[:0]), {}),
        ("addmm", (i, a.clone().requires_grad_(), b), {}), ("addmm", (i, a.clone().requires_grad_(), a), {}),
        ("bmm", (a[None], b[None]), {}), ("bmm", (a[None], a[None]), {}), ("bmm", (a[None].int(), b[None].int()), {}),
        ("baddbmm", (i, a[None], b[None]), {}), ("baddbmm", (i, a[None], a[None]), {}),
        ("baddbmm", (i[None].int(), a[None].int(), b[None].int()), {}),
    ]  # fmt: skip
    for strictly, (name, operands, scales) in itertools.product((False, True), calls):
        before = [x._use_count() for x in operands]
        for call in (getattr(matmul_grad, name), getattr(torch.ops.matmul_grad, name)):
            with matmul_grad.strict() if strictly else contextlib.nullcontext(), contextlib.suppress(RuntimeError):
                assert call(*operands, **scales)._use_count() == 1
        if [x._use_count() for x in operands] != before:
            gc.collect()  # exceptions and their frames hold each other
        assert [x._use_count() for x in operands] == before, (name, operands, scales, strictly)


FIRST_CALLS = """
import sys, torch, matmul_grad
for name in sys.argv[1:]:
    shapes = {"bmm": [(2, 3, 4), (2, 4, 2)], "addmm": [(2,), (3, 4), (4, 2)], "baddbmm": [(2,), (2, 3, 4), (2, 4, 2)],
              "matmul": [(2, 3, 4), (4, 2)], "linear": [(2, 3, 4), (2, 4), (2,)]}[name]
    operands = [torch.ones(shape, requires_grad=True) for shape in shapes]
    with matmul_grad.strict():
        for _ in range(2):
            getattr(matmul_grad, name)(*operands).sum().backward()
            with torch.no_grad():
                getattr(matmul_grad, name)(*operands)
    assert all(x.grad is not None for x in operands)
model = matmul_grad.convert(torch.nn.Sequential(torch.nn.Linear(4, 2)))
model(torch.ones(3, 4)).sum().backward()
print("done")
"""


@pytest.mark.parametrize("first", ["addmm", "linear"])
def test_first_calls_of_a_process_bring_no_warning(first: str) -> None:
    others = [name for name in ("bmm", "addmm", "baddbmm", "matmul", "linear") if name != first]
    command = [sys.executable, "-W", "error", "-c", FIRST_CALLS, first, *others]
    done = subprocess.run(command, capture_output=True, text=True, timeout=scaled(240))
    assert (done.stdout, done.stderr) == ("done\n", "")
