"""The GPU that a test needs."""

import os

import pytest
import torch


def require_gpu() -> torch.device:
    """The GPU; without one a skip, or a failure where MATMUL_GRAD_REQUIRE_GPU=1 says that there is one."""
    if not torch.cuda.is_available():
        if os.environ.get("MATMUL_GRAD_REQUIRE_GPU") == "1":
            pytest.fail("MATMUL_GRAD_REQUIRE_GPU=1, and torch sees no GPU")
        pytest.skip("needs a GPU")
    return torch.device("cuda", torch.cuda.current_device())
