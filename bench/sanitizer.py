"""A small set of products that meets every path: what compute-sanitizer watches, and what runs before it.

Each is compared with float64 too. Under the sanitizer torch must not cache memory (PYTORCH_NO_CUDA_MEMORY_CACHING=1),
so that an address outside of an operand is outside of everything.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from .. import testing
from . import baseline, gpu_calls, gpu_correctness
from .devices import Gpu
from .gpu_session import IncorrectResult
from .gpu_workloads import GpuWorkload

NUMBERS = (
    ("bf16", "ieee"), ("f16", "ieee"), ("f32", "ieee"), ("f32", "tf32"), ("f32", "tf32x3"), ("f64", "ieee"),
)  # fmt: skip
# What 16-byte copies can take and what they cannot, a row, a column, few rows, a long sum with few tiles.
SHAPES = ((128, 256, 192), (65, 67, 131), (1, 160, 96), (96, 1, 160), (8, 128, 256), (16, 32, 4096))


class Case(NamedTuple):
    """One product, or several of one call."""

    name: str
    run: Callable[[Gpu], list[gpu_correctness.Verdict]]


def cases() -> list[Case]:
    """Every kind of kernel early, since a sanitizer is slow: one shape, what is more than a product, the rest."""
    first = SHAPES[0]
    ordered = [("NN", shape) for shape in SHAPES] + [(letters, first) for letters in ("NT", "TN", "TT")]
    found = [product(*number, *how) for how, number in itertools.product(ordered, NUMBERS)]
    found[len(NUMBERS) : len(NUMBERS)] = [make(dtype) for dtype in ("bf16", "f32") for make in (backward, batched)]
    return found


def product(dtype: str, precision: str, layout: str, shape: tuple[int, int, int]) -> Case:
    workload = GpuWorkload("products", "forward", dtype, *shape, precision=precision)

    def run(gpu: Gpu) -> list[gpu_correctness.Verdict]:
        a, b, _ = baseline.draw(*shape, workload.torch_dtype)
        striding = {"N": "row", "T": "column"}
        x, y = (testing.lay_out(v, striding[letter]).to(gpu.device) for v, letter in zip((a, b), layout, strict=True))
        return verdicts(workload.name, gpu_calls.mm(precision)(x, y), x, y, precision)

    return Case(f"{workload.name}-{layout}", run)


def backward(dtype: str) -> Case:
    def run(gpu: Gpu) -> list[gpu_correctness.Verdict]:
        operands = baseline.draw(192, 128, 160, testing.DTYPES[dtype], device=gpu.device)
        got = gpu_calls.mm_backward(operands.grad, operands.a, operands.b)
        found = []
        for which, gradient in zip(("dgrad", "wgrad"), got, strict=True):
            assert gradient is not None, which
            found += verdicts(which, gradient, *operands.of(which))
        return found

    return Case(f"mm_backward-{dtype}", run)


def batched(dtype: str) -> Case:
    def run(gpu: Gpu) -> list[gpu_correctness.Verdict]:
        x = testing.normal(6 * 65, 64, testing.DTYPES[dtype]).to(gpu.device).unflatten(0, (6, 65))
        y = testing.normal(6 * 64, 80, testing.DTYPES[dtype]).to(gpu.device).unflatten(0, (6, 64))
        return verdicts("bmm", gpu_calls.bmm()(x, y), x, y)

    return Case(f"bmm-{dtype}", run)


def verdicts(what: str, result: Tensor, x: Tensor, y: Tensor, precision: str = "ieee") -> list[gpu_correctness.Verdict]:
    """Against float64 rounded once: torch's kernels stay out of the sanitizer's sight."""
    x, y = x.cpu(), y.cpu()
    exact = (x.double() @ y.double()).to(x.dtype)
    return [gpu_correctness.judge(what, result.cpu(), exact, x, y, precision)]


def check(case: Case, gpu: Gpu) -> dict[str, object]:
    """A row, or Wrong."""
    found = case.run(gpu)
    wrong = [verdict for verdict in found if not verdict.right]
    if wrong:
        raise IncorrectResult(str(wrong[0]))
    gpu.wait()
    return {"name": case.name}
