"""Forward, dgrad, wgrad and the whole step, this package beside torch.mm on the same operands.

One group a product, dtype and shape holds both rivals. What is wrong is not timed. Shapes, operands and checks are
those of `matmul-grad bench`, which lets rivals take turns, and whose ratios are the ones to quote: here the rivals of
a group run one after the other.
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
from matmul_grad.bench.workloads import PASSES, Cell


@functools.lru_cache(maxsize=2)
def drawn(cell: Cell, values: str) -> baseline.Operands:
    found = inputs.draw(cell, values)
    if values == "normal":
        inputs.assert_normal(found)
    return found


@functools.cache
def checked(name: str, cell: Cell) -> None:
    library = backends.BY_NAME[name].library()
    for values, check in (("integers", correctness.assert_exact), ("normal", correctness.assert_close)):
        whole = drawn(cell, values)
        for which, got in products_of(library, cell, call_of(library, cell, whole)()).items():
            check(got, *whole.of(which), f"{name}, {cell.name}, {which}")


@pytest.mark.parametrize("rival", baseline.RIVALS)
@pytest.mark.parametrize("product", PASSES)
@pytest.mark.parametrize("dtype", ["f32", "f64"])
def test_mm(benchmark: Any, shape: tuple[int, int, int], dtype: str, product: str, rival: str) -> None:
    cell = Cell(product, dtype, "NN", *shape, threads=torch.get_num_threads())
    cpu = Cpu()
    with strict():
        checked(rival, cell)
        library = backends.BY_NAME[rival].library()
        count = inputs.copies_past(cpu.cache_bytes(), cell.held, cpu.free_bytes())
        calls = [call_of(library, cell, each) for each in inputs.copies(drawn(cell, "normal"), count)]
        benchmark.group = f"{product}-{dtype}-{'x'.join(map(str, shape))}"
        benchmark.extra_info |= {"rival": rival, "flops": cell.flops, "copies": count}
        benchmark(inputs.in_turn(calls))
