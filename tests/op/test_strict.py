"""Dtypes and layouts without a kernel: torch's result and gradient, and an error under ``strict()``."""

from collections.abc import Callable

import pytest
import torch
from pairs import DOUBLE, MM, assert_close, pair
from torch import Tensor

import matmul_grad
from matmul_grad.testing import integers

HANDED_OVER: dict[str, Callable[[Tensor], Tensor]] = {
    "int8": lambda x: x.to(torch.int8),
    "int64": lambda x: x.to(torch.int64),
    "uint8": lambda x: x.abs().to(torch.uint8),
    "int32": lambda x: x.to(torch.int32),
    "complex64": lambda x: torch.complex(x, x + 1).to(torch.complex64),
    "complex128": lambda x: torch.complex(x, x + 1),
    "conjugate": lambda x: torch.complex(x, x + 1).conj(),
    "sparse": lambda x: x.to_sparse(),
    "meta": lambda x: x.to("meta"),
}


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state:UserWarning")  # once in a process
@pytest.mark.parametrize("kind", HANDED_OVER)
def test_fallback_results_match_torch(kind: str) -> None:
    a, b = (HANDED_OVER[kind](integers(5, 5, DOUBLE, seed=i)) for i in (1, 2))
    matmul_grad.mm(torch.ones(2, 2), torch.ones(2, 2))  # sparse products once came out empty, but only after this
    for mm in (matmul_grad.mm, MM):
        c, expected = mm(a, b), torch.mm(a, b)
        assert (c.shape, c.dtype, c.layout, c.device) == (
            expected.shape, expected.dtype, expected.layout, expected.device
        )  # fmt: skip
        if kind != "meta":
            assert torch.equal(c.to_dense(), expected.to_dense())


@pytest.mark.parametrize("kind", ["complex64", "complex128", "conjugate", "sparse", "meta"])
def test_fallback_products_are_differentiable(kind: str) -> None:
    def gradients(mm: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
        a, b = (HANDED_OVER[kind](integers(5, 5, DOUBLE, seed=i)).requires_grad_() for i in (1, 2))
        b = b.to_dense().detach().requires_grad_() if kind == "sparse" else b
        c = mm(a, b)
        c.backward(torch.ones_like(c))
        return [a.grad, b.grad]

    for ours, theirs in zip(gradients(matmul_grad.mm), gradients(torch.mm), strict=True):
        assert (ours.dtype, ours.device, ours.shape) == (theirs.dtype, theirs.device, theirs.shape)
        if kind != "meta":
            assert_close(ours.to_dense(), theirs.to_dense())


@pytest.mark.parametrize("kind", [*sorted(HANDED_OVER.keys() - {"meta"}), "bool"])
@pytest.mark.parametrize("mm", [matmul_grad.mm, MM], ids=["mm", "ops"])
def test_strict_refuses_a_fallback(mm: Callable[[Tensor, Tensor], Tensor], kind: str) -> None:
    make = HANDED_OVER.get(kind, Tensor.bool)
    a, b = (make(integers(5, 5, DOUBLE, seed=i)) for i in (1, 2))
    supported = r"matmul_grad\.strict\(\).*two (dense )?matrices of one dtype.*float32.*float64"
    with matmul_grad.strict(), pytest.raises(RuntimeError, match=supported):
        mm(a, b)


def is_strict() -> bool:
    a = torch.ones(2, 2, dtype=torch.int64)
    try:
        return matmul_grad.mm(a, a).tolist() != [[2, 2], [2, 2]]
    except RuntimeError as error:
        assert "strict()" in str(error)
        return True


def test_strict_nests_decorates_and_restores() -> None:
    assert not is_strict()
    with matmul_grad.strict():
        assert is_strict()
        with pytest.raises(KeyError), matmul_grad.strict():
            raise KeyError
        assert is_strict()
        assert_close(matmul_grad.mm(*pair()), torch.mm(*pair()))
    assert not is_strict()
    decorated = matmul_grad.strict()(is_strict)
    assert (decorated(), decorated(), is_strict()) == (True, True, False)
