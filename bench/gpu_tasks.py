"""What a process does on a GPU besides comparisons: launch costs, the sanitizer's small set, candidates of tiles.

Each task is a function of the device and of the fields of its message; its answer is a row, or what `tune` asked for.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from time import perf_counter
from typing import Any

import torch

import matmul_grad

from .. import cuda
from ..kernels.gpu import choose, config, tuned_configs
from ..kernels.gpu.config import TileConfig
from ..kernels.native import launch_table
from . import backends, correctness, gpu_calls, inputs, sanitizer, timer, workloads
from .backends import OfTorch, Skipped, call_of
from .correctness import IncorrectResult
from .devices import MOST_CALLS, Gpu
from .inputs import Operands
from .workloads import OURS, Workload, on_gpu

LAUNCHES = tuple((dtype, n) for n in (8, 256) for dtype in ("bf16", "f32"))
LAUNCH_SECONDS = 0.25
QUEUE = 200  # launches before the host must wait: fewer than the driver's queue takes
HELD = 6  # times the operands' size: what the candidates of a problem hold at most
FIRST_SECONDS, FINAL_SECONDS = 0.02, 0.3  # a candidate in the first rounds, all finalists in the last
FINALISTS = 4
COMPILERS = 8  # processes at a time, each with a context of its own on the GPU
COMPILING = 45.0  # seconds for all candidates of a problem, less than the silence that ends this process

Row = dict[str, Any]
Part = Sequence[tuple[Workload, TileConfig | None]]


def launch_cost(gpu: Gpu, n: int, dtype: str) -> Row:
    """Seconds of the host a call of n × n × n, never waiting for the GPU: public functions, then operators."""
    operands = drawn(on_gpu("forward", dtype, (n, n, n)), gpu.device)
    a, b, grad = operands
    x, y = (operand.detach().clone().requires_grad_() for operand in (a, b))
    operator = torch.ops.matmul_grad.mm.default
    backward = torch.ops.matmul_grad.mm_backward.default
    calls: dict[str, Callable[[], object]] = {
        "torch.mm": lambda: torch.mm(a, b),
        "matmul_grad.mm": lambda: matmul_grad.mm(a, b),
        "torch.ops.aten.mm": lambda: torch.ops.aten.mm.default(a, b),
        "torch.ops.matmul_grad.mm": lambda: operator(a, b),
        "torch.mm, recorded": lambda: torch.mm(x, y),
        "matmul_grad.mm, recorded": lambda: matmul_grad.mm(x, y),
        "two torch.mm of a backward": lambda: (torch.mm(grad, b.t()), torch.mm(a.t(), grad)),
        "torch.ops.matmul_grad.mm_backward": lambda: backward(grad, a, b, [True, True]),
    }
    times = timer.time_interleaved({name: host_batch(call, gpu) for name, call in calls.items()}, LAUNCH_SECONDS)
    row: Row = {"rounds": len(times["torch.mm"])}
    row["host seconds"] = {name: timer.summary(rounds) for name, rounds in times.items()}
    if os.environ.get(cuda.VARIABLE) == "1":
        row["recipes"], row["refused"] = launch_table.counts()
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


@functools.lru_cache(maxsize=1)
def drawn(workload: Workload, device: str, values: str = "normal") -> Operands:
    """The operands of the problem at hand, which each of its candidates is tried on."""
    return inputs.draw(workload, values, device)


def problem(gpu: Gpu, workload: Row) -> Row:
    """The key of a problem, its default tile and its candidates."""
    wanted = Workload(**workload)
    if HELD * wanted.held > gpu.free_bytes():
        raise Skipped(f"needs {HELD * wanted.held / 2**30:.0f} GiB of free memory")
    found, target = gpu_calls.describe(*drawn(wanted, gpu.device).of(wanted.product), wanted.precision)
    default = choose.choose(found, target)
    every = list(dict.fromkeys([default, *choose.candidates(found, target)]))
    names = [config.kernel_name(found, tile) for tile in every]
    return {"key": tuned_configs.key(found, target), "candidates": [asdict(tile) for tile in every], "kernels": names}


def with_config(workload: Workload, tile: TileConfig) -> OfTorch:
    return OfTorch(lambda x, y: gpu_calls.with_config(x, y, workload.precision, tile))


def candidate(gpu: Gpu, workload: Row, tile: Row) -> Row:
    """Whether a candidate compiles, runs and is correct."""
    wanted, library = Workload(**workload), with_config(Workload(**workload), TileConfig(**tile))
    for values in ("integers", "normal"):
        operands = inputs.draw(wanted, values, gpu.device)
        correctness.assert_products(library, wanted, operands, call_of(library, wanted, operands)(), values)
    gpu.wait()
    return {}


def candidates_timed(gpu: Gpu, workload: Row, tiles: Sequence[Row]) -> Row:
    """Median seconds of device time: all interleaved, then the fastest and the first, the default, for longer."""
    wanted = Workload(**workload)
    operands = drawn(wanted, gpu.device)
    count = inputs.copies_past(gpu.cache_bytes(), wanted.held, gpu.free_bytes())
    sets = list(inputs.copies(operands, min(count, MOST_CALLS)))
    batches = {}
    for index, tile in enumerate(tiles):
        library = with_config(wanted, TileConfig(**tile))
        calls = [call_of(library, wanted, each) for each in sets]
        batches[index] = gpu.looped(calls)
    first = medians(batches, FIRST_SECONDS * len(tiles))
    finalists = dict.fromkeys([*sorted(first, key=lambda index: first[index])[:FINALISTS], 0])
    final = medians({index: batches[index] for index in finalists}, FINAL_SECONDS)
    return {"timed": [[index, seconds] for index, seconds in final.items()]}


def medians(batches: dict[int, timer.Batch], seconds: float) -> dict[int, float]:
    times = timer.time_interleaved({str(index): batch for index, batch in batches.items()}, seconds)
    return {int(index): timer.summary(rounds)["median"] for index, rounds in times.items()}


def compile_candidates(gpu: Gpu, workload: Row, tiles: Sequence[Row]) -> Row:
    wanted = Workload(**workload)
    return compile_all([[(wanted, TileConfig(**tile))] for tile in tiles], COMPILING)


def compile_report(gpu: Gpu, seconds: float) -> Row:
    """The kernels of the targets. Products of one shape share some: in two processes they would be compiled twice."""
    parts: dict[Any, list[tuple[Workload, TileConfig | None]]] = {}
    for workload in workloads.gpu_targets():
        if workload.mode == "":
            parts.setdefault(workload.shape, []).append((workload, None))
    return compile_all(list(parts.values()), 0.9 * seconds)


def compile_all(parts: Sequence[Part], seconds: float) -> Row:
    """By several processes at once, into the cache that Triton keeps; what fails here fails again where it counts."""
    end, count = perf_counter() + seconds, min(COMPILERS, os.cpu_count() or 1)
    pool = ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn"))
    done = 0
    try:
        for compiled in pool.map(compile_part, parts, timeout=seconds):
            done += compiled
    except Exception as error:  # one that ended its process, or never ends
        print(f"compiling: {type(error).__name__}: {error}", file=sys.stderr)
    processes = list((pool._processes or {}).values())
    pool.shutdown(wait=False, cancel_futures=True)
    for process in processes if perf_counter() > end or done < sum(map(len, parts)) else ():
        process.kill()
    return {"products": done, "of": sum(map(len, parts)), "processes": count}


def compile_part(part: Part) -> int:
    """Each product once; how many went through. A process whose context one of them breaks ends."""
    gpu, done = Gpu(), 0
    gpu.multiply_in_ieee()
    for workload, tile in part:
        try:
            if HELD * COMPILERS * workload.held < gpu.free_bytes():
                library = backends.own(OURS) if tile is None else with_config(workload, tile)
                call_of(library, workload, inputs.draw(workload, "normal", gpu.device))()
                gpu.wait()
                done += 1
        except Exception as error:
            print(f"{workload.name}: {type(error).__name__}: {error}", file=sys.stderr)
            if gpu.is_broken():
                os._exit(1)
    return done


TASKS: dict[str, Callable[..., Row]] = {
    "launch": launch_cost, "sanitized": sanitizer.check, "compile": compile_report, "problem": problem,
    "compile candidates": compile_candidates, "candidate": candidate, "candidates timed": candidates_timed,
}  # fmt: skip
