"""The candidates of problem after problem, in a process of its own; lines of JSON on stdout, as `gpu_worker`.

    {"facts": {...}}                                   first: the GPU and the versions
    {"begin": 3, "name": ...}                          before a problem; {"known": name} where its winner is known
    {"candidates": 12}                                 before they are compiled
    {"try": {config}}                                  before a candidate runs for the first time; null: all have
    {"dropped": {config}, "why": ...}                  a candidate that is wrong or cannot run
    {"row": {...}}                                     the winner
    {"left": 2}                                        the time was up

Whoever started it knows from this which candidate ended a process, and names it to the next as ``bad``.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from time import perf_counter, time
from typing import Any

import torch

from ..kernels.gpu.config import TileConfig
from . import baseline, files, gpu_backends, gpu_calls, gpu_correctness, gpu_session, timer
from . import gpu_worker as reporting
from .devices import Gpu
from .gpu_workloads import GpuWorkload

FIRST_SECONDS, FINAL_SECONDS = 0.02, 0.3  # a candidate in the first turns, all finalists in the last
FINALISTS = 4
COMPILING = 45.0  # seconds for all candidates of a problem, less than the silence that ends this process
GAIN = 1.02  # that a winner must have over the default: less is noise, and the default is the simpler answer

Fields = dict[str, Any]
Say = Callable[[dict[str, Any]], None]
Compile = Callable[[GpuWorkload, list[TileConfig]], None]


class Broken(Exception):
    """A candidate left the GPU's context broken; the message says how."""


def serve(plan: dict[str, Any], gpu: Gpu, seconds: float, say: Say, compiler: Compile) -> int:
    """The problems of ``plan`` until the time is up."""
    end, done = perf_counter() + seconds, set(plan["known"])
    say({"facts": reporting.environment(gpu)["facts"] | files.stamp()})
    for index, fields in enumerate(plan["jobs"]):
        workload = GpuWorkload(**fields)
        if perf_counter() > end:
            say({"left": len(plan["jobs"]) - index})
            break
        say({"begin": index, "name": workload.name})
        try:
            gpu.tidy()
            found = tune(workload, done, plan["bad"].get(workload.name, []), gpu, say, compiler)
        except Broken as reason:
            print(f"{workload.name}: {reason}", file=sys.stderr)
            return reporting.BROKEN
        except (gpu_session.Skipped, torch.cuda.OutOfMemoryError) as reason:
            found = {"skipped": str(reason).splitlines()[0]}
        except Exception as reason:
            if reporting.is_broken(gpu):
                raise
            found = {"failed": f"{type(reason).__name__}: {reason}"}
        done.add(found.get("key", ""))
        say({"row": {"name": workload.name, **found}} if "known" not in found else {"known": workload.name})
    return 0


def tune(
    workload: GpuWorkload,
    known: set[str],
    bad: Sequence[Fields],
    gpu: Gpu,
    say: Say,
    compiler: Compile,
) -> dict[str, Any]:
    """The row of a problem: every candidate that is right, timed; the winner beside `choose`'s default."""
    if gpu_session.HELD * workload.bytes > gpu.free_bytes():
        raise gpu_session.Skipped(f"needs {gpu_session.HELD * workload.bytes / 2**30:.0f} GiB of free memory")
    operands = gpu_backends.draw(workload, gpu.device)
    problem, target = gpu_calls.describe(*operands.of(workload.product), workload.precision)
    key = gpu_calls.key(problem, target)
    if key in known:
        return {"key": key, "known": True}
    default = gpu_calls.choose(problem, target)
    every = list(dict.fromkeys([default, *gpu_calls.candidates(problem, target)]))
    tried = [config for config in every if asdict(config) not in bad]
    say({"candidates": len(tried)})
    compiler(workload, tried)
    good = [config for config in tried if is_good(config, workload, operands, gpu, say)]
    if not good:
        return {"failed": f"none of {len(every)} candidates is right"}
    say({"try": None})
    seconds = times(good, default, workload, operands, gpu)
    best = min(seconds, key=lambda config: seconds[config])
    winner = best if default not in seconds or seconds[default] > GAIN * seconds[best] else default
    row: dict[str, Any] = {"key": key, "winner": asdict(winner), "kernel": gpu_calls.kernel_name(problem, winner)}
    row |= {"seconds": seconds[winner], "default": asdict(default), "default seconds": seconds.get(default)}
    return row | {"candidates": len(every), "timed": len(good), **files.stamp()}


