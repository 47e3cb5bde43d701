"""Fixtures of the GPU kernels' tests.

Cases of Triton's interpreter can take a second each: their grids run pairwise, dtype with layout and so on.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch


@pytest.fixture
def device() -> torch.device:
    """The GPU; without one a skip, or a failure where MATMUL_GRAD_REQUIRE_GPU=1 says that there is one."""
    if not torch.cuda.is_available():
        if os.environ.get("MATMUL_GRAD_REQUIRE_GPU") == "1":
            pytest.fail("MATMUL_GRAD_REQUIRE_GPU=1, and torch sees no GPU")
        pytest.skip("needs a GPU")
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture
def matmul_setting() -> Iterator[Any]:
    """torch's settings for CUDA products, put back afterwards."""
    setting: Any = torch.backends.cuda.matmul
    before = setting.fp32_precision
    yield setting
    setting.fp32_precision = before


@pytest.hookimpl(tryfirst=True)
def pytest_itemcollected(item: pytest.Item) -> None:
    if getattr(item, "originalname", "") == "test_interpreted":
        item.add_marker(pytest.mark.pairwise)
