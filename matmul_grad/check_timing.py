"""The part of `check` that takes times: forward, dgrad and wgrad beside torch.mm, right before fast."""

from __future__ import annotations

import functools
import itertools

import torch

from . import testing
from .bench import baseline, correctness, timer
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
        ours, kind = baseline.IMPLEMENTATIONS[baseline.OURS], testing.DTYPES[dtype]
        right = functools.partial(correctness.assert_correct, ours, n, n, n, kind, seed=seed, device=device)
        found_here = disagreement(f"timing {dtype} {n}", right)
        found += found_here
        if not found_here:
            rows += time_products(n, dtype, device, seed)
    table(console, COLUMNS, rows)
    console.print(f"{timer.PROTOCOL};\nratio = torch's median / ours: above 1, this package is faster")
    if torch.get_num_threads() == 1 and device == "cpu" and share() < timer.AT_REST:
        console.print(f"other work ran here too: this had {share():.0%} of a core, so these times are rough")
    return found


def time_products(n: int, dtype: str, device: str, seed: int) -> list[list[str]]:
    """A row for each product at one size."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    operands = baseline.draw(n, n, n, testing.DTYPES[dtype], seed=seed, device=device)
    rows = []
    for product in testing.PRODUCTS:
        work = {name: baseline.work(mm, product, operands) for name, mm in baseline.IMPLEMENTATIONS.items()}
        times = timer.interleaved(work, SECONDS, wait)
        theirs, ours = times[baseline.TORCH], times[baseline.OURS]
        rate = baseline.flops(n, n, n, product) / timer.quartiles(ours).median / 1e9
        figures = f"{rate:.0f}", f"{timer.ratio(theirs, ours):.2f}"
        rows.append([f"{product}-{dtype}-{n}", *cells(theirs), *cells(ours), *figures])
    return rows


def cells(times: list[float]) -> tuple[str, str]:
    low, median, high = (1e3 * seconds for seconds in timer.quartiles(times))
    return f"{median:.3g}", f"{low:.3g}–{high:.3g}"
