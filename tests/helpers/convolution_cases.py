"""Convolutions that the tests of the interpreter and of a GPU share: exact integers, in NaN canaries."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from gpu_cases import DTYPES
from products import assert_exact
from torch import Tensor


class Geometry(NamedTuple):
    """A convolution; layout: "contiguous", "last" (channels_last) or "sliced" (every second sample and column)."""

    dtype: str
    batch: int
    channels: tuple[int, int]
    size: tuple[int, ...]
    taps: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1
    layout: str = "contiguous"

    @property
    def shared(self) -> tuple[Any, ...]:
        return self.stride, self.padding, self.dilation, self.groups


# Padding wider than the filter, filters larger than the image, stride and dilation with a common divisor, phases that
# no tap reaches, one and two groups, channels that fill a step of k and that do not, one to three dimensions.
GEOMETRIES = {
    "3x3": Geometry("fp32", 2, (3, 5), (7, 6), (3, 3), (1, 1), (1, 1), (1, 1)),
    "groups-sliced": Geometry("fp16", 2, (4, 6), (9, 10), (3, 2), (2, 3), (1, 0), (1, 2), 2, "sliced"),
    "last": Geometry("fp32", 2, (4, 6), (9, 10), (3, 2), (2, 3), (4, 0), (1, 2), 2, "last"),
    "1d": Geometry("fp64", 2, (4, 6), (19,), (4,), (4,), (5,), (2,), 2),
    "3d": Geometry("fp16", 1, (2, 3), (4, 5, 6), (3, 1, 2), (2, 1, 3), (1, 0, 1), (1, 1, 3)),
    "3d-last": Geometry("fp64", 1, (16, 3), (3, 4, 3), (2, 3, 2), (1, 1, 1), (1, 1, 0), (1, 1, 2), layout="last"),
    "larger-than-image": Geometry("bf16", 2, (3, 4), (2, 3), (5, 4), (4, 3), (2, 3), (1, 2)),
    "unreached-phases": Geometry("fp64", 2, (2, 16), (7, 7), (2, 2), (4, 3), (0, 1), (1, 1)),
    "tap": Geometry("fp32", 2, (32, 16), (5, 6), (3, 2), (1, 1), (1, 2), (2, 1)),
    "tap-groups-last": Geometry("fp32", 1, (64, 64), (5, 6), (3, 2), (2, 1), (1, 0), (1, 2), 2, "last"),
}

FUNCTIONS = ("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")


def integers(sizes: Sequence[int], dtype: str, seed: int) -> Tensor:
    """-1, 0 and 1, most of them 0: the sums of these cases are exact in every dtype."""
    generator = torch.Generator().manual_seed(seed)
    sparse = torch.rand(*sizes, generator=generator) < 0.5
    return (torch.randint(-1, 2, tuple(sizes), generator=generator) * sparse).to(DTYPES[dtype])


def embed(values: Tensor, layout: str) -> Tensor:
    """The values as a view in the middle of a buffer of NaN, so that what padding stands for is NaN in memory."""
    steps = [2 if layout == "sliced" and d in (0, values.dim() - 1) else 1 for d in range(values.dim())]
    sizes = [4 + size * step for size, step in zip(values.shape, steps, strict=True)]
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    last = formats.get(values.dim()) if layout == "last" else None
    buffer = values.new_empty(sizes).to(memory_format=last or torch.contiguous_format).fill_(math.nan)
    slices = [slice(2, 2 + size * step, step) for size, step in zip(values.shape, steps, strict=True)]
    view = buffer[tuple(slices)]
    view.copy_(values)
    return view


@contextlib.contextmanager
def results_in_canaries(layout: str) -> Iterator[None]:
    """Results are allocated in the middle of NaN too, which is looked at afterwards."""
    from matmul_grad.kernels.gpu import convolution

    results = []

    def new_image(like: Tensor, size: Sequence[int]) -> Tensor:
        results.append(embed(like.new_zeros(tuple(size)), layout))
        return results[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convolution, "new_image", new_image)
        yield
    for result in results:
        result.fill_(math.nan)
        assert result._base is not None and bool(result._base.isnan().all()), "written outside of the result"


def check_exact(name: str, device: torch.device | str = "cpu") -> None:
    """All three products of a geometry, with a bias in both that can have one."""
    from matmul_grad.kernels.gpu import convolution

    case = GEOMETRIES[name]
    images = integers((case.batch, case.channels[0], *case.size), case.dtype, 1)
    filters = integers((case.channels[1], case.channels[0] // case.groups, *case.taps), case.dtype, 2)
    biases = [integers((channels,), case.dtype, 3) for channels in case.channels]
    x = embed(images.to(device), case.layout)
    w = embed(filters.to(device), "last" if case.layout == "last" else "contiguous")
    to_image, to_result = (bias.to(device) for bias in biases)
    zeros = [0] * len(case.size)
    wide = torch.ops.aten.convolution(
        images.double(), filters.double(), biases[1].double(), *case.shared[:3], False, zeros, case.groups
    )
    with results_in_canaries(case.layout):
        assert convolution.supports(x, w)
        assert_exact(convolution.forward(x, w, to_result, *case.shared).cpu(), wide.to(x.dtype))
        grads = integers(wide.shape, case.dtype, 4)
        grad = embed(grads.to(device), case.layout)
        dx, dw, _ = torch.ops.aten.convolution_backward(
            grads.double(), images.double(), filters.double(), None, *case.shared[:3], False, zeros, case.groups,
            [True, True, False],
        )  # fmt: skip
        if max(case.stride) == 1:
            assert_exact(convolution.input_gradient(grad, w, x.shape, *case.shared).cpu(), dx.to(x.dtype))
        dx += biases[0].double().view(1, -1, *[1] * len(case.size))
        assert_exact(convolution.input_gradient(grad, w, x.shape, *case.shared, to_image).cpu(), dx.to(x.dtype))
        assert_exact(convolution.weight_gradient(grad, x, w.shape, *case.shared).cpu(), dw.to(x.dtype))


def operands(name: str, dtype: str, groups: int = 1) -> list[Tensor]:
    """Two images, filters and a bias of the public function of a name."""
    rank = int(name[-2])
    weight = (4, 6 // groups) if "transpose" in name else (6, 4 // groups)
    sizes = (2, 4, *range(4, 4 + rank)), (*weight, *(3, 2, 2)[:rank]), (6,)
    return [integers(size, dtype, seed) for seed, size in enumerate(sizes)]


def step(module: Any, name: str, tensors: list[Tensor], **named: Any) -> list[Tensor]:
    """The result of a function of the module and the gradients of its square."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    result = getattr(module, name)(*leaves, **named)
    return [result.detach(), *torch.autograd.grad(result.square().sum(), leaves)]