def is_good(config: TileConfig, workload: GpuWorkload, operands: baseline.Operands, gpu: Gpu, say: Say) -> bool:
    """Whether a candidate compiles, runs and is right; it is named before it is tried."""
    say({"try": asdict(config)})
    mm = partial(with_config, config, workload)
    try:
        wrong = [str(verdict) for verdict in gpu_correctness.verdicts(mm, workload, operands) if not verdict.right]
        gpu.wait()
    except Exception as error:
        why = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
        say({"dropped": asdict(config), "why": why})
        if reporting.is_broken(gpu):
            raise Broken(why) from error
        return False
    if wrong:
        say({"dropped": asdict(config), "why": f"wrong, {wrong[0]}"})
    return not wrong


def with_config(config: TileConfig, workload: GpuWorkload, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return gpu_calls.with_config(x, y, workload.precision, config)


def times(
    good: list[TileConfig], default: TileConfig, workload: GpuWorkload, operands: baseline.Operands, gpu: Gpu
) -> dict[TileConfig, float]:
    """Median seconds of device time: all interleaved, then the fastest and the default again for longer."""
    mms = {str(index): partial(with_config, config, workload) for index, config in enumerate(good)}
    batches, _ = gpu_session.graphs(mms, workload, operands, gpu)
    first = medians(batches, FIRST_SECONDS * len(good))
    finalists = sorted(first, key=lambda name: first[name])[:FINALISTS]
    finalists += [str(good.index(default))] if default in good and str(good.index(default)) not in finalists else []
    final = medians({name: batches[name] for name in finalists}, FINAL_SECONDS)
    return {good[int(name)]: seconds for name, seconds in final.items()}


def medians(batches: dict[str, timer.Batch], seconds: float) -> dict[str, float]:
    return {name: timer.summary(found)["median"] for name, found in timer.time_interleaved(batches, seconds).items()}


class Compilers:
    """Compiles candidates by several processes at once, into the cache that Triton keeps; what fails, fails again."""

    def __init__(self, processes: int) -> None:
        self._processes, self._pool = processes, self._new(processes)

    @staticmethod
    def _new(processes: int) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn"))

    def __call__(self, workload: GpuWorkload, configs: list[TileConfig]) -> None:
        try:
            list(self._pool.map(compile_one, [workload] * len(configs), configs, timeout=COMPILING))
        except Exception as error:  # a candidate that ended its process, or never ends
            print(f"{workload.name}: compiling: {type(error).__name__}: {error}", file=sys.stderr)
            processes = list((self._pool._processes or {}).values())
            self._pool.shutdown(wait=False, cancel_futures=True)
            for process in processes:
                process.kill()
            self._pool = self._new(self._processes)


def compile_one(workload: GpuWorkload, config: TileConfig) -> None:
    """One product with a candidate; a process whose context it breaks ends."""
    gpu = Gpu()
    gpu.multiply_in_ieee()
    try:
        with_config(config, workload, *gpu_backends.draw(workload, gpu.device).of(workload.product))
        gpu.wait()
    except Exception:
        if reporting.is_broken(gpu):
            os._exit(reporting.BROKEN)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("plan", type=Path)
    parser.add_argument("--until", type=float, required=True, help="on the clock of time.time()")
    command = parser.parse_args(arguments)
    plan = json.loads(command.plan.read_text(encoding="utf-8"))
    gpu = Gpu()
    gpu.multiply_in_ieee()
    gpu.ready()
    with reporting.speaking() as say:
        compiler = Compilers(min(reporting.COMPILERS, os.cpu_count() or 1))
        return serve(plan, gpu, command.until - time(), say, compiler)


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)  # pool processes that still compile are of no use any more
