"""`python -m bench training`: steps of an MLP with the activation in the product, and weight gradients added up.

The targets are those of issue 15.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch

from .. import machine
from ..cli_common import complain
from . import runner, timer, training_calls, weight_gradients, worker
from .training_calls import BACKENDS, DTYPES, FUSED, MLP, SMALL, SWIGLU, UNFUSED, Step
from .workloads import TORCH

KIND = "training"
HELP = "steps of an MLP with the activation in the product, and weight gradients added up in float32"
SECONDS, QUICK = 10.0, 0.01  # of each comparison
STEPS = (MLP, SWIGLU)
FUSED_TARGET = 0.95  # time over that of the unfused step


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["f32", "bf16"])
    parser.add_argument("--threads", type=int, default=machine.usable_cores(), help="default: all cores")
    parser.add_argument("--seconds", type=float, help=f"of each comparison; default: {SECONDS:g}")
    parser.add_argument("--quick", action="store_true", help="small layers, without memory: to see it run")


def run(command: argparse.Namespace) -> int:
    steps = [step._replace(rows=SMALL.rows, width=SMALL.width, hidden=SMALL.hidden) for step in STEPS]
    steps, seconds = (steps, QUICK) if command.quick else (list(STEPS), SECONDS)
    seconds = command.seconds or seconds
    taken = {} if command.quick else memory(steps, command.dtypes, command.threads)
    with timer.threads(command.threads):
        for line in step_lines(steps, command.dtypes, seconds, taken):
            print(line, flush=True)
        dtypes = tuple(dtype for dtype in command.dtypes if dtype in weight_gradients.DTYPES)
        if dtypes and hasattr(torch.Tensor, "grad_dtype"):
            print()
            weight_gradients.show(dtypes, seconds, command.quick)
    return 0


def memory(steps: list[Step], dtypes: list[str], threads: int) -> dict[tuple[Step, str], dict[str, int]]:
    """Bytes at the peak of each step; a process that has multiplied nothing forks a child for each of them."""
    found = {}
    with worker.Worker(training_calls.__name__, environment=runner.environment(threads)) as process:
        for step in steps:
            for dtype in dtypes:
                said = process.ask({"step": list(step), "dtype": dtype, "threads": threads}, runner.SILENCE)
                if "failed" in said:
                    complain(f"{KIND}: {said['failed']}")
                else:
                    found[step, dtype] = said["peak bytes"]
    return found


def step_lines(
    steps: list[Step], dtypes: list[str], seconds: float, taken: dict[tuple[Step, str], dict[str, int]]
) -> Iterator[str]:
    """Times in ms, those of the fused step over the others', and MiB at the peak."""
    yield f"{torch.get_num_threads()} threads; a step in ms, the fused one over the others, MiB at the peak"
    heads = (*BACKENDS, f"/{UNFUSED}", f"/{TORCH}", *(f"MiB {name}" for name in BACKENDS))
    yield f"{'':36}{'':5}" + "".join(f"{head:>13}" for head in heads)
    for step in steps:
        for dtype in dtypes:
            operands = training_calls.draw(step, DTYPES[dtype])
            calls = {name: training_calls.call_of(name, step, operands) for name in BACKENDS}
            times = timer.interleaved(calls, seconds)
            ratios = [timer.ratio(times[FUSED], times[other]) for other in (UNFUSED, TORCH)]
            cells = [f"{timer.quartiles(times[name]).median * 1e3:13.2f}" for name in BACKENDS]
            cells += [f"{ratio:13.3f}" for ratio in ratios]
            bytes_of = taken.get((step, dtype), {})
            cells += [f"{bytes_of[name] / 2**20:13.1f}" if name in bytes_of else f"{'–':>13}" for name in BACKENDS]
            missed = "" if ratios[0] <= FUSED_TARGET else f"  above {FUSED_TARGET:g}"
            yield f"{step!s:36}{dtype:5}{''.join(cells)}{missed}"
