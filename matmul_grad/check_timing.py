"""The part of `check` that takes times: forward, dgrad and wgrad beside torch.mm, right before fast."""

from __future__ import annotations

import functools
import itertools

import torch

from . import testing
from .bench import backends, correctness, inputs, timer
from .bench.workloads import OURS, TORCH, Workload
from .check_products import disagreement
from .console import Console, table, track

SIZES = {"cpu": (256, 512, 1024), "cuda": (1024, 2048, 4096)}
DTYPES = {"cpu": ("f32", "f64"), "cuda": ("bf16", "f32")}
SECONDS = 0.1  # a comparison
COLUMNS = ("product", "torch ms", "quartiles", "ours ms", "quartiles", "GFLOP/s", "ratio")


def run(console: Console, device: str, seed: int) -> list[str]:
    """The table of times. A result that is wrong is not timed."""
    share = timer.share_of_core()
    found: list[str] = []
    rows: list[list[str]] = []
    kinds = list(itertools.product(DTYPES[device], SIZES[device]))
    for dtype, n in track(console, "timing", kinds, len(kinds)):
        ours = backends.OfTorch(backends.IMPLEMENTATIONS[OURS])
        step = Workload("step", dtype, "NN", n, n, n, device=device)
        right = functools.partial(correctness.assert_correct, ours, step, seed=seed, device=device)
        found_here = disagreement(f"timing {dtype} {n}", right)
        found += found_here
        if not found_here:
            rows += time_products(n, dtype, device, seed)
    table(console, COLUMNS, rows)
    console.print(
        f"{timer.PROTOCOL};\nratio = torch's time / ours, the median over the rounds: above 1, this package is faster"
    )
    if torch.get_num_threads() == 1 and device == "cpu" and share() < timer.AT_REST:
        console.print(f"other work ran here too: this had {share():.0%} of a core, so these times are rough")
    return found


def time_products(n: int, dtype: str, device: str, seed: int) -> list[list[str]]:
    """A row for each product at one size."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    operands = inputs.draw(Workload("step", dtype, "NN", n, n, n), device=device, seed=seed)
    rows = []
    for product in testing.PRODUCTS:
        workload = Workload(product, dtype, "NN", n, n, n, device=device)
        work = {
            name: backends.call_of(backends.OfTorch(mm), workload, operands)
            for name, mm in backends.IMPLEMENTATIONS.items()
        }
        times = timer.interleaved(work, SECONDS, wait)
        theirs, ours = times[TORCH], times[OURS]
        rate = workload.flops / timer.quartiles(ours).median / 1e9
        figures = f"{rate:.0f}", f"{timer.ratio(theirs, ours):.2f}"
        rows.append([f"{product}-{dtype}-{n}", *cells(theirs), *cells(ours), *figures])
    return rows


def cells(times: list[float]) -> tuple[str, str]:
    low, median, high = (1e3 * seconds for seconds in timer.quartiles(times))
    return f"{median:.3g}", f"{low:.3g}–{high:.3g}"
