"""Whether the override is on, as torch sees it."""

import torch

import matmul_grad
from matmul_grad.kernels.native.op_table import OVERLOADS


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
