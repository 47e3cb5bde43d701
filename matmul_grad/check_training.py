"""The part of `check` that trains: one network, seed and order, with torch's linear and with ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from . import api
from .console import Console, sparkline, table, track

HIDDEN, BATCH, EPOCHS, RATE, MOMENTUM = 64, 64, 4, 0.1, 0.9
TEST_SHARE = 0.2
LOSS_BUDGET = 1e-3  # between the two losses of any step; roundings are 1e-7, and training amplifies them
ACCURACY_BUDGET = 0.01
ACCURACY = 0.9  # of ten classes, on digits that training has not seen

Linear = Callable[[Tensor, Tensor, Tensor], Tensor]


class Digits(NamedTuple):
    """8×8 images as rows of 64 values in [0, 1], and the digit that each shows."""

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor


class Curve(NamedTuple):
    """One training: the loss of each step, the accuracy after each epoch."""

    losses: list[float]
    accuracies: list[float]


def torch_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.nn.functional.linear(x, weight, bias)


def our_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return api.mm(x, weight.t()) + bias


def run(console: Console, device: str, seed: int) -> list[str]:
    """Both curves, side by side, and what disagrees."""
    data = digits(device, seed)
    linears = {"torch": torch_linear, "matmul_grad": our_linear}
    curves: dict[str, Curve] = {}
    for name, linear in track(console, "training", linears.items(), len(linears)):
        try:
            curves[name] = train(linear, data, seed)
        except RuntimeError as error:
            return [f"training with {name}: {str(error).splitlines()[0]}"]
    theirs, ours = curves.values()
    show(console, theirs, ours, data)
    return compare(theirs, ours)


def digits(device: str, seed: int) -> Digits:
    """The digits that scikit-learn ships, shuffled and split."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.from_numpy(bunch.data).to(torch.float32) / 16
    labels = torch.from_numpy(bunch.target).to(torch.int64)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    images, labels = images[order].to(device), labels[order].to(device)
    kept = round(len(images) * (1 - TEST_SHARE))
    return Digits(images[:kept], labels[:kept], images[kept:], labels[kept:])


def train(linear: Linear, data: Digits, seed: int) -> Curve:
    """Two layers, plain SGD with momentum. All that is random comes from ``seed``."""
    generator = torch.Generator().manual_seed(seed)
    parameters = initial(data.images.shape[1], generator, data.images.device)
    optimizer = torch.optim.SGD(parameters, lr=RATE, momentum=MOMENTUM)
    losses, accuracies = [], []
    for _ in range(EPOCHS):
        order = torch.randperm(len(data.images), generator=generator).to(data.images.device)
        for batch in order.split(BATCH):
            scores = classify(linear, parameters, data.images[batch])
            loss = torch.nn.functional.cross_entropy(scores, data.labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        with torch.no_grad():
            guesses = classify(linear, parameters, data.test_images).argmax(1)
        accuracies.append((guesses == data.test_labels).double().mean().item())
    return Curve(losses, accuracies)


def initial(inputs: int, generator: torch.Generator, device: torch.device) -> list[Tensor]:
    """Weights (out, in) and biases of both layers, scaled to keep the variance."""
    parameters = []
    for rows, columns in ((HIDDEN, inputs), (10, HIDDEN)):
        parameters.append(torch.randn(rows, columns, generator=generator) * (2 / columns) ** 0.5)
        parameters.append(torch.zeros(rows))
    return [parameter.to(device).requires_grad_() for parameter in parameters]


def classify(linear: Linear, parameters: list[Tensor], images: Tensor) -> Tensor:
    weight, bias, weight2, bias2 = parameters
    return linear(torch.relu(linear(images, weight, bias)), weight2, bias2)


def show(console: Console, theirs: Curve, ours: Curve, data: Digits) -> None:
    steps = len(ours.losses) // EPOCHS
    rows = []
    for epoch in range(EPOCHS):
        part = slice(epoch * steps, (epoch + 1) * steps)
        losses = [sum(curve.losses[part]) / steps for curve in (theirs, ours)]
        apart = gap(theirs.losses[part], ours.losses[part])
        accuracies = [f"{curve.accuracies[epoch]:.2%}" for curve in (theirs, ours)]
        rows.append([f"{epoch + 1}", *(f"{loss:.5f}" for loss in losses), f"{apart:.1e}", *accuracies])
    heads = ["epoch", "loss: torch", "ours", "apart by", "accuracy: torch", "ours"]
    table(console, heads, rows)
    console.print(f"loss, torch        {sparkline(theirs.losses)}\nloss, matmul_grad  {sparkline(ours.losses)}")
    console.print(
        f"{len(data.images)} digits, {len(ours.losses)} steps; {len(data.test_images)} unseen digits for the "
        f"accuracy.\nAllowed: losses {LOSS_BUDGET:g} apart in any step, accuracies {ACCURACY_BUDGET:.0%}; "
        f"wanted: over {ACCURACY:.0%} right."
    )


def gap(x: list[float], y: list[float]) -> float:
    """The largest difference; NaN where either has one."""
    return float((torch.tensor(x, dtype=torch.float64) - torch.tensor(y, dtype=torch.float64)).abs().max())


def compare(theirs: Curve, ours: Curve) -> list[str]:
    """What disagrees; a NaN does."""
    found = []
    losses, accuracies = gap(theirs.losses, ours.losses), gap(theirs.accuracies, ours.accuracies)
    if not losses <= LOSS_BUDGET:
        found.append(f"training: losses are {losses:.1e} apart, allowed {LOSS_BUDGET:g}")
    if not accuracies <= ACCURACY_BUDGET:
        found.append(f"training: accuracies are {accuracies:.2%} apart, allowed {ACCURACY_BUDGET:.0%}")
    if not ours.accuracies[-1] > ACCURACY:
        found.append(f"training: accuracy {ours.accuracies[-1]:.2%}, wanted over {ACCURACY:.0%}")
    return found
