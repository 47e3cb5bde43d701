"""Fixtures of the GPU kernels' tests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from case_process import CaseProcess
from gpu_required import require_gpu


@pytest.fixture
def device() -> torch.device:
    return require_gpu()


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
