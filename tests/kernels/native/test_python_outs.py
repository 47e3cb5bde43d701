"""Products called from Python past the dispatcher that write to ``out``: exact, and nothing beside it is touched."""

from typing import Any

import pytest
import torch
from dtypes import EVERY
from products import assert_exact
from python_function_cases import LAYOUTS, drawn, laid_out, load, pair

import matmul_grad
from matmul_grad import out_variants, vectors
from matmul_grad.kernels.native.python_functions import WITH_OUT, functions
from matmul_grad.testing import assert_same_bits

F32 = torch.float32


@pytest.fixture(autouse=True, scope="module")
def loaded() -> None:
    load()


def arguments_of(name: str, dtype: torch.dtype) -> list[Any]:
    """Of a product of 5 rows, 9 steps of k and 7 columns."""
    batch = (3,) if "bmm" in name else ()
    a, b = drawn((*batch, 5, 9), dtype, 1), drawn((*batch, 9, 7), dtype, 2)
    matrices = [a[0], b[:, 0]] if name == "dot" else [a, b[:, 0]] if "mv" in name else [a, b]
    return [drawn((1,), dtype, 3), *matrices, 2, -1] if "add" in name else matrices


@pytest.mark.parametrize("name", WITH_OUT)
@pytest.mark.parametrize("dtype", EVERY)
def test_out_is_written_and_returned_and_nothing_beside_it(name: str, dtype: torch.dtype) -> None:
    arguments = arguments_of(name, dtype)
    expected = getattr(functions, name)(*arguments)
    for how in LAYOUTS:
        out = laid_out(torch.full_like(expected, float("nan")), how)
        base = out if out._base is None else out._base
        outside = int(base.isnan().sum()) - out.numel()
        assert getattr(functions, name + "_out")(*arguments, out) is out
        assert_exact(out, expected, how)
        assert int(base.isnan().sum()) == outside, how
    assert getattr(functions, name + "_out")(*arguments, torch.empty(2, 3, 4, 5, dtype=dtype)) is None


@pytest.mark.parametrize("name", WITH_OUT)
def test_public_functions_write_to_out_past_the_dispatcher(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    *operands, beta, alpha = arguments_of(name, F32) if "add" in name else [*arguments_of(name, F32), None, None]
    scales = {} if beta is None else {"beta": beta, "alpha": alpha}
    expected = getattr(matmul_grad, name)(*operands, **scales)
    out = torch.zeros_like(expected)
    version = out._version
    monkeypatch.setattr(out_variants, "is_left_to_torch", lambda *_: pytest.fail("not by compiled code"))
    monkeypatch.setattr(vectors, "is_left_to_torch", lambda *_: pytest.fail("not by compiled code"))
    assert getattr(matmul_grad, name)(*operands, **scales, out=out) is out
    assert_same_bits(out, expected)
    assert out._version == version + 1


def test_an_out_that_shares_memory_with_an_operand() -> None:
    a, b = pair()
    expected = functions.mm(a, b)
    for written in (a.clone(), b.clone()):
        operands = (written, b) if torch.equal(written, a) else (a, written)
        assert functions.mm_out(*operands, written) is written
        assert_exact(written, expected)
    c = functions.addmm(a, a, b, 1, 1)
    source = a.clone()
    assert functions.addmm_out(source, a, b, 1, 1, source) is source
    assert_exact(source, c)
    assert functions.mm_out(a, b, torch.zeros(4, 1).expand(4, 4)) is None
    assert functions.mm_out(a, b, torch.zeros(4, 4, requires_grad=True)) is None
    assert functions.mm_out(a, b, torch.zeros(4, 4, dtype=torch.float64)) is None
