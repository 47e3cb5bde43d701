"""What the examples share: their options, the progress bar, the plot of the loss, and scikit-learn's digits."""

from __future__ import annotations

import needs  # noqa: F401

# isort: split
import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

BACKENDS = ("torch", "matmul_grad")
SMOOTH = 20  # steps in a point of the smoothed loss

console = Console(highlight=False)


def parser(description: str, steps: int, plot: str | None = None, backend: bool = True) -> argparse.ArgumentParser:
    """The options of every example; ``plot`` is the default file of its picture; without ``backend`` both train."""
    options = argparse.ArgumentParser(description=description.splitlines()[0])
    if backend:
        options.add_argument("--backend", choices=BACKENDS, default="matmul_grad", help="whose products; default: ours")
    options.add_argument("--steps", type=positive, default=steps, help=f"default: {steps}")
    options.add_argument("--seed", type=int, default=0, help="of the weights and the batches; default: 0")
    if plot is not None:
        options.add_argument("--plot", type=Path, default=Path(plot), help=f"where to save the loss; default: {plot}")
    return options


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return int(text)


def train(step: Callable[[], Tensor], steps: int) -> list[float]:
    """The loss of each step, while a bar shows how far it is."""
    losses: list[float] = []
    columns = BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]:.4f}"), TimeElapsedColumn()
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("training", total=steps, loss=float("nan"))
        for _ in range(steps):
            losses.append(step().item())
            progress.update(task, advance=1, loss=losses[-1])
    return losses


def save_plot(losses: Sequence[float], path: Path, title: str) -> None:
    """The loss over the steps: each, and the mean of the last SMOOTH."""
    save_curves({f"mean of the last {SMOOTH}": losses}, path, title, "loss (cross entropy, nats)")


def save_curves(curves: Mapping[str, Sequence[float]], path: Path, title: str, label: str) -> None:
    """Losses over the steps by name: the mean of the last SMOOTH, dashed but for the first, and pale behind it each."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for number, (name, losses) in enumerate(curves.items()):
        steps = range(1, len(losses) + 1)
        means = [sum(losses[max(0, i - SMOOTH) : i]) / min(i, SMOOTH) for i in steps]
        color, style = f"C{number}", "--" if number else "-"
        axes.plot(steps, losses, color=color, alpha=0.35, linewidth=1, label="each step" if len(curves) == 1 else None)
        axes.plot(steps, means, style, color=color, linewidth=2, label=name)
    axes.set(title=title, xlabel="step", ylabel=label)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    console.print(f"plot: {path}")


def digits(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """scikit-learn's 1797 digits of 8 × 8 in [0, 1] and their labels: 80 % to train on, and the others."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    order = torch.randperm(len(bunch.target), generator=torch.Generator().manual_seed(seed))
    images = torch.tensor(bunch.data, dtype=torch.float32)[order] / 16
    labels = torch.tensor(bunch.target)[order]
    kept = len(order) * 4 // 5
    return images[:kept], labels[:kept], images[kept:], labels[kept:]
