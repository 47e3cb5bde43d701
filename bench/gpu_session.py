"""One comparison: right first, then timed, interleaved on the same operands. What comes out is a row."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict
from time import perf_counter
from typing import Any

import torch

from .. import cuda
from ..kernels.native import launch_table as table
from . import baseline, gpu_backends, gpu_calls, gpu_correctness, timer
from .devices import MOST_CALLS, REPLAY, Gpu
from .gpu_calls import Mm
from .gpu_workloads import GpuWorkload

DEVICE_SECONDS, CALL_SECONDS, LAUNCH_SECONDS = 0.12, 0.06, 0.25  # a comparison
QUEUE = 200  # launches before the host must wait: fewer than the driver's queue takes
HELD = 6  # times the operands' size: what a comparison holds at most, its float64 included

Row = dict[str, Any]
Mms = Mapping[str, Mm]


class Skipped(Exception):
    """What cannot be compared here; the message says why."""


class IncorrectResult(Exception):
    """A product that is not right; the message is the verdict."""


def compare(workload: GpuWorkload, gpu: Gpu) -> Row:
    """Device time and call time of this package and of the job's backend, if both are right."""
    if HELD * workload.bytes > gpu.free_bytes():
        raise Skipped(f"needs {HELD * workload.bytes / 2**30:.0f} GiB of free memory")
    theirs = workload.part if workload.part in gpu_backends.OTHERS else baseline.TORCH
    invariant = gpu_calls.batch_invariant() if workload.part == "invariant" else contextlib.nullcontext()
    with invariant:
        mms = {name: gpu_backends.mm_of(name, workload) for name in (theirs, baseline.OURS)}
        operands = gpu_backends.draw(workload, gpu.device)
        row: Row = {"name": workload.name, **asdict(workload), "flops": workload.flops}
        row["error"] = assert_correct(mms, workload, operands)
        row["kernel"] = kernel(workload, operands)
        batches, calls = graphs(mms, workload, operands, gpu)
        row["device"] = timed(batches, DEVICE_SECONDS, theirs) | {"calls": calls}
        del batches  # their graphs hold copies of the operands
        row["call"] = timed(eager(mms, workload, operands, gpu), CALL_SECONDS, theirs)
    return row


def assert_correct(mms: Mms, workload: GpuWorkload, operands: baseline.Operands) -> dict[str, Any]:
    """The verdicts on this package; Wrong where one is not right. A backend that is wrong has no time either."""
    found = {}
    for name, mm in mms.items():
        if name == baseline.TORCH:
            continue  # the others are held against it
        for verdict in gpu_correctness.verdicts(mm, workload, operands):
            if not verdict.right and name != baseline.OURS:
                raise Skipped(f"{name} is wrong: {verdict}")
            if not verdict.right:
                raise IncorrectResult(str(verdict))
            if name == baseline.OURS:
                found[verdict.what] = verdict.as_row()
    return found


def kernel(workload: GpuWorkload, operands: baseline.Operands) -> str:
    """The name of the kernel that ``choose`` gives; "" where there is more than one, or none to be named."""
    if workload.product == baseline.STEP or workload.part == "bmm":
        return ""
    with contextlib.suppress(Exception):  # nothing hangs on a name
        problem, target = gpu_calls.describe(*operands.of(workload.product), workload.precision)
        return gpu_calls.kernel_name(problem, gpu_calls.choose(problem, target))
    return ""


