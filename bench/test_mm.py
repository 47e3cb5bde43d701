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
from matmul_grad.bench import backends, baseline, correctness, inputs
from matmul_grad.bench.calls import call_of, products_of
from matmul_grad.bench.devices import Cpu
from matmul_grad.bench.workloads import PASSES, Workload


@functools.lru_cache(maxsize=2)
def drawn(workload: Workload, values: str) -> baseline.Operands:
    found = inputs.draw(workload, values)
    if values == "normal":
        inputs.assert_normal(found)
    return found


@functools.cache
def checked(name: str, workload: Workload) -> None:
    library = backends.BY_NAME[name].library()
    for values, check in (("integers", correctness.assert_exact), ("normal", correctness.assert_close)):
        whole = drawn(workload, values)
        for which, got in products_of(library, workload, call_of(library, workload, whole)()).items():
            check(got, *whole.of(which), f"{name}, {workload.name}, {which}")


@pytest.mark.parametrize("backend", baseline.IMPLEMENTATIONS)
@pytest.mark.parametrize("product", PASSES)
@pytest.mark.parametrize("dtype", ["f32", "f64"])
def test_mm(benchmark: Any, shape: tuple[int, int, int], dtype: str, product: str, backend: str) -> None:
    workload = Workload(product, dtype, "NN", *shape, threads=torch.get_num_threads())
    cpu = Cpu()
    with strict():
        checked(backend, workload)
        library = backends.BY_NAME[backend].library()
        count = inputs.copies_past(cpu.cache_bytes(), workload.held, cpu.free_bytes())
        calls = [call_of(library, workload, each) for each in inputs.copies(drawn(workload, "normal"), count)]
        benchmark.group = f"{product}-{dtype}-{'x'.join(map(str, shape))}"
        benchmark.extra_info |= {"backend": backend, "flops": workload.flops, "copies": count}
        benchmark(inputs.alternating(calls))
