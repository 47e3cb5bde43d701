"""The two ceilings of a machine, measured: what it can multiply (`peak` on CPU), and what memory gives."""

from __future__ import annotations

from typing import Any

import torch

from .. import testing, timing, turns
from ..gpu_report.device import Gpu
from . import peak
from .devices import Cpu
from .peak import Peak

Device = Cpu | Gpu

LARGE = 8192  # a cube that keeps every multiprocessor busy
PAST = 8  # times the last cache: what is read and written to measure memory
LEAST = 256 << 20  # bytes of it
SECONDS = 0.5


def top(dtype: str, device: Device) -> Peak | None:
    """What the units that multiply give: on CPU on registers alone; on a GPU torch's own largest product of ``dtype``.

    None where there is no such loop (float16 on CPU, which is multiplied as float32).
    """
    kind = testing.DTYPES[dtype]
    if isinstance(device, Cpu):
        return peak.loop(str(kind).removeprefix("torch."))
    n = LARGE if 3 * kind.itemsize * LARGE**2 < device.free_bytes() // 2 else LARGE // 4
    x, y = torch.randn(2, n, n, device=device.device).to(kind)
    out = torch.empty_like(x)
    return Peak(lambda: torch.mm(x, y, out=out), 2 * n**3)


def bandwidth(device: Device, seconds: float = SECONDS) -> dict[str, Any]:
    """GB/s of memory: the better of reading (the dot product of two vectors) and copying, on all of torch's threads.

    >>> found = bandwidth(Cpu(), seconds=0.0)
    >>> found["how"] in ("read", "copy") and 0 < found["low"] <= found["median"] <= found["high"]
    True
    """
    count = max(LEAST, PAST * device.cache_bytes()) // 8
    x, y = torch.randn(2, count, device=device.device)
    ways = {"read": lambda: torch.dot(x, y), "copy": lambda: x.copy_(y)}
    batches = {}
    for name, call in ways.items():
        call()
        batches[name] = device.graph([call] * 4) if isinstance(device, Gpu) else once(call)
    times = turns.take_turns(batches, seconds)
    how = min(times, key=lambda name: timing.quartiles(times[name]).median)
    rates = [8 * count / s / 1e9 for s in times[how]]
    return {"how": how, **timing.summary(rates)}


def once(call: Any) -> turns.Batch:
    return lambda: timing.batch(call, 1, turns.nothing)
