"""Forward, dgrad, wgrad and the whole step, this package beside torch.mm on the same operands.

One group a product, dtype and shape holds both rivals. What is wrong is not timed. The rivals of a group run
one after the other: `python -m bench.readme` lets them take turns, and its ratios are the ones to quote.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest

from matmul_grad import rivals, strict, testing


@functools.cache
def checked(name: str, shape: tuple[int, int, int], dtype: str) -> None:
    rivals.assert_right(rivals.RIVALS[name], *shape, testing.DTYPES[dtype])


@functools.lru_cache(maxsize=1)
def operands(shape: tuple[int, int, int], dtype: str) -> rivals.Operands:
    return rivals.draw(*shape, testing.DTYPES[dtype])


@pytest.mark.parametrize("rival", rivals.RIVALS)
@pytest.mark.parametrize("product", [*testing.PRODUCTS, rivals.STEP])
@pytest.mark.parametrize("dtype", ["f32", "f64"])
def test_mm(benchmark: Any, shape: tuple[int, int, int], dtype: str, product: str, rival: str) -> None:
    with strict():
        checked(rival, shape, dtype)
        work = rivals.work(rivals.RIVALS[rival], product, operands(shape, dtype))
        benchmark.group = f"{product}-{dtype}-{'x'.join(map(str, shape))}"
        benchmark.extra_info |= {"rival": rival, "flops": rivals.flops(*shape, product)}
        benchmark(work)
