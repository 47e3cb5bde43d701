"""One step of `gpu-report` in a process of its own: tasks in order, a line of JSON on stdout for each.

    {"begin": 7, "of": 20, "name": "forward-bf16-256x256x256"}      before the task
    {"row": {...}}                                                  after it: what was measured, or why not
    {"left": 12}                                                    the time was up, so many were not begun

A task that leaves the GPU's context broken ends the process with BROKEN; whoever started it may start another one
behind that task. Those who ask get the same tasks in the same order in every process.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import platform
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from time import perf_counter, time
from typing import NamedTuple

import torch

from .. import machine
from . import baseline, gpu_backends, gpu_calls, gpu_session, gpu_workloads, sanitizer
from .devices import Gpu
from .gpu_session import IncorrectResult, Row, Skipped
from .gpu_workloads import GpuWorkload

BROKEN = 3
LOG = 2000  # characters of a traceback that a row keeps
COMPILERS = 8  # processes at a time, each with a context of its own on the GPU
LAUNCHES = tuple((dtype, n) for n in (8, 256) for dtype in ("bf16", "f32"))
MEMORY = tuple(
    GpuWorkload("products", baseline.STEP, dtype, *shape)
    for dtype, shape in (
        ("bf16", (2048, 4096, 4096)),
        ("bf16", (8192, 768, 768)),
        ("bf16", (128, 4096, 14336)),
        ("bf16", (257, 129, 513)),
        ("f32", (2048, 3072, 768)),
    )
)


class Task(NamedTuple):
    """What there is to do, and what it is called."""

    name: str
    run: Callable[[Gpu], Row]


def tasks(step: str, seconds: float = 60.0) -> list[Task]:
    """The tasks of a step. ``seconds`` is known to those that watch the clock themselves."""
    return {
        "environment": lambda: [Task("environment", environment)],
        "sanitized": lambda: [Task(case.name, partial(sanitizer.check, case)) for case in sanitizer.cases()],
        "compile": lambda: [Task("kernels", partial(compile_kernels, seconds))],
        "ratios": lambda: [
            Task(workload.name, partial(gpu_session.compare, workload)) for workload in gpu_workloads.ratios()
        ],
        "rivals": lambda: [
            Task(workload.name, partial(gpu_session.compare, workload)) for workload in gpu_workloads.against_others()
        ],
        "launch": lambda: [Task(f"{d} {n}×{n}", partial(gpu_session.launch_cost, n, d)) for d, n in LAUNCHES],
        "memory": lambda: [Task(workload.name, partial(gpu_session.memory, workload)) for workload in MEMORY],
    }[step]()


def serve(tasks: Sequence[Task], gpu: Gpu, start: int, seconds: float, say: Callable[[Row], None]) -> int:
    """Do the tasks from ``start`` on until the time is up; the exit code."""
    end = perf_counter() + seconds
    for index, task in enumerate(tasks[start:], start):
        if perf_counter() > end:
            say({"left": len(tasks) - index})
            break
        say({"begin": index, "of": len(tasks), "name": task.name})
        row, broken = attempt(task, gpu)
        say({"row": row})
        if broken:
            return BROKEN
    return 0


def attempt(task: Task, gpu: Gpu) -> tuple[Row, bool]:
    """The row of a task, and whether the GPU's context is broken now."""
    try:
        gpu.tidy()
        row = task.run(gpu)
        return row if "name" in row else {"name": task.name, **row}, False
    except IncorrectResult as verdict:
        return {"name": task.name, "wrong": str(verdict)}, False
    except (Skipped, gpu_calls.Missing) as reason:
        return {"name": task.name, "skipped": str(reason)}, False
    except torch.cuda.OutOfMemoryError:
        return {"name": task.name, "skipped": "out of device memory"}, False
    except Exception as error:
        said = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
        return {"name": task.name, "failed": said, "log": traceback.format_exc()[-LOG:]}, is_broken(gpu)


def is_broken(gpu: Gpu) -> bool:
    """An error of a kernel stays: every later call of the process meets it again."""
    try:
        gpu.wait()
        gpu.tidy()
    except Exception:
        return True
    return False


def environment(gpu: Gpu) -> Row:
    """What it is measured on."""
    packages = ("matmul-grad", "torch", "triton", "numba", "flag_gems", "batch_invariant_ops")
    versions = {package: machine.version(package) for package in packages}
    facts = gpu.facts() | {"CPU": f"{machine.processor()}, {os.cpu_count()} cores"}
    return {"facts": facts | {"python": platform.python_version()} | versions}


def compile_kernels(seconds: float, gpu: Gpu) -> Row:
    """The kernels of the ratio table compiled by several processes at once, into the cache that Triton keeps.

    What fails here fails in the table too, and is said there.
    """
    end, workers = perf_counter() + 0.9 * seconds, min(COMPILERS, os.cpu_count() or 1)
    distinct = [workload for workload in gpu_workloads.ratios() if workload.part != "invariant"]
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
    # The products of one shape share kernels: in two processes they would compile them at the same time.
    shapes = list(dict.fromkeys(workload.shape for workload in distinct))
    parts = [[workload for workload in distinct if workload.shape in shapes[i::workers]] for i in range(workers)]
    waiting = [pool.submit(compile_part, part, end - perf_counter()) for part in parts]
    done = 0
    for part in as_completed(waiting):
        try:
            done += part.result()
        except Exception as error:  # a process that died takes the others with it
            print(f"compiling: {type(error).__name__}: {error}", file=sys.stderr)
    pool.shutdown(wait=False, cancel_futures=True)
    return {"products": done, "of": len(distinct), "processes": workers}


def compile_part(part: Sequence[GpuWorkload], seconds: float) -> int:
    """Each product once; how many went through before the time was up."""
    gpu, end, done = Gpu(), perf_counter() + seconds, 0
    gpu.multiply_in_ieee()
    for workload in part:
        if perf_counter() > end:
            break
        try:
            if gpu_session.HELD * COMPILERS * workload.bytes < gpu.free_bytes():
                gpu_backends.work(
                    gpu_backends.mm_of(baseline.OURS, workload), workload, gpu_backends.draw(workload, gpu.device)
                )()
                gpu.wait()
                done += 1
        except Exception as error:
            print(f"{workload.name}: {type(error).__name__}: {error}", file=sys.stderr)
            if is_broken(gpu):
                break
    return done


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("step")
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--until", type=float, required=True, help="on the clock of time.time()")
    command = parser.parse_args(arguments)
    gpu = Gpu()
    gpu.multiply_in_ieee()
    if command.step in ("ratios", "rivals", "launch"):
        gpu.ready()
    with speaking() as say:
        left = command.until - time()
        return serve(tasks(command.step, left), gpu, command.start, left, say)


@contextlib.contextmanager
def speaking() -> Iterator[Callable[[Row], None]]:
    """stdout is the pipe for lines of JSON; whatever else is printed goes to stderr."""
    with os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8") as pipe:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        yield lambda message: print(json.dumps(message), file=pipe, flush=True)


if __name__ == "__main__":
    sys.exit(main())
