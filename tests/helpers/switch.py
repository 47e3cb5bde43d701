"""Whether the override is on, as torch sees it, and how many products ran on these kernels."""

from collections import Counter

import torch

import matmul_grad
from matmul_grad.kernels.native.op_table import OVERLOADS


def accelerated(dtype: torch.dtype | None = None) -> Counter[str]:
    """By operator, the products that ran on these kernels so far, of one dtype or of all."""
    counts = matmul_grad.info()["accelerated"]
    if dtype is None:
        return Counter({operator: sum(dtypes.values()) for operator, dtypes in counts.items()})
    return Counter({operator: dtypes.get(str(dtype).removeprefix("torch."), 0) for operator, dtypes in counts.items()})


def registrations() -> dict[str, list[str]]:
    """By overload, every kernel that torch has on record, and which one each key would call."""
    return {
        name: [*torch._C._dispatch_dump(f"aten::{name}").split("\n"), torch._C._dispatch_dump_table(f"aten::{name}")]
        for name in OVERLOADS
    }


def runs_on_ours() -> bool:
    """Whether a product is counted."""
    before = matmul_grad.info()["accelerated"]
    torch.mm(torch.ones(2, 2), torch.ones(2, 2))
    return matmul_grad.info()["accelerated"] != before
