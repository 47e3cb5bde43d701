"""Train a small GPT, character by character, on the documentation that ships with Python, with torch switched over.

    python examples/train_char_gpt.py
    python examples/train_char_gpt.py --backend torch
    python examples/train_char_gpt.py --dtype bfloat16 --accumulate

Every product of it runs on these kernels, forward and backward: the linear layers by addmm, attention by bmm. The last
command trains twice, with products in float32 and in bfloat16: the weights stay float32, and the gradients of the
linear layers are added to in the product, unrounded, over the parts of a batch.
"""

from __future__ import annotations

import needs  # noqa: F401

# isort: split
import argparse
import contextlib
import math
from collections.abc import Sequence
from pydoc_data import topics

import torch
from torch import Tensor, nn

import matmul_grad
from training import SMOOTH, console, parser, save_curves, train

CONTEXT, WIDTH, HEADS, LAYERS = 64, 128, 4, 3
BATCH, RATE, WARM_UP = 24, 2e-3, 20
SAMPLE = 300  # characters written at the end
PARTS = 4  # of a batch, with --accumulate
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


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
    known = parser(__doc__ or "", steps=400, plot="train_char_gpt.png")
    known.add_argument("--dtype", choices=DTYPES, default="float32", help="of the products; default: float32")
    known.add_argument("--accumulate", action="store_true", help=f"add the gradients of {PARTS} parts of a batch")
    options = known.parse_args(arguments)
    text = "\n".join(topics.topics[name] for name in sorted(topics.topics))
    alphabet = sorted(set(text))
    code = {character: i for i, character in enumerate(alphabet)}
    data = torch.tensor([code[character] for character in text])
    curves = {}
    for dtype in dict.fromkeys(("float32", options.dtype)):
        model, losses = fit(data, len(alphabet), options, dtype)
        name = dtype if options.dtype != "float32" else f"mean of the last {SMOOTH}"
        curves[name] = losses
    with switched(options), torch.autocast("cpu", DTYPES[options.dtype], options.dtype != "float32"):
        written = model.eval().write(data[None, :1], SAMPLE)[0]
    console.print("".join(alphabet[i] for i in written.tolist()), style="dim", markup=False)
    if options.backend == "matmul_grad":
        console.print(f"calls on these kernels: {matmul_grad.info()['accelerated']}")
    if options.dtype != "float32":
        console.print(apart(*curves.values()))
    title = f"A small GPT on Python's documentation, {options.backend}"
    save_curves(curves, options.plot, title, "loss (cross entropy, nats)")
    return losses


def switched(options: argparse.Namespace) -> contextlib.AbstractContextManager[None]:
    return matmul_grad.enabled() if options.backend == "matmul_grad" else contextlib.nullcontext()


def fit(data: Tensor, characters: int, options: argparse.Namespace, dtype: str) -> tuple[GPT, list[float]]:
    """A model trained with products of a dtype, from the same weights and on the same batches for each; its losses.

    With ``accumulate`` a batch is cut, and the weight gradients of its parts are added up in the products.
    """
    torch.manual_seed(options.seed)
    model = GPT(characters)
    console.print(f"{len(data):,} characters, {sum(p.numel() for p in model.parameters()):,} parameters, {dtype}")
    if options.accumulate and options.backend == "matmul_grad":
        matmul_grad.convert(model, accumulate=True)
    optimizer = torch.optim.AdamW(model.parameters(), RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / WARM_UP))
    parts = PARTS if options.accumulate else 1

    def step() -> Tensor:
        starts = torch.randint(len(data) - CONTEXT, (BATCH, 1))
        window = data[starts + torch.arange(CONTEXT + 1)]
        optimizer.zero_grad()
        losses = []
        for part in window.chunk(parts):
            with torch.autocast("cpu", DTYPES[dtype], dtype != "float32"):
                scores = model(part[:, :-1])
            loss = nn.functional.cross_entropy(scores.flatten(0, 1).float(), part[:, 1:].flatten()) / parts
            loss.backward()
            losses.append(loss.detach())
        optimizer.step()
        schedule.step()
        return torch.stack(losses).sum()

    with switched(options):
        return model, train(step, options.steps)


def apart(first: Sequence[float], second: Sequence[float]) -> str:
    """How far two trainings are from each other at their ends."""
    ends = [sum(losses[-SMOOTH:]) / len(losses[-SMOOTH:]) for losses in (first, second)]
    return (
        f"loss at the end: {ends[0]:.4f} in float32, {ends[1]:.4f} in bfloat16, {abs(ends[1] / ends[0] - 1):.2%} apart"
    )


if __name__ == "__main__":
    main()
