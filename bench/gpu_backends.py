"""Who multiplies: this package, torch, and the other packages that are installed."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import baseline, gpu_calls
from .gpu_calls import Missing, Mm
from .gpu_workloads import GpuWorkload

__all__ = ["copies", "draw", "mm_of", "work"]


def mm_of(name: str, workload: GpuWorkload) -> Mm:
    """The function that multiplies for a backend.

    >>> mm_of("torch", GpuWorkload("products", "forward", "f32", 1, 1, 1)) is torch.mm
    True
    """
    if name == baseline.OURS:
        return gpu_calls.bmm() if workload.part == "bmm" else gpu_calls.mm(workload.precision)
    if name == baseline.TORCH:
        return torch.bmm if workload.part == "bmm" else torch.mm
    try:
        return OTHERS[name]()
    except Exception as error:  # a package that is there may still fail on this torch, or on this GPU
        raise Missing(f"{name} cannot be used: {type(error).__name__}: {error}") from error


def torch_mm(a: Tensor, b: Tensor) -> Tensor:
    return torch.mm(a, b)


OTHERS: dict[str, Callable[[], Mm]] = {
    # CUDA graphs are recorded here, for all alike.
    "torch.compile": lambda: torch.compile(torch_mm, mode="max-autotune-no-cudagraphs", dynamic=False),
    "flag_gems": lambda: importlib.import_module("flag_gems.ops").mm,
    "batch_invariant_ops": lambda: importlib.import_module("batch_invariant_ops").matmul_persistent,
}


def draw(workload: GpuWorkload, device: str, seed: int = 0) -> baseline.Operands:
    """Standard normal operands, drawn where they are used: on the host it would take longer than all the rest.

    >>> [tuple(x.shape) for x in draw(GpuWorkload("bmm", "forward", "f32", 2, 3, 4, batch=5), "cpu")]
    [(5, 2, 4), (5, 4, 3), (5, 2, 3)]
    """
    generator = torch.Generator(device).manual_seed(seed)
    batch = (workload.batch,) if workload.part == "bmm" else ()
    sizes = (workload.m, workload.k), (workload.k, workload.n), (workload.m, workload.n)

    def one(size: tuple[int, int]) -> Tensor:
        return torch.randn(*batch, *size, generator=generator, device=device).to(workload.torch_dtype)

    return baseline.Operands(*map(one, sizes))


def copies(operands: baseline.Operands, count: int) -> list[baseline.Operands]:
    """The operands and count - 1 copies of them, each in memory of its own.

    >>> whole = copies(baseline.draw(2, 3, 4, torch.float32), 3)
    >>> len({operands.a.data_ptr() for operands in whole})
    3
    """
    return [operands, *(baseline.Operands(*(x.clone() for x in operands)) for _ in range(count - 1))]


def work(mm: Mm, workload: GpuWorkload, operands: baseline.Operands) -> Any:
    """The call that is timed.

    >>> workload = GpuWorkload("products", "wgrad", "f32", 2, 3, 4)
    >>> work(torch.mm, workload, draw(workload, "cpu"))().shape
    torch.Size([4, 3])
    """
    return baseline.work(mm, workload.product, operands)
