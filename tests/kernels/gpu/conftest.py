"""Fixtures of the GPU kernels' tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from case_process import CaseProcess
from gpu_required import require_gpu


@pytest.fixture
def device() -> Iterator[torch.device]:
    """The GPU. A test that breaks its context, as by an illegal address, ends the process: nothing can follow it there.

    pytest-xdist reports that test alone and goes on in a new worker.
    """
    yield require_gpu()
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        if "PYTEST_XDIST_WORKER" in os.environ:
            os._exit(3)
        pytest.exit(f"the context of the GPU is broken: {error}", returncode=3)


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
