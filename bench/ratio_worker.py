"""One child of `cpu-ratio`: torch, this package and the peak of the CPU interleaved, with one number of threads.

All three run on torch's pool of threads, so they may share a process.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from dataclasses import asdict
from time import perf_counter
from typing import Any

import torch

from .. import ops, strict
from . import baseline, ratio_correctness, roofline, timer, worker
from .ratio_workloads import RatioWorkload

PEAK = "peak"
TRIES = 3  # of a comparison on one thread, for a moment when nothing else runs

Row = dict[str, Any]
Calls = dict[str, Callable[[], object]]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--pin", action="store_true")
    command = parser.parse_args()
    if command.pin:
        worker.stay_on_one_core()
    torch.set_num_threads(command.threads)
    with strict():
        worker.serve(lambda task: measure(RatioWorkload(**task), command.seconds))


def measure(workload: RatioWorkload, seconds: float) -> Row:
    """Right first, then timed."""
    calls = {"products": products, "step": step, "overhead": overhead}[workload.part](workload)
    top = roofline.loop(str(workload.case.dtype).removeprefix("torch.")) if workload.peak else None
    if top:
        calls[PEAK] = top.call
    batches = {name: timer.batch_of(call) for name, call in calls.items()}
    for _ in range(TRIES):
        start, share = perf_counter(), timer.share_of_core()
        times = timer.time_interleaved(batches, seconds)
        had, long = share(), perf_counter() - start > 2 * seconds
        # Of several threads those without work sleep: nothing is to be seen from their share.
        if had >= timer.AT_REST or long or torch.get_num_threads() > 1:
            break
    found = row(workload, torch.get_num_threads(), times, baseline.TORCH, had)
    if top:
        of_peak = timer.quartiles(times[PEAK])._asdict()
        found[PEAK] = {name: timer.rounded(top.flops / s / 1e9) for name, s in of_peak.items()}
    return found


def products(workload: RatioWorkload) -> Calls:
    x, y = ratio_correctness.assert_product(baseline.IMPLEMENTATIONS[baseline.OURS], workload.case)
    return {name: functools.partial(mm, x, y) for name, mm in baseline.IMPLEMENTATIONS.items()}


def step(workload: RatioWorkload) -> Calls:
    ratio_correctness.assert_step(baseline.IMPLEMENTATIONS[baseline.OURS], workload.case)
    operands = baseline.draw(workload.m, workload.n, workload.k, workload.case.dtype)
    return {name: baseline.work(mm, baseline.STEP, operands) for name, mm in baseline.IMPLEMENTATIONS.items()}


def overhead(workload: RatioWorkload) -> Calls:
    """The two operators themselves, on operands without a gradient."""
    ops.native_status()
    theirs, ours = torch.ops.aten.mm.default, torch.ops.matmul_grad.mm.default
    x, y = ratio_correctness.assert_product(ours, workload.case)
    return {baseline.TORCH: functools.partial(theirs, x, y), baseline.OURS: functools.partial(ours, x, y)}


def row(workload: RatioWorkload, threads: int, times: dict[str, list[float]], theirs: str, share: float) -> Row:
    """What is kept of a comparison."""
    names = theirs, baseline.OURS
    return {
        **asdict(workload),
        "threads": threads,
        "flops": workload.flops,
        "rounds": len(times[theirs]),
        "share of core": round(share, 3),
        "seconds": {name: timer.summary(times[name]) for name in names},
        "ratio": timer.rounded(timer.ratio(times[theirs], times[baseline.OURS])),
    }


if __name__ == "__main__":
    main()
