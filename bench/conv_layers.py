"""The convolutions that `bench conv` measures, with the model that each comes from; and their targets. Data alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Sizes = tuple[int, ...]

# What a layer is, as far as targets differ.
ONE, PATCHES, THREE, OTHER = "1×1", "patches", "3×3", "other"  # two dimensions; and one, which is "other"
TRANSPOSED, VOLUME = "transposed", "conv3d"


@dataclass(frozen=True)
class Layer:
    """A convolution: channels in and out, the size of its input, and its window in each dimension."""

    model: str
    ci: int
    co: int
    size: Sizes
    kernel: Sizes
    stride: int = 1
    padding: int = 0
    transposed: bool = False

    @property
    def kind(self) -> str:
        """Its name among the targets.

        >>> Layer("ViT", 3, 768, (224, 224), (16, 16), 16).kind
        'patches'
        """
        if self.transposed:
            return TRANSPOSED
        if len(self.size) == 3:
            return VOLUME
        if self.kernel == (1,) * len(self.kernel):
            return ONE
        if self.kernel == (self.stride,) * len(self.kernel) and not self.padding:
            return PATCHES
        return THREE if self.kernel == (3, 3) else OTHER

    @property
    def name(self) -> str:
        window = "×".join(map(str, self.kernel)) + (f"/{self.stride}" if self.stride > 1 else "")
        kind = "transposed " if self.transposed else ""
        return f"{self.model} {kind}{self.ci}→{self.co} {window} at {'×'.join(map(str, self.size))}"

    @property
    def output(self) -> Sizes:
        """The size of the result.

        >>> Layer("VGG-16", 3, 64, (224, 224), (3, 3), padding=1).output
        (224, 224)
        """
        pairs = zip(self.size, self.kernel, strict=True)
        if self.transposed:
            return tuple((n - 1) * self.stride - 2 * self.padding + k for n, k in pairs)
        return tuple((n + 2 * self.padding - k) // self.stride + 1 for n, k in pairs)

    @property
    def weight(self) -> Sizes:
        return (self.ci, self.co, *self.kernel) if self.transposed else (self.co, self.ci, *self.kernel)

    @property
    def flops(self) -> int:
        """Of one sample, in each of the three directions."""
        windows = math.prod(self.size if self.transposed else self.output)
        return 2 * windows * math.prod(self.weight)


def square(model: str, ci: int, co: int, size: int, kernel: int, stride: int = 1) -> Layer:
    """Of two dimensions, padded so that stride one keeps the size."""
    return Layer(model, ci, co, (size, size), (kernel, kernel), stride, kernel // 2)


def bottlenecks(model: str) -> Iterator[Layer]:
    """The four stages of ResNet-50 (torchvision's: the stride is in the 3×3), each layer once."""
    before = 64
    for stage, width in enumerate((64, 128, 256, 512)):
        size, stride = 56 >> max(0, stage - 1), 1 if stage == 0 else 2
        after, inner = 4 * width, size // stride
        yield square(model, before, width, size, 1)
        yield square(model, width, width, size, 3, stride)
        yield square(model, width, after, inner, 1)
        if stage:  # in the first, this is the layer above
            yield square(model, before, after, size, 1, stride)
        yield square(model, after, width, inner, 1)
        if stage:
            yield square(model, width, width, inner, 3)
        before = after


RESNET = (square("ResNet-50", 3, 64, 224, 7, 2), *bottlenecks("ResNet-50"))
VGG = tuple(
    square("VGG-16", ci, co, size, 3)
    for ci, co, size in (
        (3, 64, 224), (64, 64, 224), (64, 128, 112), (128, 128, 112), (128, 256, 56), (256, 256, 56),
        (256, 512, 28), (512, 512, 28), (512, 512, 14),
    )
)  # fmt: skip
WHISPER = (  # base: 80 mel bands, 30 seconds
    Layer("Whisper", 80, 512, (3000,), (3,), 1, 1),
    Layer("Whisper", 512, 512, (3000,), (3,), 2, 1),
)
HIFIGAN = tuple(  # V1, a segment of 8192 samples
    Layer("HiFi-GAN", ci, ci // 2, (length,), (kernel,), stride, (kernel - stride) // 2, transposed=True)
    for ci, length, kernel, stride in ((512, 32, 16, 8), (256, 256, 16, 8), (128, 2048, 4, 2), (64, 4096, 4, 2))
)
VIT = (
    Layer("ViT-B/32", 3, 768, (224, 224), (32, 32), 32),
    Layer("ViT-B/16", 3, 768, (224, 224), (16, 16), 16),
    Layer("ViT-L/14", 3, 1024, (224, 224), (14, 14), 14),
)
R3D = tuple(  # R3D-18, 16 frames of 112 × 112
    Layer("R3D-18", width, width, (frames, size, size), (3, 3, 3), 1, 1)
    for width, frames, size in ((64, 16, 56), (128, 8, 28), (256, 4, 14), (512, 2, 7))
)
MODELS: Mapping[str, tuple[Layer, ...]] = {
    "resnet": tuple(dict.fromkeys(RESNET)), "vgg": VGG, "whisper": WHISPER, "hifigan": HIFIGAN, "vit": VIT, "r3d": R3D,
}  # fmt: skip
QUICK: Mapping[str, tuple[Layer, ...]] = {
    "resnet": (square("ResNet-50", 128, 128, 28, 3), square("ResNet-50", 1024, 256, 14, 1)),
    "whisper": WHISPER[:1], "hifigan": HIFIGAN[2:3], "vit": VIT[:1], "r3d": R3D[-1:],
}  # fmt: skip

# Fifty lengths in a row: what a server of audio meets. One call each, over as many calls of the mean length.
LENGTHS = tuple(range(1000, 1500, 10))
OF_LENGTHS = (  # its size is replaced
    Layer("Whisper", 80, 512, (0,), (3,), 1, 1),
    Layer("HiFi-GAN", 128, 64, (0,), (4,), 2, 1, transposed=True),
)


@dataclass(frozen=True)
class Target:
    """A line of the table: torch's time over ours, the geometric mean of the layers of these kinds, or the worst.

    wide: 64 channels or more on either side. with_instructions: the target where the CPU multiplies 16 bits.
    """

    name: str
    dtype: str
    least: float | None = None
    kinds: tuple[str, ...] = ()
    wide: bool = False
    worst: bool = False
    with_instructions: float | None = None

    def takes(self, row: Mapping[str, Any]) -> bool:
        narrow = self.wide and min(row["ci"], row["co"]) < 64
        return row["dtype"] == self.dtype and not narrow and (not self.kinds or row["kind"] in self.kinds)

    def of(self, instructions: bool) -> float | None:
        """The target on a CPU with or without instructions that multiply 16 bits."""
        return self.with_instructions if instructions and self.dtype in ("bf16", "f16") else self.least


TARGETS = (
    Target("float32", "f32", 0.95),
    Target("float32 3×3, 64 channels or more", "f32", 0.9, (THREE,), wide=True),
    Target("float32 1×1 and patches", "f32", 1.1, (ONE, PATCHES)),
    Target("float32 transposed", "f32", 1.0, (TRANSPOSED,)),
    Target("float32 conv3d", "f32", 2.0, (VOLUME,)),
    Target("float64", "f64", 1.3),
    Target("bfloat16", "bf16", 10.0, with_instructions=0.8),
    Target("float16", "f16", 10.0),
    *(Target(f"worst {name}", dtype, worst=True)
      for name, dtype in (("float32", "f32"), ("float64", "f64"), ("bfloat16", "bf16"), ("float16", "f16"))),
)  # fmt: skip
