"""Train a small GPT, character by character, on the documentation that ships with Python, with torch switched over.

    python examples/train_char_gpt.py
    python examples/train_char_gpt.py --backend torch

Every product of it runs on these kernels, forward and backward: the linear layers by addmm, attention by bmm.
"""

from __future__ import annotations

import needs  # noqa: F401

# isort: split
import math
from collections.abc import Sequence
from contextlib import nullcontext
from pydoc_data import topics

import torch
from torch import Tensor, nn

import matmul_grad
from training import console, parser, save_plot, train

CONTEXT, WIDTH, HEADS, LAYERS = 64, 128, 4, 3
BATCH, RATE, WARM_UP = 24, 2e-3, 20
SAMPLE = 300  # characters written at the end


class Block(nn.Module):
    """Causal self-attention, then an MLP, each on a normalised input and added to it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def attention(self, x: Tensor) -> Tensor:
        rows, length, _ = x.shape
        q, k, v = self.qkv(x).view(rows, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        later = torch.ones(length, length, dtype=torch.bool).triu(1)
        weights = scores.masked_fill(later, -math.inf).softmax(-1)
        mixed: Tensor = self.out((weights @ v).transpose(1, 2).reshape(rows, length, WIDTH))
        return mixed

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm(x))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    def __init__(self, characters: int) -> None:
        super().__init__()
        self.characters, self.places = nn.Embedding(characters, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.head = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, characters))

    def forward(self, text: Tensor) -> Tensor:
        x = self.characters(text) + self.places(torch.arange(text.shape[1]))
        scores: Tensor = self.head(self.blocks(x))
        return scores

    @torch.no_grad()
    def write(self, text: Tensor, count: int) -> Tensor:
        """``text`` and as many more characters, each drawn by its probability."""
        for _ in range(count):
            chances = self(text[:, -CONTEXT:])[:, -1].softmax(-1)
            text = torch.cat([text, torch.multinomial(chances, 1)], 1)
        return text


def main(arguments: Sequence[str] | None = None) -> list[float]:
    """Train as the options say; the losses."""
    options = parser(__doc__ or "", steps=400, plot="train_char_gpt.png").parse_args(arguments)
    torch.manual_seed(options.seed)
    text = "\n".join(topics.topics[name] for name in sorted(topics.topics))
    alphabet = sorted(set(text))
    code = {character: i for i, character in enumerate(alphabet)}
    data = torch.tensor([code[character] for character in text])
    model = GPT(len(alphabet))
    console.print(f"{len(text):,} characters, {sum(p.numel() for p in model.parameters()):,} parameters")
    optimizer = torch.optim.AdamW(model.parameters(), RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / WARM_UP))

    def step() -> Tensor:
        starts = torch.randint(len(data) - CONTEXT, (BATCH, 1))
        window = data[starts + torch.arange(CONTEXT + 1)]
        scores = model(window[:, :-1])
        loss = nn.functional.cross_entropy(scores.flatten(0, 1), window[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        return loss

    with matmul_grad.enabled() if options.backend == "matmul_grad" else nullcontext():
        losses = train(step, options.steps)
        written = model.eval().write(data[None, :1], SAMPLE)[0]
    console.print("".join(alphabet[i] for i in written.tolist()), style="dim", markup=False)
    if options.backend == "matmul_grad":
        console.print(f"calls on these kernels: {matmul_grad.info()['accelerated']}")
    save_plot(losses, options.plot, f"A small GPT on Python's documentation, {options.backend}")
    return losses


if __name__ == "__main__":
    main()
