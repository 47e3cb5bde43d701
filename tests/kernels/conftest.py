"""What the tests of all kernels share: no fallback may compute what they look at."""

from collections.abc import Iterator

import pytest
import torch

import matmul_grad


@pytest.fixture
def strict() -> Iterator[None]:
    """A fallback is an error; the number of threads is the same afterwards."""
    before = torch.get_num_threads()
    with matmul_grad.strict():
        yield
    torch.set_num_threads(before)


@pytest.fixture
def strict_on_two_threads(strict: None) -> None:
    torch.set_num_threads(2)
