"""mv, addmv, dot and vdot against torch: values, errors, gradients, dtypes, strides, zero sizes, transforms."""

import itertools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from dtypes import EVERY
from outcomes import assert_same_outcome, outcome
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import matmul_grad
from matmul_grad.testing import STRIDINGS, assert_same_bits, integers, lay_out, normal

DOUBLE = torch.float64
NAMES = ("mv", "addmv", "dot", "vdot")
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*")


def operands(name: str, dtype: torch.dtype = DOUBLE, m: int = 5, k: int = 7) -> list[Tensor]:
    matrix, vector = normal(m, k, dtype, 1), normal(1, k, dtype, 2)[0]
    if name in ("dot", "vdot"):
        return [normal(1, k, dtype, 3)[0], vector]
    return [matrix, vector] if name == "mv" else [normal(1, m, dtype, 4)[0], matrix, vector]


def pair_of(name: str) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    return getattr(matmul_grad, name), getattr(torch, name)


@pytest.mark.parametrize("dtype", EVERY)
@pytest.mark.parametrize("striding", STRIDINGS)
def test_values(dtype: torch.dtype, striding: str) -> None:
    """Exact on integers, for vectors of any stride."""
    for m, k in ((1, 1), (5, 7), (33, 65), (1, 40), (40, 1)):
        matrix = lay_out(integers(m, k, dtype, 1), striding)
        exact = matrix.double()
        for vector in (
            integers(k, 1, dtype, 2)[:, 0],
            integers(k, 2, dtype, 2)[:, 1],
            torch.ones(1, dtype=dtype).expand(k),
        ):
            expected = (exact @ vector.double()).to(dtype)
            with matmul_grad.strict():
                assert_same_bits(matmul_grad.mv(matrix, vector) + 0.0, expected + 0.0)
                for bias in (
                    integers(1, m, dtype, 3)[0],
                    torch.full((1,), 2, dtype=dtype),
                    torch.tensor(3, dtype=dtype),
                ):
                    total = (exact @ vector.double() * 2 - bias.double()).to(dtype)
                    assert_same_bits(matmul_grad.addmv(bias, matrix, vector, beta=-1, alpha=2) + 0.0, total + 0.0)
                for dot in (matmul_grad.dot, matmul_grad.vdot):
                    assert_same_bits(dot(matrix[0], vector) + 0.0, expected[0] + 0.0)


@pytest.mark.parametrize("name", NAMES)
def test_bits_are_those_of_mm(name: str) -> None:
    found = operands(name, torch.float32, 17, 300)
    ours, theirs = pair_of(name)
    *_, one, vector = found
    product = matmul_grad.mm(one if one.dim() == 2 else one[None], vector[:, None])[:, 0]
    result = ours(*found, **({"beta": 0} if name == "addmv" else {}))
    assert_same_bits(result.reshape(-1), product)
    torch.testing.assert_close(ours(*found), theirs(*found))


@pytest.mark.parametrize("name", NAMES)
def test_sizes_of_zero(name: str) -> None:
    ours, theirs = pair_of(name)
    for m, k in ((0, 7), (5, 0), (0, 0)) if "mv" in name else ((0, 0),):
        found = operands(name, torch.float32, m, k)
        with matmul_grad.strict():
            assert_same_bits(ours(*found), theirs(*found))
            assert_same_bits(ours(*found, out=torch.empty_like(theirs(*found))), theirs(*found))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.complex64, torch.complex128, torch.bool], ids=str)
def test_other_dtypes_match_torch(name: str, dtype: torch.dtype) -> None:
    ours, theirs = pair_of(name)
    found = [(x + 1j * x.flip(-1)).to(dtype) if dtype.is_complex else x.abs().mul(3).to(dtype) for x in operands(name)]
    assert_same_outcome(outcome(ours, *found), outcome(theirs, *found))
    with matmul_grad.strict(), pytest.raises(RuntimeError, match=r"matmul_grad\.strict\(\)"):
        ours(*found)


@pytest.mark.parametrize("name", NAMES)
def test_errors_match_torch(name: str) -> None:
    one = torch.ones
    wrong: list[Any] = [
        one(4), one(2, 3), one(3, 4, 5), one(1), one(()), one(0), 3, None, "a", one(4).double(), one(4, 4).int(),
        one(4, device="meta"), one(4, 4).to_sparse(), [1.0],
    ]  # fmt: skip
    ours, theirs = pair_of(name)
    compared = 0
    for arguments in itertools.product(wrong, repeat=3 if name == "addmv" else 2):
        actual, expected = outcome(ours, *arguments), outcome(theirs, *arguments)
        if isinstance(expected, tuple):
            compared += 1
            assert actual == expected, arguments
        else:
            assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype), arguments
    assert compared > 100
    found = operands(name, torch.float32)
    for out in (theirs(*found).double(), theirs(*found).to("meta"), 3):
        assert outcome(ours, *found, out=out) == outcome(theirs, *found, out=out)
    if name == "addmv":
        for scales in ({"alpha": "a"}, {"beta": None}, {"alpha": 1e300}, {"beta": one(2)}, {"alpha": 1j}):
            assert_same_outcome(outcome(ours, *found, **scales), outcome(theirs, *found, **scales))


