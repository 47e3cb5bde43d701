"""`matmul-grad check`: this package against torch, from one worked example to a network, on this machine."""

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter

from . import (
    check_convolution,
    check_products,
    check_timing,
    check_training,
    check_weight_gradients,
    machine,
    strict_mode,
    warmup,
)
from .bench import timer
from .console import Console, heading, track


@dataclass(frozen=True)
class Options:
    """What to check, where, on which values."""

    train: bool = True
    time: bool = True
    device: str = "cpu"
    seed: int = 0
    threads: int | None = None


def run(options: Options, console: Console) -> int:
    """0: all agree; 1: something does not. Under ``strict()``, so that no product is torch's unnoticed."""
    start = perf_counter()
    found: list[str] = []
    device, seed = options.device, options.seed
    with strict_mode.strict(), timer.threads(options.threads):
        try:
            what_it_runs_on(console)
        except warmup.NotCompiled as reason:
            return verdict(console, [str(reason)], perf_counter() - start)
        heading(console, "The worked example: A 2×4, B 4×3, L = mean(A·B)")
        found += check_products.example(console, device)
        heading(console, "Sizes, layouts and dtypes")
        found += check_products.table_of_products(console, device, seed)
        heading(console, "Convolutions: X 3×3, W 2×2, L = Σ dY·Y; then layers")
        found += check_convolution.run(console, device)
        heading(console, "Weight gradients of a bfloat16 layer, kept in float32")
        found += check_weight_gradients.run(console, device, seed)
        if options.train:
            heading(console, "A classifier of handwritten digits, trained twice")
            found += check_training.run(console, device, seed)
    if options.time:
        count = options.threads or 1
        heading(console, f"Time against torch.mm, {count} thread{'s' * (count > 1)}")
        with strict_mode.strict(), timer.threads(count):
            found += check_timing.run(console, device, seed)
    return verdict(console, found, perf_counter() - start)


def what_it_runs_on(console: Console) -> None:
    for _ in track(console, "compiling or loading kernels", warmup.compiled(), len(warmup.steps())):
        pass
    heading(console, "This machine")
    console.print(*machine.lines(machine.describe()), sep="\n", soft_wrap=True)


def verdict(console: Console, found: list[str], seconds: float) -> int:
    """The last line: all agree, or what does not."""
    if not found:
        console.print(f"\nall agree, in {seconds:.1f} s", style="bold green")
        return 0
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    console.print(f"\nDISAGREES: {found[0]}{more}", style="bold red", soft_wrap=True)
    return 1
