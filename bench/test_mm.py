"""Forward, dgrad, wgrad and the whole step, this package beside torch.mm on the same operands.

One group a product, dtype and shape holds both backends. What is wrong is not timed. Shapes, operands and checks are
those of `matmul-grad bench`, which times backends interleaved, and whose ratios are the ones to quote: here the
backends of a group run one after the other.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from matmul_grad import strict
from matmul_grad.bench import backends, correctness, inputs
from matmul_grad.bench.backends import call_of
from matmul_grad.bench.devices import Cpu
from matmul_grad.bench.workloads import PASSES, Workload


@functools.cache
def checked(name: str, workload: Workload) -> None:
    correctness.assert_correct(backends.BY_NAME[name].library(), workload, name=name)


@pytest.mark.parametrize("backend", backends.IMPLEMENTATIONS)
@pytest.mark.parametrize("product", PASSES)
@pytest.mark.parametrize("dtype", ["f32", "f64"])
def test_mm(benchmark: Any, shape: tuple[int, int, int], dtype: str, product: str, backend: str) -> None:
    workload = Workload(product, dtype, "NN", *shape, threads=torch.get_num_threads())
    cpu = Cpu()
    with strict():
        checked(backend, workload)
        library = backends.BY_NAME[backend].library()
        count = inputs.copies_past(cpu.cache_bytes(), workload.held, cpu.free_bytes())
        calls = [call_of(library, workload, each) for each in inputs.copies(inputs.draw(workload), count)]
        benchmark.group = f"{product}-{dtype}-{'x'.join(map(str, shape))}"
        benchmark.extra_info |= {"backend": backend, "flops": workload.flops, "copies": count}
        benchmark(inputs.alternating(calls))
