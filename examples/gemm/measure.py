"""The table of docs/microkernel.md: GFLOP/s of each step, on one thread of this machine.

python examples/gemm/measure.py            prints it
python examples/gemm/measure.py --write    puts it into the page, with date and machine
"""

from __future__ import annotations

import argparse
import datetime
import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import step1_three_loops
import step2_loop_order
import step3_rows
import step4_blocks
import step5_packing
import step6_microkernel
import torch

import matmul_grad
from matmul_grad import machine, markdown
from matmul_grad.bench import timer

PAGE = Path(__file__).parents[2] / "docs" / "microkernel.md"
NAME = "steps"  # of the part of the page
BEGIN, END = markdown.markers(NAME)
STEPS = {
    "1 three loops": step1_three_loops,
    "2 loop order": step2_loop_order,
    "3 four rows": step3_rows,
    "4 blocks": step4_blocks,
    "5 packing": step5_packing,
    "6 microkernel": step6_microkernel,
}
SIZES = (256, 512, 1024)


def functions() -> dict[str, Callable[[torch.Tensor, torch.Tensor], object]]:
    """Name → function of two tensors: the six steps, this package and torch."""

    def of_tensors(gemm: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Callable[..., object]:
        return lambda a, b: gemm(a.numpy(), b.numpy())

    steps = {title: of_tensors(step.gemm) for title, step in STEPS.items()}
    return steps | {"`matmul_grad.mm`": matmul_grad.mm, "`torch.mm`": torch.mm}


def rates(n: int, seconds: float) -> dict[str, float]:
    """Median GFLOP/s of a product of n × n matrices, by name, from interleaved rounds."""
    generator = torch.Generator().manual_seed(n)
    a, b = torch.randn(n, n, generator=generator), torch.randn(n, n, generator=generator)
    batches = {name: timer.batch_of(functools.partial(gemm, a, b)) for name, gemm in functions().items()}
    times = timer.time_interleaved(batches, seconds)
    return {name: 2 * n**3 / timer.quartiles(found).median / 1e9 for name, found in times.items()}


def table(sizes: Sequence[int], seconds: float) -> str:
    """Markdown, with what it was measured on."""
    with timer.threads(1):
        columns = [rates(n, seconds) for n in sizes]
    facts = machine.describe()
    rows = [[name, *(f"{column[name]:.1f}" for column in columns)] for name in columns[0]]
    lines = markdown.table(["GFLOP/s, float32", *(f"n = {n}" for n in sizes)], rows)
    when = datetime.date.today().isoformat()
    return (
        f"Measured {when} on {facts['CPU']} ({facts['instruction set'].split()[0]}), one thread;\n"
        f"{facts['versions']}.\nInterleaved rounds, medians.\n\n{lines}"
    )


def with_table(page: str, text: str) -> str:
    """``page`` with ``text`` between the markers."""
    return markdown.between(page, NAME, text)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Measure the six steps of docs/microkernel.md.")
    parser.add_argument("--write", action="store_true", help="put the table into the page")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, metavar="N", help="of the square matrices")
    parser.add_argument("--seconds", type=float, default=20, help="a size; default: 20")
    options = parser.parse_args(arguments)
    with timer.on_one_core():
        text = table(options.sizes, options.seconds)
    print(text)
    if options.write:
        PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8"), text), encoding="utf-8")


if __name__ == "__main__":
    main()
