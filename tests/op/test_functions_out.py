"""``out=`` of bmm, addmm, baddbmm and matmul: every layout, resized and refused as torch does."""

import warnings

import pytest
import torch
from dtypes import EVERY
from outcomes import outcome
from products import PRODUCTS, SCALES, assert_exact, operands, pair_of, places
from torch import Tensor

import matmul_grad
from matmul_grad.testing import assert_same_bits


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
def test_out_that_requires_grad_raises_torch_error(name: str) -> None:
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
def test_out_that_overlaps_itself_or_the_input_falls_back(name: str) -> None:
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
def test_wrong_out_raises_torch_error(name: str) -> None:
    ours, theirs = pair_of(name)
    found = operands(name.replace("matmul", "bmm"))
    right = theirs(*found)
    for out in (right.double(), right.half(), right.to("meta"), 3, right.to_sparse()):
        actual, expected = (outcome(call, *found, out=out) for call in (ours, theirs))
        assert isinstance(expected, tuple)
        assert actual == expected


@pytest.mark.parametrize("name", PRODUCTS)
def test_an_out_of_another_dtype_than_out_dtype_raises_as_in_torch(name: str) -> None:
    ours, theirs = pair_of(name)
    found = operands(name, torch.bfloat16)
    named = {"out_dtype": torch.float32, "out": torch.zeros(1, dtype=torch.float64)}
    actual, expected = (outcome(call, *found, **named) for call in (ours, theirs))
    assert isinstance(expected, tuple)  # torch has it on CUDA
    assert actual == expected
    with matmul_grad.strict(), pytest.raises(RuntimeError, match=r"matmul_grad\.strict\(\)"):
        ours(*found, **named)
