"""Is a product right: its worst error against float64, held against torch's on the same operands."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import baseline, correctness, gpu_backends
from .gpu_calls import Mm
from .gpu_workloads import GpuWorkload
from .timer import rounded

__all__ = ["Verdict", "judge", "verdicts"]

IN_FLOAT64 = 1 << 38  # m·n·k; above it float64 takes seconds, and the judge is torch's float32
ROWS = 256  # of a batch-invariant product that are multiplied alone


class Verdict(NamedTuple):
    """The worst errors of this package and of torch, and what the first may be."""

    what: str
    error: float
    torch_error: float
    limit: float

    @property
    def right(self) -> bool:
        """Not where the error is NaN."""
        return self.error <= self.limit

    def __str__(self) -> str:
        return f"{self.what}: error {self.error:.3g}, torch's {self.torch_error:.3g}, limit {self.limit:.3g}"

    def as_row(self) -> dict[str, float | str]:
        """As JSON can hold it, which knows no NaN."""
        values = {"ours": self.error, "torch": self.torch_error, "limit": self.limit}
        return {name: rounded(value) if math.isfinite(value) else str(value) for name, value in values.items()}


def judge(what: str, result: Tensor, theirs: Tensor, x: Tensor, y: Tensor, precision: str = "ieee") -> Verdict:
    """Error at most 2 × (torch's + one rounding) + 8 roundings, in the dtype of the sums, of ‖row‖·‖column‖.

    The first part is the budget of this package's tests. The second allows a long sum in one chain where torch
    adds several; it is nothing beside the rounding of a 16-bit result. TF32 operands keep 11 bits: each of k terms is
    off by 2^-11 of itself, in either direction.

    >>> x, y = torch.eye(2), torch.ones(2, 2)
    >>> judge("ones", x @ y, x @ y, x, y).right, judge("zeros", 0 * y, x @ y, x, y).right
    (True, False)
    """
    m, k, n = *x.shape[-2:], y.shape[-1]
    wide = torch.float64 if m * n * k <= IN_FLOAT64 else torch.float32
    truth = x.to(wide) @ y.to(wide)
    error = float((result.to(wide) - truth).abs().max())
    torch_error = float((theirs.to(wide) - truth).abs().max())
    rounding = torch.finfo(result.dtype).eps / 2 * float(truth.abs().max())
    norms = float(x.float().norm(dim=-1).max() * y.float().norm(dim=-2).max())
    sums = torch.float64 if result.dtype == torch.float64 else torch.float32
    chain = correctness.ROUNDINGS * torch.finfo(sums).eps / 2 * norms
    operands = correctness.ROUNDINGS * 2.0**-11 * norms / k**0.5 if precision == "tf32" else 0.0
    return Verdict(what, error, torch_error, 2 * (torch_error + rounding) + chain + operands)


def verdicts(mm: Mm, workload: GpuWorkload, operands: baseline.Operands) -> list[Verdict]:
    """A verdict for the product of a workload, two for a step; a third where rows alone must have the same bits.

    >>> workload = GpuWorkload("products", "step", "f32", 3, 4, 5)
    >>> [verdict.what for verdict in verdicts(torch.mm, workload, gpu_backends.draw(workload, "cpu")) if verdict.right]
    ['dgrad', 'wgrad']
    """
    theirs = torch.bmm if workload.part == "bmm" else torch.mm
    if workload.product != baseline.STEP:
        x, y = operands.of(workload.product)
        return [judge(workload.product, mm(x, y), theirs(x, y), x, y, workload.precision)]
    products, expected_step = (gpu_backends.work(which, workload, operands)() for which in (mm, theirs))
    found = [
        judge(which, result, expected, *operands.of(which))
        for which, result, expected in zip(("dgrad", "wgrad"), products, expected_step, strict=True)
    ]
    return found + ([rows_alone(mm, operands)] if workload.part == "invariant" else [])


def rows_alone(mm: Mm, operands: baseline.Operands) -> Verdict:
    """A row has the same bits whatever m is: as many errors as rows that do not."""
    whole, different = mm(operands.a, operands.b), 0
    for rows in {1, min(ROWS, len(operands.a)), max(1, len(operands.a) - 1)}:
        alone = mm(operands.a[:rows], operands.b)
        different += int((alone != whole[:rows]).any(dim=1).sum())
    return Verdict("rows that change with m", float(different), 0.0, 0.0)
