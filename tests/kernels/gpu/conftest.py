"""Fixtures of the GPU kernels' tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from case_process import CaseProcess


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


@pytest.fixture(scope="module")
def interpreter(request: pytest.FixtureRequest) -> Iterator[CaseProcess]:
    """A process under Triton's interpreter for the cases of this file; one that ends is followed by another."""
    process = CaseProcess.interpreted(str(request.path))
    yield process
    process.close()
