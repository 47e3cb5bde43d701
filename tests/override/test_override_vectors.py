"""mv, addmv, dot and vdot under the override: exact, in every form, counted, torch's where they are torch's."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from dtypes import ACCELERATED
from switch import accelerated
from torch import Tensor

import matmul_grad
from matmul_grad.testing import DTYPES, integers

SIZES = ((1, 1), (1, 7), (5, 1), (3, 4), (65, 33), (130, 1031))


@pytest.fixture(autouse=True)
def overridden() -> Iterator[None]:
    with matmul_grad.enabled(), matmul_grad.strict():
        yield


def matrices(m: int, k: int, dtype: torch.dtype) -> list[Tensor]:
    a = integers(m, k, dtype, 1)
    return [a, a.t().contiguous().t(), a.repeat_interleave(2, 1)[:, ::2], a[:1].expand(m, k)]


def vectors(k: int, dtype: torch.dtype, seed: int) -> list[Tensor]:
    x = integers(1, k, dtype, seed)[0]
    return [x, x.repeat_interleave(3)[::3], x[:1].expand(k)]


def exact(a: Tensor, x: Tensor) -> Tensor:
    return (a.double().numpy() @ x.double().numpy()).astype(float)  # type: ignore[no-any-return]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", ACCELERATED)
def test_mv_and_addmv(name: str, size: tuple[int, int]) -> None:
    dtype, (m, k) = DTYPES[name], size
    before, calls = accelerated()["addmv"], 0
    for a in matrices(m, k, dtype):
        for x in vectors(k, dtype, 2):
            product = torch.from_numpy(exact(a, x))
            assert torch.equal(torch.mv(a, x), product.to(dtype))
            out = torch.full((2 * m,), float("nan"), dtype=dtype)
            assert torch.equal(torch.mv(a, x, out=out[::2]), product.to(dtype))
            assert out[1::2].isnan().all()
            calls += 2
            for source in (*vectors(m, dtype, 3), torch.ones((), dtype=dtype), torch.ones(1, dtype=dtype)):
                expected = (2 * source.double() - product).to(dtype)
                assert torch.equal(torch.addmv(source, a, x, beta=2, alpha=-1), expected)
                place = source.expand(m).clone()
                assert place.addmv_(a, x, beta=2, alpha=-1) is place
                assert torch.equal(place, expected)
                calls += 2
    assert accelerated()["addmv"] - before == calls


@pytest.mark.parametrize("k", [1, 3, 64, 1031, 9000])
@pytest.mark.parametrize("name", ACCELERATED)
def test_dot_and_vdot(name: str, k: int) -> None:
    dtype = DTYPES[name]
    for x in vectors(k, dtype, 1):
        for y in vectors(k, dtype, 2):
            expected = (x.double() @ y.double()).to(dtype)
            assert torch.equal(torch.dot(x, y), expected)
            assert torch.equal(torch.vdot(x, y), expected)
            assert torch.dot(x, y).shape == ()
    assert accelerated()["dot"] >= 9 and accelerated()["vdot"] >= 9


@pytest.mark.parametrize("name", ["f32", "f64"])
def test_same_bits_as_a_product_of_matrices(name: str) -> None:
    generator = torch.Generator().manual_seed(5)
    a, x = (torch.randn(*shape, dtype=DTYPES[name], generator=generator) for shape in ((37, 900), (900,)))
    whole = torch.mm(a, x[:, None])
    assert torch.equal(torch.mv(a, x), whole[:, 0])
    assert torch.equal(torch.stack([torch.dot(row, x) for row in a]), whole[:, 0])
    assert torch.equal(a @ x, whole[:, 0])


def test_gradients_run_on_the_kernels() -> None:
    a, x = torch.ones(3, 4, requires_grad=True), torch.ones(4, requires_grad=True)
    torch.mv(a, x).sum().backward()
    assert a.grad is not None and x.grad is not None
    assert a.grad.tolist() == [[1.0] * 4] * 3 and x.grad.tolist() == [3.0] * 4


@pytest.mark.parametrize(
    "call",
    [
        lambda: torch.mv(torch.ones(3, 4), torch.ones(5)),
        lambda: torch.mv(torch.ones(3), torch.ones(3)),
        lambda: torch.dot(torch.ones(3), torch.ones(4)),
        lambda: torch.dot(torch.ones(3), torch.ones(3).double()),
        lambda: torch.vdot(torch.ones(2, 2), torch.ones(2)),
        lambda: torch.addmv(torch.ones(5), torch.ones(3, 4), torch.ones(4)),
        lambda: torch.ones(()).addmv_(torch.ones(3, 4), torch.ones(4)),
        lambda: torch.mv(torch.ones(3, 4), torch.ones(4).double()),
        lambda: torch.mv(torch.ones(3, 4), torch.ones(4), out=torch.ones(3).double()),
    ],
)
def test_errors_match_torch(call: Any) -> None:
    with pytest.raises(RuntimeError) as ours:
        call()
    matmul_grad.disable()
    with pytest.raises(RuntimeError) as theirs:
        call()
    assert str(ours.value) == str(theirs.value)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0)])
def test_empty_sizes(shape: tuple[int, int]) -> None:
    a, x, source = torch.ones(shape), torch.ones(shape[1]), torch.arange(float(shape[0]))
    assert torch.equal(torch.mv(a, x), torch.zeros(shape[0]))
    assert torch.equal(torch.addmv(source, a, x, beta=3), 3 * source)
    assert torch.dot(torch.ones(0), torch.ones(0)).item() == 0


def test_beta_of_zero_ignores_the_addend() -> None:
    nan = torch.full((3,), float("nan"))
    assert torch.addmv(nan, torch.ones(3, 4), torch.ones(4), beta=0).tolist() == [4.0] * 3


def test_other_dtypes_match_torch() -> None:
    a, x = torch.ones(3, 4, dtype=torch.int64), torch.ones(4, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="strict"):
        torch.mv(a, x)
    with pytest.raises(RuntimeError, match="strict"):
        torch.vdot(x.to(torch.complex64), x.to(torch.complex64))
