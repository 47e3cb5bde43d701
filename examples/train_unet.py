"""Train a small U-Net to remove noise from a photograph, twice: on torch's convolutions and on those of this package.

python examples/train_unet.py

Both trainings begin with the same weights and see the same crops.
"""

from __future__ import annotations

import needs  # noqa: F401

# isort: split
from collections.abc import Sequence
from itertools import pairwise
from time import perf_counter

import torch
from torch import Tensor, nn

import matmul_grad
from training import BACKENDS, console, parser, save_curves, train

WIDTHS = (24, 48, 96)  # channels at full, half and quarter size
GROUPS, BATCH, CROP, NOISE, RATE = 4, 8, 48, 0.1, 5e-3


def block(channels: int, width: int, stride: int = 1) -> nn.Sequential:
    """Two 3 × 3 convolutions, the first of which may halve the size."""
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, stride, padding=1), nn.GroupNorm(GROUPS, width), nn.SiLU(),
        nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(GROUPS, width), nn.SiLU(),
    )  # fmt: skip


class UNet(nn.Module):
    """The noise in an image. On the way up, each size meets again what it was on the way down.

    Transposed convolutions of 4 × 4 with stride 2: a kernel that is a multiple of the stride reaches every pixel
    equally often (docs/transposed-convolution.md).
    """

    def __init__(self, channels: int = 3, widths: Sequence[int] = WIDTHS) -> None:
        super().__init__()
        pairs = list(pairwise(widths))
        self.first = block(channels, widths[0])
        self.down = nn.ModuleList(block(narrow, wide, 2) for narrow, wide in pairs)
        self.up = nn.ModuleList(nn.ConvTranspose2d(wide, narrow, 4, 2, 1) for narrow, wide in reversed(pairs))
        self.join = nn.ModuleList(block(2 * narrow, narrow) for narrow, _ in reversed(pairs))
        self.last = nn.Conv2d(widths[0], channels, 1)

    def forward(self, image: Tensor) -> Tensor:
        sizes = [self.first(image)]
        for down in self.down:
            sizes.append(down(sizes[-1]))
        x = sizes.pop()
        for up, join in zip(self.up, self.join, strict=True):
            x = join(torch.cat([up(x), sizes.pop()], 1))
        return self.last(x)


def photographs() -> list[Tensor]:
    """scikit-learn's two photographs, a temple and a flower: (3, 427, 640) in [0, 1]."""
    from sklearn.datasets import load_sample_images

    return [torch.tensor(image).permute(2, 0, 1) / 255 for image in load_sample_images().images]


def crops(image: Tensor, generator: torch.Generator) -> Tensor:
    """A batch of squares of an image, from anywhere in it."""
    places = [torch.randint(size - CROP + 1, (BATCH,), generator=generator).tolist() for size in image.shape[1:]]
    return torch.stack([image[:, y : y + CROP, x : x + CROP] for y, x in zip(*places, strict=True)])


def fit(model: UNet, image: Tensor, steps: int, seed: int) -> list[float]:
    """The loss of each step: the mean square of what is left of the noise, over that of the noise."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), RATE)

    def step() -> Tensor:
        clean = crops(image, generator)
        noise = torch.randn(clean.shape, generator=generator)
        loss = nn.functional.mse_loss(model(clean + NOISE * noise), noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss

    return train(step, steps)


@torch.no_grad()
def decibels(model: UNet, image: Tensor, seed: int) -> tuple[float, float]:
    """How far the noisy and the cleaned image are from the true one: peak signal-to-noise ratio."""
    height, width = (size // 4 * 4 for size in image.shape[1:])  # halved twice
    clean = image[None, :, :height, :width]
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed))
    noisy = clean + NOISE * noise
    cleaned = noisy - NOISE * model(noisy)
    before, after = (-10 * (each - clean).square().mean().log10().item() for each in (noisy, cleaned))
    return before, after


def main(arguments: Sequence[str] | None = None) -> dict[str, list[float]]:
    """Train as the options say; the losses by backend."""
    options = parser(__doc__ or "", steps=200, plot="train_unet.png", backend=False).parse_args(arguments)
    temple, flower = photographs()
    curves: dict[str, list[float]] = {}
    for backend in BACKENDS:
        torch.manual_seed(options.seed)
        model = UNet()
        if backend == "matmul_grad":
            matmul_grad.convert(model, kinds=(nn.Conv2d, nn.ConvTranspose2d))
            console.print(f"{len(matmul_grad.converted(model))} convolutions on these kernels")
        start = perf_counter()
        curves[backend] = fit(model, temple, options.steps, options.seed)
        seconds = perf_counter() - start
        before, after = decibels(model, flower, options.seed)
        console.print(
            f"{backend}: {seconds:.1f} s; the other photograph: {before:.1f} dB noisy, {after:.1f} dB cleaned"
        )
    apart = max(abs(one - other) for one, other in zip(*curves.values(), strict=True))
    console.print(f"losses are {apart:.1e} apart at most")
    save_curves(curves, options.plot, "A U-Net removes noise, trained twice", "what is left of the noise")
    return curves


if __name__ == "__main__":
    main()