@pytest.mark.parametrize("name", NAMES)
def test_derivatives(name: str) -> None:
    ours, _ = pair_of(name)
    found = tuple(x.requires_grad_() for x in operands(name, m=3, k=4))
    scales = {"beta": 0.5, "alpha": -2.0} if name == "addmv" else {}
    with matmul_grad.strict():
        assert gradcheck(lambda *x: ours(*x, **scales), found, check_forward_ad=True)
        assert gradgradcheck(lambda *x: ours(*x, **scales), found)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_have_torch_strides(name: str) -> None:
    for column_major in (False, True):
        found = [x.t().contiguous().t() if column_major and x.dim() == 2 else x for x in operands(name)]
        grads = []
        for call in pair_of(name):
            leaves = [x.detach().requires_grad_() for x in found]
            result = call(*leaves)
            grads.append(torch.autograd.grad(result, leaves, torch.ones_like(result)))
        torch.testing.assert_close(*grads)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(name: str, dtype: torch.dtype) -> None:
    ours, theirs = pair_of(name)
    found = operands(name, torch.float32)
    mixed = [found[0].to(dtype), *found[1:]]
    with torch.autocast("cpu", dtype), matmul_grad.strict():
        assert ours(*found).dtype == theirs(*found).dtype
        torch.testing.assert_close(ours(*found), theirs(*found))
    with torch.autocast("cpu", dtype):
        assert_same_outcome(outcome(ours, *mixed), outcome(theirs, *mixed))


@pytest.mark.parametrize("name", NAMES)
def test_transforms_and_compile(name: str) -> None:
    found = operands(name)

    def transforms(call: Callable[..., Tensor]) -> Callable[..., Any]:
        def loss(*x: Tensor) -> Tensor:
            return call(*x).sin().sum()

        every = tuple(range(len(found)))

        def all_of_them(*x: Tensor) -> Any:
            batch = torch.stack([x[0], 2 * x[0]])
            return (
                torch.func.grad(loss, every)(*x),
                torch.func.jvp(call, x, tuple(y.cos() for y in x)),
                torch.func.vmap(torch.func.grad(loss, every), (0, *[None] * (len(x) - 1)))(batch, *x[1:]),
            )

        return all_of_them

    ours, theirs = pair_of(name)
    expected = transforms(theirs)(*found)
    torch.testing.assert_close(transforms(ours)(*found), expected)
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(transforms(ours), fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(*found), expected)
        out = torch.zeros_like(theirs(*found))
        torch.compile(ours, fullgraph=True, backend="aot_eager")(*found, out=out)
    torch.testing.assert_close(out, theirs(*found))


@pytest.mark.parametrize("name", NAMES)
def test_out(name: str) -> None:
    ours, theirs = pair_of(name)
    found = operands(name, torch.float32)
    expected = ours(*found)
    for out in (
        torch.zeros(expected.numel() * 3)[::3].view(expected.shape) if expected.dim() else torch.zeros(()),
        torch.empty(0),
        torch.zeros_like(expected),
    ):
        version = out._version
        with matmul_grad.strict():
            assert ours(*found, out=out) is out
        assert_same_bits(out, expected)
        assert out._version > version
    needing = [x.clone().requires_grad_() for x in found]
    actual, wanted = (outcome(call, *needing, out=torch.zeros_like(expected)) for call in (ours, theirs))
    assert actual == wanted
    if name == "addmv":
        result = found[0].clone()
        ours(result, *found[1:], out=result)
        assert_same_bits(result, expected)


@pytest.mark.filterwarnings("ignore:An output with one or more elements")  # torch's, of an out of its own
@pytest.mark.parametrize("mat", [(0, 0), (0, 3), (3, 0)])
@pytest.mark.parametrize("input", [(), (1,), (0,)])
def test_addmv_of_an_empty_matrix_has_the_shape_that_torch_gives(input: tuple[int, ...], mat: tuple[int, int]) -> None:
    operands = torch.ones(input), torch.ones(mat), torch.ones(mat[1])
    results = []
    for addmv in (torch.addmv, matmul_grad.addmv):
        try:
            results.append(addmv(*operands).tolist())
        except RuntimeError as error:
            results.append(str(error))
    assert results[0] == results[1]


@pytest.mark.parametrize("dtype", EVERY, ids=str)
def test_scales_that_the_dtype_cannot_hold(dtype: torch.dtype) -> None:
    """torch refuses them for vectors; for matrices it takes what float32 holds."""
    input, mat, vec = torch.ones(3, dtype=dtype), torch.ones(3, 4, dtype=dtype), torch.ones(4, dtype=dtype)
    for scale in (65504, 65519, -1e5, 2**62, 3.395e38, 3.41e38, float("inf")):
        for name in ("alpha", "beta"):
            expected = outcome(torch.addmv, input, mat, vec, **{name: scale})
            assert_same_outcome(outcome(matmul_grad.addmv, input, mat, vec, **{name: scale}), expected)
            with matmul_grad.enabled():
                assert_same_outcome(outcome(torch.addmv, input, mat, vec, **{name: scale}), expected)
                assert_same_outcome(outcome(input.clone().addmv_, mat, vec, **{name: scale}), expected)
