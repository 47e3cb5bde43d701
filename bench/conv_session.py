"""The processes of `bench conv`: one times, with one number of threads; another measures memory and only forks.

{"time": {comparison}, "seconds": s}   → {"seconds": {...}, "ratio": {...}, "rounds": n, ...}
{"memory": {comparison}}               → {"peak bytes": {...}}, beside the result
{"lengths": {layer}, "dtype": d}       → {"each over one": {...}, "kept bytes": {...}}

What is measured in memory runs in a child that is forked for it, as in memory.py: nothing was freed there before.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
from collections.abc import Callable
from dataclasses import replace
from time import perf_counter
from typing import Any

import torch

import matmul_grad

from . import conv_calls, inputs, timer, worker
from .conv_calls import BACKENDS, FORWARD, Comparison, call_of
from .conv_layers import LENGTHS, Layer
from .devices import Cpu, reset_peak, status
from .memory import forked
from .workloads import OURS, TORCH

WARM = 2  # the batch and the channels of the call before, which loads what any call needs
MOST_COPIES = 64


def answer(task: worker.Message) -> worker.Message:
    if "time" in task:
        return timed(conv_calls.of_fields(task["time"]), task["seconds"])
    if "memory" in task:
        one = conv_calls.of_fields(task["memory"])
        return by_backend("peak bytes", lambda name: forked(functools.partial(peak, name, one)))
    layer = Layer(**task["lengths"] | {"kernel": tuple(task["lengths"]["kernel"])})
    found: dict[str, Any] = {"each over one": {}, "kept bytes": {}}
    for name in BACKENDS:
        measured = forked(functools.partial(many_lengths, name, layer, task["dtype"]))
        for key in found:
            found[key][name] = measured[key]
    return found


def by_backend(key: str, measure: Callable[[str], worker.Message]) -> worker.Message:
    return {key: {name: measure(name)[key] for name in BACKENDS}}


def timed(one: Comparison, seconds: float) -> worker.Message:
    """Correct first; then interleaved on normal operands, which calls rotate over past the last cache."""
    integers = conv_calls.draw(one, integers=True)
    right, found = conv_calls.expected(one, integers), {}
    try:
        conv_calls.assert_correct(OURS, one, integers, right)
        with contextlib.suppress(RuntimeError), matmul_grad.strict():
            call_of(OURS, one, integers)()
            found["runs on kernels"] = True
    except AssertionError as reason:
        return {"wrong": {OURS: str(reason)}}
    del integers, right
    first = conv_calls.draw(one)
    device = Cpu()
    count = min(MOST_COPIES, inputs.copies_past(device.cache_bytes(), first.held, device.free_bytes()))
    sets = [first, *(first.clones() for _ in range(count - 1))]
    calls = {name: inputs.alternating([call_of(name, one, each) for each in sets]) for name in BACKENDS}
    share = timer.share_of_core()
    times = timer.interleaved(calls, seconds)
    return {
        "runs on kernels": False, **found, "copies": count, "rounds": len(times[OURS]),
        "share of core": round(share(), 3),
        "seconds": {name: timer.summary(rounds) for name, rounds in times.items()},
        "ratio": {TORCH: timer.summary(timer.ratios(times[TORCH], times[OURS]))},
    }  # fmt: skip


def peak(name: str, one: Comparison) -> worker.Message:
    """Bytes of a call at its peak, beside its result."""
    torch.set_num_threads(one.threads)
    call_of(name, warm(one), conv_calls.draw(warm(one)))()
    call = call_of(name, one, conv_calls.draw(one))
    if not reset_peak():
        raise AssertionError("the system does not reset a peak")
    before = status("VmRSS")
    result = call()
    return {"peak bytes": max(0, status("VmHWM") - before - result.nbytes)}


def warm(one: Comparison) -> Comparison:
    """The same with few channels and the smallest image that its kernel fits."""
    small = replace(one.layer, ci=WARM, co=WARM, size=tuple(k + one.layer.stride for k in one.layer.kernel))
    return replace(one, layer=small, batch=WARM)


def many_lengths(name: str, layer: Layer, dtype: str) -> worker.Message:
    """Fifty lengths in a row, one call each: their time for an element over that of one length in as many calls, and
    what the process holds then beside what it held after the one."""

    def prepared(length: int) -> conv_calls.Call:
        one = Comparison(replace(layer, size=(length,)), FORWARD, dtype)
        return call_of(name, one, conv_calls.draw(one))

    mean = round(sum(LENGTHS) / len(LENGTHS)) + 1  # which is none of them
    alike, each = [prepared(mean) for _ in LENGTHS], [prepared(length) for length in LENGTHS]
    alike[0]()
    alone = elapsed(lambda: [call() for call in alike])
    before = status("VmRSS")
    together = elapsed(lambda: [call() for call in each])
    share = together / sum(LENGTHS) / (alone / (len(LENGTHS) * mean))
    return {"each over one": timer.rounded(share), "kept bytes": max(0, status("VmRSS") - before)}


def elapsed(do: Callable[[], object]) -> float:
    start = perf_counter()
    do()
    return perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--pin", action="store_true")
    command = parser.parse_args()
    if command.pin and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: command.threads])
    torch.set_num_threads(command.threads)
    worker.serve(answer)


if __name__ == "__main__":
    main()
