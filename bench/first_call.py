"""What the first product of a process costs over `import torch`, with an empty cache of kernels and with a full one.

Each figure is the median of fresh processes. CPU time is that of all processes that the product started, so it does not
depend on what else runs; where objects of a wheel are used, nothing is compiled from an empty cache either.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import machine, testing
from ..cli_common import UsageError
from .options import some_of

KIND = "first-call"
HELP = "the first product of a process, with an empty cache of kernels and with a full one"
RUNS = 3
PROGRAM = """
import json, sys, time
start = time.perf_counter()
import torch
between, cpu = time.perf_counter(), time.process_time()
import matmul_grad
with matmul_grad.strict():
    for dtype in sys.argv[1:]:
        a = torch.ones(64, 64, dtype=getattr(torch, dtype))
        matmul_grad.mm(a, a)
end = time.perf_counter()
print(json.dumps({"torch": between - start, "first": end - between, "torch cpu": cpu, "numba": "numba" in sys.modules}))
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    option = parser.add_argument
    option("--dtype", type=some_of(tuple(testing.DTYPES)), metavar="X,X", help="default: f32 alone, then all")
    option("--runs", type=int, default=RUNS, help=f"processes a figure; default: {RUNS}")
    option("--warm", dest="cold", action="store_false", help="leave out the empty cache, which is filled all the same")


def run(command: argparse.Namespace) -> int:
    if command.runs < 1:
        raise UsageError("--runs: at least 1")
    known = {name: str(testing.DTYPES[name]).removeprefix("torch.") for name in testing.DTYPES}
    every = [name for name in known if known[name] in machine.cpu_dtypes()]
    print(f"{machine.processor()}, {machine.usable_cores()} cores; medians of {command.runs} processes, seconds")
    print(f"{'':32}{'import torch':>14}{'product':>10}{'CPU time':>10}{'compiled':>10}{'Numba':>8}")
    for names in [list(command.dtype)] if command.dtype else [["f32"], every]:
        for cache, runs in measured([known[name] for name in names], command.runs).items():
            if cache == "full cache" or command.cold:
                print(line(f"{', '.join(names)}: {cache}", runs), flush=True)
    return 0


def measured(dtypes: Sequence[str], count: int) -> dict[str, list[dict[str, Any]]]:
    """By the state of the cache, what ``count`` processes of each reported."""
    found: dict[str, list[dict[str, Any]]] = {"empty cache": [], "full cache": []}
    for _ in range(count):
        with tempfile.TemporaryDirectory() as folder:
            found["empty cache"].append(process(dtypes, Path(folder)))
            found["full cache"].append(process(dtypes, Path(folder)))
    return found


def process(dtypes: Sequence[str], cache: Path) -> dict[str, Any]:
    """A process that multiplies once in each dtype."""
    before = len(list(cache.glob("*.o")))
    environment = os.environ | {
        "MATMUL_GRAD_CACHE": str(cache),
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    start = spent()
    done = subprocess.run([sys.executable, "-c", PROGRAM, *dtypes], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise UsageError(f"the product failed: {(done.stderr.strip() or 'no message').splitlines()[-1]}")
    result: dict[str, Any] = json.loads(done.stdout)
    compiled = len(list(cache.glob("*.o"))) - before
    return result | {"cpu": spent() - start - result["torch cpu"], "compiled": compiled}


def spent() -> float:
    """CPU time of all processes that this one has started and that have ended."""
    times = os.times()
    return times.children_user + times.children_system


def line(name: str, runs: Sequence[dict[str, Any]]) -> str:
    torch, first, cpu = (statistics.median(run[key] for run in runs) for key in ("torch", "first", "cpu"))
    compiled = max(run["compiled"] for run in runs)
    numba = "yes" if any(run["numba"] for run in runs) else "no"
    return f"{name:32}{torch:14.2f}{first:10.2f}{cpu:10.2f}{compiled:10}{numba:>8}"
