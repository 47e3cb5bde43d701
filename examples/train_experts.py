"""Train a small mixture of experts on handwritten digits: each goes to the expert that a router chooses for it.

python examples/train_experts.py
python examples/train_experts.py --backend torch
"""

from __future__ import annotations

import needs  # noqa: F401

# isort: split
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

import matmul_grad
from training import console, digits, parser, save_plot, train

EXPERTS, BATCH, WIDTH, HIDDEN, RATE, BALANCE = 8, 256, 64, 96, 3e-3, 0.02


class Experts(nn.Module):
    """y = x + p · W₂(relu(W₁ x)) of the expert with the largest p, the router's probability."""

    def __init__(self, grouped_mm: Callable[..., Tensor]) -> None:
        super().__init__()
        self.grouped_mm = grouped_mm
        self.router = nn.Linear(WIDTH, EXPERTS)
        self.first = nn.Parameter(torch.randn(EXPERTS, WIDTH, HIDDEN) / WIDTH**0.5)
        self.second = nn.Parameter(torch.randn(EXPERTS, HIDDEN, WIDTH) / HIDDEN**0.5)
        self.uneven = torch.zeros(())  # the loss that keeps the groups alike, and how many rows each had
        self.counts = torch.zeros(EXPERTS)

    def forward(self, x: Tensor) -> Tensor:
        every = self.router(x).softmax(1)
        probability, chosen = every.max(1)
        order = chosen.argsort(stable=True)
        self.counts = chosen.bincount(minlength=EXPERTS)
        self.uneven = EXPERTS * (self.counts / len(x) * every.mean(0)).sum()
        ends = self.counts.cumsum(0).to(torch.int32)
        hidden = self.grouped_mm(x[order], self.first, offs=ends).relu()
        rows = self.grouped_mm(hidden, self.second, offs=ends) * probability[order, None]
        return x.index_add(0, order, rows)


def main(arguments: Sequence[str] | None = None) -> list[float]:
    """Train as the options say; the losses."""
    options = parser(__doc__ or "", steps=200, plot="train_experts.png").parse_args(arguments)
    torch.manual_seed(options.seed)
    images, labels, test_images, test_labels = digits(options.seed)
    ours = options.backend == "matmul_grad"
    experts = Experts(matmul_grad.grouped_mm if ours else nn.functional.grouped_mm)
    model = nn.Sequential(nn.Linear(64, WIDTH), experts, nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 10))
    optimizer = torch.optim.AdamW(model.parameters(), RATE)

    def step() -> Tensor:
        chosen = torch.randint(len(images), (BATCH,))
        loss = nn.functional.cross_entropy(model(images[chosen]), labels[chosen])
        optimizer.zero_grad()
        (loss + BALANCE * experts.uneven).backward()
        optimizer.step()
        return loss

    losses = train(step, options.steps)
    model.eval()
    with torch.no_grad():
        right = (model(test_images).argmax(1) == test_labels).double().mean().item()
    console.print(f"rows of the experts: {', '.join(map(str, experts.counts.tolist()))}")
    console.print(f"{right:.1%} of {len(test_labels)} unseen digits are right")
    save_plot(losses, options.plot, f"Mixture of {EXPERTS} experts, {options.backend}: {right:.1%} right")
    return losses


if __name__ == "__main__":
    main()
