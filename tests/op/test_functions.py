"""mm, bmm, addmm, baddbmm, matmul and linear as functions: exact values, and torch's meaning of scales and dtypes."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from dtypes import EVERY
from outcomes import outcome
from products import DOUBLE, PRODUCTS, SCALES, assert_exact, batch_of, exact, operands, pair_of
from torch import Tensor

import matmul_grad
from matmul_grad.testing import STRIDINGS, assert_same_bits, assert_within_budget, integers, lay_out, normal

SHAPES = ((1, 1, 1), (1, 64, 5), (5, 1, 9), (7, 65, 9), (13, 33, 17), (3, 5, 1031))
BATCHES = ((1, 7, 5, 3), (4, 6, 9, 8), (3, 1, 70, 40), (2, 33, 1, 20))


# --- values --------------------------------------------------------------------------------------------------


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


# --- what torch means by the rest ----------------------------------------------------------------------------


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
def test_other_dtypes_and_scales_match_torch(name: str, kind: str) -> None:
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
def test_strict_refuses_a_fallback(name: str, kind: str) -> None:
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


def test_functions_do_not_go_through_the_override() -> None:
    before = matmul_grad.info()["accelerated"]
    with matmul_grad.enabled(), matmul_grad.strict():
        for name in PRODUCTS:
            ours, _ = pair_of(name)
            found = [x.requires_grad_() for x in operands(name)]
            ours(*found).sum().backward()
    assert matmul_grad.info()["accelerated"] == before
