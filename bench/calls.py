"""What is timed of a library for a workload: the call, what it gave, and a batch of it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import testing
from . import baseline, timer
from .backends import Call, Library
from .roofline import Device
from .workloads import Workload

BATCH = 5 * timer.BATCH  # the caches are another's when a turn begins, so it has a call to warm up, and lasts
LONG = 0.05  # seconds: a call that needs no other before it


def call_of(library: Library, workload: Workload, each: baseline.Operands) -> Call:
    return library.step(each) if workload.product == baseline.STEP else library.product(*each.of(workload.product))


def products_of(library: Library, workload: Workload, result: Any) -> dict[str, Tensor]:
    """The products that a call gave, by name."""
    if workload.product != baseline.STEP:
        return {workload.product: library.tensor(result)}
    return {product: library.tensor(each) for product, each in zip(testing.PRODUCTS, result, strict=True)}


def batch_of(call: Call, device: Device) -> timer.Batch:
    """Seconds a call over a batch of at least BATCH, whose length is found out here."""
    call()
    once = timer.batch(call, 1, device.wait)
    while once < timer.BATCH and (more := timer.batch(call, 16, device.wait)) < once / 2:
        once = more  # a first call that is slow says little
    calls = max(1, round(BATCH / max(once, 1e-8)))

    def batch() -> float:
        if once < LONG:
            call()
        return timer.batch(call, calls, device.wait)

    return batch
