"""One child of `cpu-ratio`: torch, this package and the peak of the CPU in turns, with one number of threads.

All three run on torch's own pool of threads, so they may share a process.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from dataclasses import asdict
from time import perf_counter
from typing import Any

import torch

from matmul_grad import ops, rivals, strict, timing, turns
from matmul_grad.bench import peak, worker

from . import right
from .plan import Job

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
        worker.serve(lambda task: measure(Job(**task), command.seconds))


def measure(job: Job, seconds: float) -> Row:
    """Right first, then timed."""
    calls = {"products": products, "step": step, "overhead": overhead}[job.part](job)
    top = peak.loop(str(job.case.dtype).removeprefix("torch.")) if job.peak else None
    if top:
        calls[PEAK] = top.call
    batches = {name: turns.batch_of(call) for name, call in calls.items()}
    for _ in range(TRIES):
        start, share = perf_counter(), timing.share_of_core()
        times = turns.take_turns(batches, seconds)
        had, long = share(), perf_counter() - start > 2 * seconds
        # Of several threads those without work sleep: nothing is to be seen from their share.
        if had >= timing.AT_REST or long or torch.get_num_threads() > 1:
            break
    found = row(job, torch.get_num_threads(), times, rivals.THEIRS, had)
    if top:
        of_peak = timing.quartiles(times[PEAK])._asdict()
        found[PEAK] = {name: timing.rounded(top.flops / s / 1e9) for name, s in of_peak.items()}
    return found


def products(job: Job) -> Calls:
    x, y = right.assert_product(rivals.RIVALS[rivals.OURS], job.case)
    return {name: functools.partial(mm, x, y) for name, mm in rivals.RIVALS.items()}


def step(job: Job) -> Calls:
    right.assert_step(rivals.RIVALS[rivals.OURS], job.case)
    operands = rivals.draw(job.m, job.n, job.k, job.case.dtype)
    return {name: rivals.work(mm, rivals.STEP, operands) for name, mm in rivals.RIVALS.items()}


def overhead(job: Job) -> Calls:
    """The two operators themselves, on operands without a gradient."""
    ops.native_status()
    theirs, ours = torch.ops.aten.mm.default, torch.ops.matmul_grad.mm.default
    x, y = right.assert_product(ours, job.case)
    return {rivals.THEIRS: functools.partial(theirs, x, y), rivals.OURS: functools.partial(ours, x, y)}


def row(job: Job, threads: int, times: dict[str, list[float]], theirs: str, share: float) -> Row:
    """What is kept of a comparison."""
    names = theirs, rivals.OURS
    return {
        **asdict(job),
        "threads": threads,
        "flops": job.flops,
        "rounds": len(times[theirs]),
        "share of core": round(share, 3),
        "seconds": {name: timing.summary(times[name]) for name in names},
        "ratio": timing.rounded(timing.ratio(times[theirs], times[rivals.OURS])),
    }


if __name__ == "__main__":
    main()
