"""Train a classifier of handwritten digits; its linear layers are swapped for those of this package.

python examples/train_digits.py
python examples/train_digits.py --backend torch
"""

from __future__ import annotations

import needs  # noqa: F401

# isort: split
from collections.abc import Sequence

import torch
from torch import Tensor, nn

import matmul_grad
from training import console, digits, parser, save_plot, train

BATCH, HIDDEN, RATE = 128, 256, 2e-3


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(64, HIDDEN), nn.ReLU(), nn.Dropout(0.2), nn.Linear(HIDDEN, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 10)
    )


def main(arguments: Sequence[str] | None = None) -> list[float]:
    """Train as the options say; the losses."""
    options = parser(__doc__ or "", steps=400, plot="train_digits.png").parse_args(arguments)
    torch.manual_seed(options.seed)
    images, labels, test_images, test_labels = digits(options.seed)
    model = network()
    if options.backend == "matmul_grad":
        matmul_grad.convert(model)
        console.print(f"on these kernels: {', '.join(f'layer {name}' for name in matmul_grad.converted(model))}")
    optimizer = torch.optim.AdamW(model.parameters(), RATE)

    def step() -> Tensor:
        chosen = torch.randint(len(images), (BATCH,))
        loss = nn.functional.cross_entropy(model(images[chosen]), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss

    losses = train(step, options.steps)
    model.eval()
    with torch.no_grad():
        right = (model(test_images).argmax(1) == test_labels).double().mean().item()
    console.print(f"{right:.1%} of {len(test_labels)} unseen digits are right")
    save_plot(losses, options.plot, f"Handwritten digits, {options.backend}: {right:.1%} of unseen ones right")
    return losses


if __name__ == "__main__":
    main()
