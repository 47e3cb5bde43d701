"""Convolutions under Triton's interpreter: exact integers against torch in float64, canaries, bits; no GPU needed."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from case_process import CaseProcess, assert_no_complaint
from gpu_cases import DTYPES, rows_alike, serve_cases
from products import assert_exact
from torch import Tensor

from matmul_grad.testing import assert_same_bits


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
    buffer = torch.empty(sizes, dtype=values.dtype, memory_format=last or torch.contiguous_format).fill_(math.nan)
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
        results.append(embed(torch.zeros(tuple(size), dtype=like.dtype), layout))
        return results[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convolution, "new_image", new_image)
        yield
    for result in results:
        result.fill_(math.nan)
        assert result._base is not None and bool(result._base.isnan().all()), "written outside of the result"


def check_exact(name: str) -> None:
    """All three products of a geometry, with a bias in both that can have one."""
    from matmul_grad.kernels.gpu import convolution

    case = GEOMETRIES[name]
    images = integers((case.batch, case.channels[0], *case.size), case.dtype, 1)
    filters = integers((case.channels[1], case.channels[0] // case.groups, *case.taps), case.dtype, 2)
    biases = [integers((channels,), case.dtype, 3) for channels in case.channels]
    x, w = embed(images, case.layout), embed(filters, "last" if case.layout == "last" else "contiguous")
    zeros = [0] * len(case.size)
    wide = torch.ops.aten.convolution(
        images.double(), filters.double(), biases[1].double(), *case.shared[:3], False, zeros, case.groups
    )
    with results_in_canaries(case.layout):
        assert convolution.supports(x, w)
        assert_exact(convolution.forward(x, w, biases[1], *case.shared), wide.to(x.dtype))
        grads = integers(wide.shape, case.dtype, 4)
        grad = embed(grads, case.layout)
        dx, dw, _ = torch.ops.aten.convolution_backward(
            grads.double(), images.double(), filters.double(), None, *case.shared[:3], False, zeros, case.groups,
            [True, True, False],
        )  # fmt: skip
        if max(case.stride) == 1:
            assert_exact(convolution.input_gradient(grad, w, x.shape, *case.shared), dx.to(x.dtype))
        dx += biases[0].double().view(1, -1, *[1] * len(case.size))
        assert_exact(convolution.input_gradient(grad, w, x.shape, *case.shared, biases[0]), dx.to(x.dtype))
        assert_exact(convolution.weight_gradient(grad, x, w.shape, *case.shared), dw.to(x.dtype))


def check_split(dtype: str) -> None:
    """The gradient of a weight, of two groups, as parts of k added in order."""
    from matmul_grad.kernels.gpu import convolution

    choose_tile = convolution.choose_tile
    x, grad = integers((3, 4, 12, 11), dtype, 1), integers((3, 6, 12, 11), dtype, 2)
    w, shared = torch.zeros(6, 2, 3, 3, dtype=x.dtype), ((1, 1), (1, 1), (1, 1), 2)
    want = torch.ops.aten.convolution_backward(
        grad.double(), x.double(), w.double(), None, *shared[:3], False, (0, 0), 2, [False, True, False]
    )[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convolution, "choose_tile", lambda *of: replace(choose_tile(*of), split_k=3))
        assert_exact(convolution.weight_gradient(grad, x, w.shape, *shared), want.to(x.dtype))


def check_wide() -> None:
    """64-bit indices give the bits that 32-bit ones give."""
    from matmul_grad.kernels.gpu import convolution_plan, launch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convolution_plan, "WIDE_FROM", 1)
        launch.clear_cache()
        check_exact("groups-sliced")
    launch.clear_cache()


def check_same_bits(channels: int, stride: int) -> None:
    """A sample has the same bits alone and in a batch, in either memory format, and a pixel in any image."""
    from matmul_grad.kernels.gpu.convolution import forward, input_gradient

    generator = torch.Generator().manual_seed(7)
    x = torch.randn(4, channels, 4, 5, generator=generator)
    w = torch.randn(channels, channels, 3, 2, generator=generator)
    shared: Any = ((stride, stride), (1, 1), (1, 1), 1)
    with rows_alike():
        y = forward(x, w, None, *shared)
        assert_same_bits(forward(x[3:4], w, None, *shared), y[3:4])
        assert_same_bits(forward(x.contiguous(memory_format=torch.channels_last), w, None, *shared), y)
        assert_same_bits(forward(x[:, :, :3], w, None, *shared)[:, :, :1], y[:, :, :1])
        dx = input_gradient(y, w, x.shape, *shared)
        assert_same_bits(input_gradient(y[3:4], w, x[3:4].shape, *shared), dx[3:4])


def check_precision() -> None:
    """float32 follows torch's setting for convolutions, which is apart from that of products."""
    from matmul_grad.kernels.gpu.convolution import forward

    setting: Any = torch.backends.cudnn.conv
    before = setting.fp32_precision
    x, one = torch.full((1, 1, 3), 1 + 2**-11), torch.ones(1, 1, 1)
    try:
        for precision, want in (("ieee", x), ("tf32", torch.full_like(x, 1 + 2**-10))):
            setting.fp32_precision = precision
            assert_exact(forward(x, one, None, (1,), (0,), (1,), 1), want)
    finally:
        setting.fp32_precision = before


def check_empty() -> None:
    """No sample, no channel, and memory formats of results."""
    from matmul_grad.kernels.gpu.convolution import forward, input_gradient, weight_gradient

    shared: Any = ((1, 1), (1, 1), (1, 1), 1)
    w, bias = torch.ones(3, 2, 3, 3), torch.arange(3.0)
    assert forward(torch.ones(0, 2, 4, 4), w, bias, *shared).shape == (0, 3, 4, 4)
    assert_exact(weight_gradient(torch.ones(0, 3, 4, 4), torch.ones(0, 2, 4, 4), w.shape, *shared), torch.zeros_like(w))
    none = forward(torch.ones(1, 0, 4, 4), torch.ones(3, 0, 3, 3), bias, *shared)
    assert_exact(none, bias.view(1, 3, 1, 1).expand(1, 3, 4, 4).contiguous())
    last = torch.ones(2, 2, 4, 4).contiguous(memory_format=torch.channels_last)
    y = forward(last, w, None, *shared)
    for result in (y, input_gradient(y, w, last.shape, *shared)):
        assert result.is_contiguous(memory_format=torch.channels_last) and not result.is_contiguous()


CASES: dict[str, Callable[[], None]] = {
    **{f"exact-{name}": partial(check_exact, name) for name in GEOMETRIES},
    **{f"split-{dtype}": partial(check_split, dtype) for dtype in ("fp64", "fp16")},
    **{
        f"bits-{channels}-{stride}": partial(check_same_bits, channels, stride)
        for channels, stride in ((3, 2), (32, 1))
    },
    "wide": check_wide,
    "precision": check_precision,
    "empty": check_empty,
}


@pytest.mark.parametrize("case", CASES)
def test_interpreted(case: str, interpreter: CaseProcess) -> None:
    assert_no_complaint(interpreter.complaint(case))


if __name__ == "__main__":
    serve_cases(CASES)
