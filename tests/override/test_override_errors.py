"""What the switch does not take: torch's result, warning and error, the same to the letter as with the switch off."""

import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import matmul_grad
from matmul_grad.testing import assert_same_bits

Call = Callable[[], Tensor]


def ones(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(shape, dtype=dtype)


def counting(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    size = torch.Size(shape).numel()
    return (torch.arange(size).reshape(shape) % 7 - 3).to(dtype)


def outcome(call: Call) -> tuple[Any, ...]:
    """(type, message) of the error, or what came back, with the warnings before it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            result = call()
        except Exception as error:
            # A list of all kernels, where torch shows one, says where that of the CPU comes from.
            said: tuple[Any, ...] = type(error), re.sub(r"\nCPU: registered at .*", "", str(error))
        else:
            said = result.dtype, result.device, result.layout, result.shape
            if result.device.type == "cpu":
                said += result.to_dense().resolve_conj().tolist(), result.to_dense().stride()
    return *said, [(warning.category, str(warning.message)) for warning in caught]


def assert_same_outcome(call: Call) -> None:
    outcome(call)  # what torch says only once
    expected = outcome(call)
    with matmul_grad.enabled():
        actual = outcome(call)
    assert actual == expected
    assert_switch_works()


def assert_switch_works() -> None:
    """Nothing is left behind: products are right, on and off."""
    a, b = counting(3, 4), counting(4, 2)
    expected = torch.tensor((a.long().numpy() @ b.long().numpy()).tolist(), dtype=torch.float32)
    with matmul_grad.enabled(), matmul_grad.strict():
        assert_same_bits(torch.mm(a, b), expected)
    assert_same_bits(torch.mm(a, b), expected)
    assert matmul_grad.info()["on"] == []


F32, F64, HALF, INT = torch.float32, torch.float64, torch.float16, torch.int64
PAIRS: dict[str, tuple[Tensor, Tensor]] = {
    "rank-1": (ones(4), ones(4, 2)),
    "rank-1-second": (ones(3, 4), ones(4)),
    "rank-0": (ones(), ones(4, 2)),
    "rank-3": (ones(1, 3, 4), ones(4, 2)),
    "rank-4": (ones(1, 1, 3, 4), ones(1, 1, 4, 2)),
    "shape": (ones(3, 4), ones(5, 2)),
    "shape-empty": (ones(3, 0), ones(5, 0)),
    "shape-of-batch": (ones(2, 3, 4), ones(3, 4, 2)),
    "shape-in-batch": (ones(2, 3, 4), ones(2, 5, 2)),
    "batch-of-one": (ones(1, 3, 4), ones(2, 4, 2)),
    "dtypes": (ones(3, 4), ones(4, 2, dtype=F64)),
    "dtypes-in-batch": (ones(2, 3, 4), ones(2, 4, 2, dtype=HALF)),
    "float-int": (ones(3, 4), ones(4, 2, dtype=INT)),
    "int-float": (ones(2, 3, 4, dtype=INT), ones(2, 4, 2)),
    "shape-and-dtype": (ones(3, 4), ones(5, 2, dtype=F64)),
    "bool": (ones(3, 4).bool(), ones(4, 2).bool()),
    "bool-in-batch": (ones(2, 3, 4).bool(), ones(2, 4, 2).bool()),
    "uint16": (ones(3, 4).to(torch.uint16), ones(4, 2).to(torch.uint16)),
    "float8": (ones(3, 4).to(torch.float8_e4m3fn), ones(4, 2).to(torch.float8_e4m3fn)),
    "meta": (ones(3, 4).to("meta"), ones(4, 2)),
    "sparse": (ones(3, 4).to_sparse(), ones(5, 2)),
    "half-shape": (ones(3, 4).half(), ones(5, 2).half()),
}


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("grad", [False, True], ids=["constants", "requires_grad"])
@pytest.mark.parametrize("operator", ["mm", "bmm", "matmul"])
def test_bad_pairs(operator: str, grad: bool, name: str) -> None:
    a, b = (x.clone().requires_grad_(grad and x.is_floating_point() and x.itemsize > 1) for x in PAIRS[name])
    assert_same_outcome(lambda: getattr(torch, operator)(a, b))


ADDED: dict[str, tuple[Tensor, Tensor, Tensor]] = {
    **{name: (ones(3, 2), *pair) for name, pair in PAIRS.items()},
    "wide": (ones(3), ones(3, 4), ones(4, 2)),
    "tall": (ones(4, 2), ones(3, 4), ones(4, 2)),
    "deep": (ones(1, 3, 2), ones(3, 4), ones(4, 2)),
    "deeper": (ones(1, 2, 3, 2), ones(2, 3, 4), ones(2, 4, 2)),
    "batches": (ones(3, 3, 2), ones(2, 3, 4), ones(2, 4, 2)),
    "empty": (ones(0), ones(3, 4), ones(4, 2)),
    "float64": (ones(3, 2, dtype=F64), ones(3, 4), ones(4, 2)),
    "float64-in-batch": (ones(2, 3, 2, dtype=F64), ones(2, 3, 4), ones(2, 4, 2)),
    "int": (ones(3, 2, dtype=INT), ones(3, 4), ones(4, 2)),
    "good": (ones(3, 2), ones(3, 4), ones(4, 2)),
    "good-batch": (ones(2, 3, 2), ones(2, 3, 4), ones(2, 4, 2)),
}
SCALARS: list[Any] = [1, 0, 2.5, True, 1j, 1e39, float("inf"), float("nan"), -(2**62), 10**30, "a", None]


@pytest.mark.parametrize("name", ADDED)
@pytest.mark.parametrize("beta", [1, 0])
@pytest.mark.parametrize("operator", ["addmm", "baddbmm"])
def test_bad_sums(operator: str, beta: int, name: str) -> None:
    assert_same_outcome(lambda: getattr(torch, operator)(*ADDED[name], beta=beta))
    assert_same_outcome(lambda: getattr(ADDED[name][0].clone(), f"{operator}_")(*ADDED[name][1:], beta=beta))


@pytest.mark.parametrize("name", ["good", "good-batch"])
@pytest.mark.parametrize("scalar", SCALARS, ids=str)
@pytest.mark.parametrize("which", ["alpha", "beta"])
@pytest.mark.parametrize("dtype", [F32, F64, HALF, torch.bfloat16, INT], ids=str)
def test_scalars(dtype: torch.dtype, which: str, scalar: Any, name: str) -> None:
    operands = [x.to(dtype) for x in ADDED[name]]
    operator = "addmm" if name == "good" else "baddbmm"
    assert_same_outcome(lambda: (getattr(torch, operator)(*operands, **{which: scalar}) + 0).nan_to_num(nan=7.0))


@pytest.mark.parametrize("dtype", [F32, F64, HALF], ids=str)
def test_alpha_of_zero_matches_torch(dtype: torch.dtype) -> None:
    """Which may leave the product out, even where it is NaN."""
    a, nan = ones(3, 3, dtype=dtype), torch.full((3, 3), float("nan"), dtype=dtype)
    assert_same_outcome(lambda: torch.addmm(a, a, nan, alpha=0).nan_to_num(nan=7.0))
    assert_same_outcome(lambda: a.clone().addmm_(nan, a, alpha=0.0).nan_to_num(nan=7.0))


def test_more_than_there_is_memory_for() -> None:
    a = ones(1, 1).expand(1 << 23, 1 << 10)
    assert_same_outcome(lambda: torch.mm(a, a.t()))
    assert_same_outcome(lambda: torch.bmm(a[None], a.t()[None]))
    assert_same_outcome(lambda: torch.addmm(ones(1), a, a.t()))


def target(kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """(a, b, where to write): a (3, 4), b (4, 2)."""
    a, b = counting(3, 4), counting(4, 2)
    return (
        a,
        b,
        {
            "smaller": lambda: ones(1, 2),
            "larger": lambda: ones(4, 5),
            "other-rank": lambda: ones(6),
            "empty": lambda: ones(0),
            "empty-of-a-dtype": lambda: ones(0, dtype=F64),
            "dtype": lambda: ones(3, 2, dtype=F64),
            "int": lambda: ones(3, 2, dtype=INT),
            "meta": lambda: ones(3, 2).to("meta"),
            "expanded": lambda: ones(1, 2).expand(3, 2),
            "expanded-columns": lambda: ones(3, 1).expand(3, 2),
            "overlapping-itself": lambda: ones(9).as_strided((3, 2), (1, 2)),
            "view-of-another-size": lambda: ones(5, 5)[1:3, 2:4],
            "needs-gradient": lambda: ones(3, 2).requires_grad_(),
            "no-tensor": lambda: 3,
        }[kind](),
    )  # type: ignore[no-untyped-call]


TARGETS = (
    "smaller", "larger", "other-rank", "empty", "empty-of-a-dtype", "dtype", "int", "meta", "expanded",
    "expanded-columns", "overlapping-itself", "view-of-another-size", "needs-gradient", "no-tensor",
)  # fmt: skip


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("form", ["mm", "addmm", "bmm", "baddbmm", "addmm_", "baddbmm_"])
def test_targets(form: str, kind: str) -> None:
    def call() -> Tensor:
        a, b, out = target(kind)
        if form == "mm":
            return torch.mm(a, b, out=out)
        if form == "addmm":
            return torch.addmm(ones(2), a, b, out=out)
        if form == "addmm_":
            return out.addmm_(a, b)
        if isinstance(out, Tensor) and out.dim() == 2:
            out = out[None]
        if form == "bmm":
            return torch.bmm(a[None], b[None], out=out)
        return (
            torch.baddbmm(ones(2), a[None], b[None], out=out) if form == "baddbmm" else out.baddbmm_(a[None], b[None])
        )

    assert_same_outcome(call)


def test_resized_out_is_computed_by_the_kernels() -> None:
    """torch's warning, torch's new size, and then our product, into the tensor that was given."""
    a, b = counting(3, 4), counting(4, 2)
    before = matmul_grad.info()["accelerated"].get("mm", {}).get("float32", 0)
    with matmul_grad.enabled(), matmul_grad.strict():
        for shape in ((0,), (3, 1), (9, 9)):
            out = ones(*shape)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                torch.mm(a, b, out=out)
            assert [str(one.message)[:48] for one in caught] == ["An output with one or more elements was resized "] * (
                shape != (0,)
            )
            assert out.tolist() == (a.numpy() @ b.numpy()).tolist()
    assert matmul_grad.info()["accelerated"]["mm"]["float32"] - before == 3


def test_an_out_that_overlaps_an_operand_is_right() -> None:
    """torch does not look, and overwrites what it still has to read."""

    def itself(whole: Tensor) -> tuple[Tensor, Tensor]:
        expected = whole[:5].clone() @ whole[:5].clone()
        return torch.mm(whole[:5], whole[:5], out=whole[:5]), expected

    def shifted(whole: Tensor) -> tuple[Tensor, Tensor]:
        expected = whole[:5].clone() @ whole[:5].clone()
        return torch.mm(whole[:5], whole[:5], out=whole[1:]), expected

    def side_by_side(whole: Tensor) -> tuple[Tensor, Tensor]:
        expected = whole[:2, :2].clone() @ whole[3:5, 3:].clone()
        return torch.mm(whole[:2, :2], whole[3:5, 3:], out=whole[:2, 3:]), expected

    def in_place(whole: Tensor) -> tuple[Tensor, Tensor]:
        expected = 2 * whole[1:] + whole[:5].clone() @ whole[:5].clone()
        return whole[1:].addmm_(whole[:5], whole[:5], beta=2), expected

    def batch(whole: Tensor) -> tuple[Tensor, Tensor]:
        x = whole[:5].expand(1, 5, 5)
        expected = torch.bmm(x.clone(), x.clone())
        return torch.bmm(x, x, out=x), expected

    def vector(whole: Tensor) -> tuple[Tensor, Tensor]:
        expected = whole[:5].clone() @ whole[0].clone()
        return torch.mv(whole[:5], whole[0], out=whole[0]), expected

    for call in (itself, shifted, side_by_side, in_place, batch, vector):
        with matmul_grad.enabled(), matmul_grad.strict():
            actual, expected = call(counting(6, 5))
        assert torch.equal(actual, expected), call.__name__


def test_out_that_overlaps_a_dense_addend_falls_back() -> None:
    def transposed() -> Tensor:
        whole = counting(3, 3)
        return torch.addmm(whole, ones(3, 3), ones(3, 3), out=whole.t())

    assert_same_outcome(transposed)
    with matmul_grad.enabled(), matmul_grad.strict(), pytest.raises(RuntimeError, match="strict"):
        transposed()


def test_out_that_overlaps_an_addend_with_gaps_gets_what_no_overlap_would_give() -> None:
    for addend in (lambda whole: whole[0, :3], lambda whole: whole[1:, 1:]):
        whole = counting(4, 4)
        expected = torch.addmm(addend(whole).clone(), ones(3, 3), ones(3, 3))
        with matmul_grad.enabled(), matmul_grad.strict():
            torch.addmm(addend(whole), ones(3, 3), ones(3, 3), out=whole[:3, :3])
        assert torch.equal(whole[:3, :3], expected)


def conjugate(x: Tensor) -> Tensor:
    return torch.complex(x, x + 1).conj()


def negative(x: Tensor) -> Tensor:
    """A view whose elements are to be negated when they are read."""
    view = torch.complex(x, x).conj().imag
    assert view.is_neg()
    return view


KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    **{
        str(dtype).removeprefix("torch."): lambda x, dtype=dtype: x.to(dtype)
        for dtype in (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.complex64, torch.complex128)
    },
    "conjugate": conjugate,
    "transposed-conjugate": lambda x: conjugate(x).mT.contiguous().mT.conj(),
    "sparse": lambda x: x.to_sparse(),
}


@pytest.mark.parametrize("kind", KINDS)
def test_other_kinds_match_torch(kind: str) -> None:
    a, b, c = (KINDS[kind](counting(5, 5).abs() if kind == "uint8" else counting(5, 5)) for _ in range(3))
    batch = [x.expand(2, 5, 5) for x in (a, b, c)] if kind != "sparse" else []

    def all_of_them() -> Tensor:
        results = [torch.mm(a, b), torch.addmm(c, a, b, beta=2, alpha=3)]
        if batch:
            results += [torch.bmm(*batch[:2]), torch.baddbmm(*batch), torch.mm(a, b, out=torch.empty_like(c))]
            results += [torch.einsum("ij,bjk->ibk", a, batch[1]), c.clone().addmm_(a, b)]
        return torch.cat([x.to_dense().resolve_conj().flatten() for x in results])

    assert_same_outcome(all_of_them)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "sparse"])
def test_strict_refuses_other_dtypes_and_layouts(kind: str) -> None:
    a = KINDS[kind](counting(3, 3).abs())
    batch, before = a.expand(2, 3, 3), a.clone()
    calls: list[Call] = [
        lambda: torch.mm(a, a), lambda: torch.addmm(a, a, a), lambda: torch.bmm(batch, batch),
        lambda: torch.baddbmm(a, batch, batch), lambda: a.addmm_(before, before),
        lambda: torch.mm(before, before, out=a),
    ]  # fmt: skip
    with matmul_grad.enabled(), matmul_grad.strict():
        for call in calls:
            with pytest.raises(RuntimeError, match=r"matmul_grad\.strict\(\): this product goes to torch's kernel"):
                call()
    assert torch.equal(a, before), "refused before anything was written"
    assert_switch_works()


def test_strict_does_not_replace_torch_errors() -> None:
    for call in (lambda: torch.mm(ones(3, 4), ones(5, 2)), lambda: torch.mm(ones(3, 4), ones(4, 2, dtype=F64))):
        expected = outcome(call)
        with matmul_grad.enabled(), matmul_grad.strict():
            assert outcome(call) == expected


def test_negative_views_are_read_as_such() -> None:
    a, b = negative(counting(5, 5)), negative(counting(5, 5))
    assert_same_outcome(lambda: torch.mm(a, b) + torch.addmm(a, b, a) + torch.bmm(a[None], b[None])[0])


def test_fallbacks_are_counted() -> None:
    before = matmul_grad.info()["handed_over"]
    a = torch.ones(2, 2, dtype=torch.complex64)
    with matmul_grad.enabled():
        torch.mm(a, a)
        torch.addmm(a.real, a.real, a.real, alpha=True)
    after = matmul_grad.info()["handed_over"]
    for operator, dtype in (("mm", "complex64"), ("addmm", "float32")):
        assert after[operator][dtype] - before.get(operator, {}).get(dtype, 0) == 1
