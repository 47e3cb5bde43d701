"""Whether the override is on, as torch sees it, how many products ran on these kernels, and who records gradients."""

import contextlib
from collections import Counter
from collections.abc import Iterator

import torch

import matmul_grad
from matmul_grad.kernels.native import state
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


@contextlib.contextmanager
def recorded_by_functions() -> Iterator[None]:
    """A block in which autograd.py records all products, as on a torch whose own node cannot be used."""
    matmul_grad.mm(*(torch.ones(1, 1, requires_grad=True) for _ in range(2)))  # which tries the node of torch
    before = state.words[state.RECORD]
    state.words[state.RECORD] = 0
    try:
        yield
    finally:
        state.words[state.RECORD] = before
