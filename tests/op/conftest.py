"""What the tests of recorded products share, and those of gradients that are added to."""

from collections.abc import Iterator

import pytest
from recorded import leaves
from torch import Tensor

import matmul_grad
from matmul_grad import weight_gradients


@pytest.fixture
def strict_once_tried() -> Iterator[None]:
    """A fallback is an error; the first product that needs gradients, by a Function, tries the node of torch."""
    matmul_grad.mm(*leaves()[:2])
    with matmul_grad.strict():
        yield


@pytest.fixture
def added(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each weight gradient since, whether it was added in the product."""
    found: list[bool] = []
    real = weight_gradients._add

    def add(*operands: Tensor) -> bool:
        found.append(real(*operands))
        return found[-1]

    monkeypatch.setattr(weight_gradients, "_add", add)
    return found
