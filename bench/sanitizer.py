"""A small set of products that meets every path: what compute-sanitizer watches, and what runs before it.

Each is checked as all results are. Under the sanitizer torch must not cache memory (PYTORCH_NO_CUDA_MEMORY_CACHING=1),
so that an address outside of an operand is outside of everything.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch

import matmul_grad

from . import backends, correctness, gpu_calls, inputs
from .correctness import IncorrectResult
from .devices import Gpu
from .workloads import NUMBERS, OURS, Workload, on_gpu

# What 16-byte copies can take and what they cannot, a row, a column, few rows, a long sum with few tiles.
SHAPES = ((128, 256, 192), (65, 67, 131), (1, 160, 96), (96, 1, 160), (8, 128, 256), (16, 32, 4096))
BACKWARD = "mm_backward"
CONVOLUTION = "convolution"
CONVOLVED = {"bf16": torch.bfloat16, "f32": torch.float32, "f64": torch.float64}
GROUPED = "grouped"
ENDS = (5, 5, 70, 90)  # of 97 rows: one group is empty, and some rows are in none
# Channels that fill a step of k, adjacent and not, and others with a stride, whose input gradient has phases.
IMAGES = {"taps": (64, 1, False), "lines": (64, 1, True), "phases": (24, 2, False)}


def cases() -> dict[str, Callable[[Gpu], None]]:
    """Every kind of kernel early, since a sanitizer is slow: one shape, what is more than a product, the rest."""
    ordered = [("NN", shape) for shape in SHAPES] + [(letters, SHAPES[0]) for letters in ("NT", "TN", "TT")]
    planned = [
        Workload("forward", dtype, layout, *shape, device="cuda", precision=precision)
        for (layout, shape), (dtype, precision) in itertools.product(ordered, NUMBERS.values())
    ]
    batched = [on_gpu("forward", dtype, (65, 80, 64), batch=6) for dtype in ("bf16", "f32")]
    backward = [on_gpu("step", dtype, (192, 128, 160)) for dtype in ("bf16", "f32")]
    first, rest = planned[: len(NUMBERS)], planned[len(NUMBERS) :]
    found: dict[str, Any] = {workload.name: product(workload) for workload in first}
    found |= {f"{BACKWARD}-{workload.dtype}": in_one_launch(workload) for workload in backward}
    found |= {workload.name: product(workload) for workload in batched}
    found |= {f"{CONVOLUTION}-{dtype}-{name}": convolved(dtype, name) for dtype in CONVOLVED for name in IMAGES}
    found |= {f"{GROUPED}-{dtype}-{k}": grouped(dtype, k) for dtype in CONVOLVED for k in (64, 67)}
    return found | {workload.name: product(workload) for workload in rest}


def product(workload: Workload) -> Callable[[Gpu], None]:
    return lambda gpu: correctness.assert_correct(backends.own(OURS), workload, device=gpu.device)


def in_one_launch(workload: Workload) -> Callable[[Gpu], None]:
    """Both gradients."""

    def run(gpu: Gpu) -> None:
        for values, check in (("integers", correctness.assert_exact), ("normal", correctness.assert_close)):
            operands = inputs.draw(workload, values, gpu.device)
            got = gpu_calls.mm_backward(operands.grad, operands.a, operands.b)
            for which, gradient in zip(("dgrad", "wgrad"), got, strict=True):
                assert gradient is not None, which
                check(gradient, *operands.of(which), which)

    return run


def convolved(dtype: str, name: str) -> Callable[[Gpu], None]:
    """Forward and both gradients of a 3 x 3 convolution, exact on integers."""

    def run(gpu: Gpu) -> None:
        channels, stride, last = IMAGES[name]
        shared: Any = ((stride, stride), (1, 1), (1, 1), 1)
        size = 16 // stride
        generator = torch.Generator().manual_seed(1)
        shapes = (2, channels, 16, 16), (32, channels, 3, 3), (2, 32, size, size)
        drawn = [(torch.rand(shape, generator=generator) < 0.1).double() for shape in shapes]
        x, w, grad = (
            given.to(
                gpu.device, CONVOLVED[dtype], memory_format=torch.channels_last if last else torch.contiguous_format
            )
            for given in drawn
        )
        masks = False, [0, 0], 1
        wanted = torch.ops.aten.convolution_backward(
            drawn[2], *drawn[:2], None, *shared[:3], *masks, [True, True, False]
        )
        call = gpu_calls.convolutions()
        results = {
            "forward": (call["forward"](x, w, None, *shared), torch.conv2d(drawn[0], drawn[1], None, *shared[:2])),
            "dgrad": (call["dgrad"](grad, w, x.shape, *shared), wanted[0]),
            "wgrad": (call["wgrad"](grad, x, w.shape, *shared), wanted[1]),
        }
        for which, (got, want) in results.items():
            if not torch.equal(got.cpu(), want.to(got.dtype)):
                raise IncorrectResult(f"{CONVOLUTION} {which} is not exact")

    return run


def grouped(dtype: str, k: int) -> Callable[[Gpu], None]:
    """Forward and both gradients of a layer of experts, exact on integers; k: whole 16 bytes or not."""

    def run(gpu: Gpu) -> None:
        generator, n = torch.Generator().manual_seed(1), 144
        shapes = (97, k), (len(ENDS), k, n), (97, n)
        drawn = [(torch.rand(shape, generator=generator) < 0.1).double() for shape in shapes]
        x, w, grad = (given.to(gpu.device, CONVOLVED[dtype]) for given in drawn)
        wanted = torch.zeros_like(drawn[2]), torch.zeros_like(drawn[0]), torch.zeros_like(drawn[1])
        for g, rows in enumerate(slice(*pair) for pair in zip((0, *ENDS), ENDS, strict=False)):
            wanted[0][rows] = drawn[0][rows] @ drawn[1][g]
            wanted[1][rows] = drawn[2][rows] @ drawn[1][g].mT
            wanted[2][g] = drawn[0][rows].mT @ drawn[2][rows]
        offs = torch.tensor(ENDS, dtype=torch.int32, device=gpu.device)
        leaves = x.requires_grad_(), w.requires_grad_()
        y = matmul_grad.grouped_mm(*leaves, offs=offs)
        results = y.detach(), *torch.autograd.grad(y, leaves, grad)
        for which, got, want in zip(("forward", "dgrad", "wgrad"), results, wanted, strict=True):
            if not torch.equal(got.cpu(), want.to(got.dtype)):
                raise IncorrectResult(f"{GROUPED} {which} is not exact")

    return run


def check(gpu: Gpu, name: str) -> dict[str, object]:
    with matmul_grad.strict():
        cases()[name](gpu)
    gpu.wait()
    return {}
