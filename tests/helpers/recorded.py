"""Products that a C++ node of torch records: where that is, their operands, and the operators that a mode sees."""

import platform
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from matmul_grad.testing import integers

DOUBLE = torch.float64
on_this_system = pytest.mark.skipif(
    not (sys.platform == "linux" and platform.machine() in ("x86_64", "AMD64")),
    reason="recorded by Functions in Python on other systems: see graph.prepare",
)
MARKS = [
    on_this_system,
    # The first dual number of a process makes torch script its own formulas, and torch.jit warns of that.
    pytest.mark.filterwarnings("ignore:.*torch.jit.*"),
    pytest.mark.usefixtures("strict_once_tried"),
]


def leaves(*batch: int, dtype: torch.dtype = DOUBLE) -> tuple[Tensor, Tensor, Tensor]:
    """A (3, 4) and B (4, 2) of small integers that need a gradient, and the gradient of their product."""
    a, b, grad = (integers(max(1, *batch, 1) * m, n, dtype, seed=m) for m, n in ((3, 4), (4, 2), (3, 2)))
    a, b, grad = (x.view(*batch, -1, x.shape[-1]) for x in (a, b, grad))
    return a.requires_grad_(), b.requires_grad_(), grad


def is_recorded(c: Tensor) -> bool:
    return type(c.grad_fn).__name__ == "MatmulBackward0"


class Products(TorchDispatchMode):
    """The operators of this package that a mode sees."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names += [op.name()] if "matmul" in op.name() else []
        return op(*args, **(kwargs or {}))