def graphs(
    mms: Mms, workload: GpuWorkload, operands: baseline.Operands, gpu: Gpu
) -> tuple[dict[str, timer.Batch], int]:
    """A CUDA graph a backend, of as many calls for each, and how many; operands come from L2 in none.

    The calls go round over copies that together exceed the L2 cache twice.
    """
    sizes = 2 * gpu.cache_bytes() // max(1, workload.bytes) + 1
    count = min(sizes, MOST_CALLS, max(1, gpu.free_bytes() // (2 * max(1, workload.bytes))))
    whole = gpu_backends.copies(operands, count)
    works = {name: [gpu_backends.work(mm, workload, each) for each in whole] for name, mm in mms.items()}
    slowest = max(gpu.seconds_a_call(work[0]) for work in works.values())
    rounds = -(-max(1, min(MOST_CALLS, int(REPLAY / max(slowest, 1e-9)))) // count)
    return {name: gpu.graph(rounds * work) for name, work in works.items()}, rounds * count


def eager(mms: Mms, workload: GpuWorkload, operands: baseline.Operands, gpu: Gpu) -> dict[str, timer.Batch]:
    """Calls from Python, one after the other, until all of a batch are done."""
    found: dict[str, timer.Batch] = {}
    for name, mm in mms.items():
        call = gpu_backends.work(mm, workload, operands)
        calls = timer.calls_in_batch(call, gpu.wait)
        found[name] = functools.partial(timer.batch, call, calls, gpu.wait)
    return found


def timed(batches: Mapping[str, timer.Batch], seconds: float, theirs: str) -> Row:
    times = timer.time_interleaved(batches, seconds)
    return {
        "rounds": len(times[theirs]),
        "seconds": {name: timer.summary(rounds) for name, rounds in times.items()},
        "ratio": timer.rounded(timer.ratio(times[theirs], times[baseline.OURS])),
    }


def launch_cost(n: int, dtype: str, gpu: Gpu) -> Row:
    """Seconds of the host a call of n × n × n, never waiting for the GPU: public functions, then operators."""
    workload = GpuWorkload("launch", "forward", dtype, n, n, n)
    operands = gpu_backends.draw(workload, gpu.device)
    a, b = operands.a, operands.b
    gradients = [x.detach().clone().requires_grad_() for x in (a, b)]
    ours_of = gpu_calls.mm("ieee")
    operator = torch.ops.matmul_grad.mm.default
    backward = torch.ops.matmul_grad.mm_backward.default
    calls: dict[str, Callable[[], object]] = {
        "torch.mm": lambda: torch.mm(a, b),
        "matmul_grad.mm": lambda: ours_of(a, b),
        "torch.ops.aten.mm": lambda: torch.ops.aten.mm.default(a, b),
        "torch.ops.matmul_grad.mm": lambda: operator(a, b),
        "torch.mm, recorded": lambda: torch.mm(*gradients),
        "matmul_grad.mm, recorded": lambda: ours_of(*gradients),
        "two torch.mm of a backward": lambda: (torch.mm(operands.grad, b.t()), torch.mm(a.t(), operands.grad)),
        "torch.ops.matmul_grad.mm_backward": lambda: backward(operands.grad, a, b, [True, True]),
    }
    times = timer.time_interleaved({name: host_batch(call, gpu) for name, call in calls.items()}, LAUNCH_SECONDS)
    seconds = {name: timer.summary(rounds) for name, rounds in times.items()}
    row: Row = {
        "name": f"{dtype} {n}×{n}",
        "dtype": dtype,
        "n": n,
        "rounds": len(times["torch.mm"]),
        "seconds": seconds,
    }
    if os.environ.get(cuda.VARIABLE) == "1":
        row["recipes"], row["refused"] = table.counts()
        if cuda.status():
            raise Skipped(cuda.status())
        if row["refused"]:
            raise IncorrectResult(
                f"{row['refused']} of {row['recipes']} recipes gave other bits than Triton's own launch"
            )
    return row


def host_batch(call: Callable[[], object], gpu: Gpu) -> timer.Batch:
    """Seconds of the host a call, over QUEUE of them into an empty queue."""
    for _ in range(3):
        call()

    def batch() -> float:
        gpu.wait()
        start = perf_counter()
        for _ in range(QUEUE):
            call()
        spent = perf_counter() - start
        gpu.wait()
        return spent / QUEUE

    return batch


def memory(workload: GpuWorkload, gpu: Gpu) -> Row:
    """Device memory of a training step: the peak above the operands, and what stays after the results are gone.

    kept: allocated by the first steps and not given back, a workspace. peak: of a later step, beside that.
    """
    operands = gpu_backends.draw(workload, gpu.device)
    found: dict[str, dict[str, int]] = {}
    for name in (baseline.OURS, baseline.TORCH):
        step = gpu_backends.work(gpu_backends.mm_of(name, workload), workload, operands)
        before = gpu.allocated()
        for _ in range(2):
            step()
        gpu.wait()
        kept = gpu.allocated() - before
        found[name] = {"peak": gpu.peak(step) - before - kept, "kept": kept}
    return {"name": workload.name, **asdict(workload), "bytes": found}
