"""Dtypes that these kernels multiply on the CPU at hand: float16 needs conversions, which a generic x86-64 has not."""

import pytest

from matmul_grad.kernels.cpu import host
from matmul_grad.testing import DTYPES

ACCELERATED = {name: dtype for name, dtype in DTYPES.items() if name != "f16" or host.cpu().has_fp16_convert}
EVERY = [pytest.param(dtype, id=name) for name, dtype in ACCELERATED.items()]
FLOATS = [pytest.param(DTYPES[name], id=name) for name in ("f32", "f64")]
