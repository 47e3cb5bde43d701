"""What the tests of recorded products share."""

from collections.abc import Iterator

import pytest
from recorded import leaves

import matmul_grad


@pytest.fixture
def strict_once_tried() -> Iterator[None]:
    """A fallback is an error; the first product that needs gradients, by a Function, tries the node of torch."""
    matmul_grad.mm(*leaves()[:2])
    with matmul_grad.strict():
        yield
