"""Rivals in turns, each a function that runs one batch and says how long a call took: in this process or another.

As `timing.interleaved`, for rivals that may be slow: where five rounds would take PATIENCE times what was asked for,
three are enough.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from time import perf_counter

from . import timing

FEWEST, ENOUGH, MOST = 3, timing.ROUNDS[0], timing.ROUNDS[1]
PATIENCE = 6
SLOW = 0.5  # seconds: a call that needs no second one to be warm

Batch = Callable[[], float]


def nothing() -> None:
    pass


def batch_of(call: Callable[[], object]) -> Batch:
    """Seconds a call over one batch, whose length is found out here."""
    slow = timing.batch(call, 1, nothing) > SLOW
    calls = 1 if slow else timing.calls_in_batch(call, nothing)
    return lambda: timing.batch(call, calls, nothing)


def take_turns(batches: Mapping[str, Batch], seconds: float) -> dict[str, list[float]]:
    """Seconds a call, for each rival and round; the order turns by one from round to round."""
    times: dict[str, list[float]] = {name: [] for name in batches}
    order, start = list(batches), perf_counter()
    for done in range(MOST):
        spent = perf_counter() - start
        if (done >= ENOUGH and spent >= seconds) or (done >= FEWEST and spent >= PATIENCE * seconds):
            break
        for name in order:
            times[name].append(batches[name]())
        order.append(order.pop(0))
    return times
