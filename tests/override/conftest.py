"""The override is off around each test that asks for it."""

from collections.abc import Iterator

import pytest

import matmul_grad


@pytest.fixture
def off_before_and_after() -> Iterator[None]:
    assert matmul_grad.info()["on"] == []
    matmul_grad.disable()  # the kernels that a block left registered for the next block are removed
    yield
    left_on = matmul_grad.info()["on"]
    matmul_grad.disable()
    assert left_on == []
