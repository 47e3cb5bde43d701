"""Convolutions by the driver: exact, on every instruction set, without reading padding, and with bits of their own."""

import ctypes
import dataclasses
import itertools
import mmap
import random
from collections.abc import Iterator

import blocks
import pytest
import torch
from torch import Tensor
from torch_warnings import PROFILER

from matmul_grad.kernels.cpu import driver
from matmul_grad.kernels.cpu.config import BlockConfig
from matmul_grad.kernels.cpu.patches import ROWS
from matmul_grad.kernels.native import convolution, direct
from matmul_grad.kernels.native.convolution_plan import REMEMBERED
from matmul_grad.testing import assert_same_bits, integers

PAGE = mmap.PAGESIZE
FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}
Geometry = tuple[list[int], list[int], list[int], int]  # stride, padding, dilation, groups


@pytest.fixture(params=blocks.parameters())
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> BlockConfig:
    """The configuration that convolutions of its dtype use."""
    chosen: BlockConfig = request.param
    monkeypatch.setattr(convolution, "_driver", lambda dtype: direct.CALL(driver.patches_address(chosen)))
    return chosen


def drawn(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    return integers(1, int(torch.Size(shape).numel()), dtype, seed).reshape(shape)


def reference(x: Tensor, w: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The result, its gradient, and both gradients of the operands, by torch: exact, and all but one in float64."""
    *sizes, groups = geometry
    stride, padding, dilation = sizes
    flipped = [0] * len(stride)
    one, other = x.double(), w.double()
    y = torch.ops.aten.convolution(one, other, None, stride, padding, dilation, False, flipped, groups)
    grad = drawn(tuple(y.shape), x.dtype, 9)
    dx, dw, _ = torch.ops.aten.convolution_backward(
        grad.double(), one, other, None, stride, padding, dilation, False, flipped, groups, [True, True, False]
    )
    return y, grad, dx, dw


def cases(count: int, seed: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], Geometry]]:
    """Shapes of input and filter, and a geometry: kernels larger than the image and every small stride among them."""
    draw = random.Random(seed)
    while count:
        rank, groups = draw.choice((1, 2, 2, 3)), draw.choice((1, 1, 2, 3))
        image = [draw.choice((1, 4, 7, 9, 17) if rank < 3 else (1, 3, 6)) for _ in range(rank)]
        kernel, stride, dilation = (
            [draw.choice(choices) for _ in range(rank)] for choices in ((1, 2, 3, 5), (1, 1, 2, 3), (1, 1, 2, 3))
        )
        padding = [draw.choice((0, 1, 2, 4)) for _ in range(rank)]
        spans = [by * (taps - 1) + 1 for by, taps in zip(dilation, kernel, strict=True)]
        if all(size + 2 * pad >= span for size, pad, span in zip(image, padding, spans, strict=True)):
            count -= 1
            channels, filters = draw.choice((1, 2, 5)), groups * draw.choice((1, 3, 17))
            x, w = (draw.choice((1, 2, 3)), groups * channels, *image), (filters, channels, *kernel)
            yield x, w, (stride, padding, dilation, groups)


# Filters as large as the stride, whose windows do not overlap: in one product where a row of taps is long enough. With
# pixels that no window reaches, groups, dilated single taps, and more rows and columns than a block has.
TILED: list[tuple[tuple[int, ...], tuple[int, ...], Geometry]] = [
    ((2, 3, 17, 35), (5, 3, 4, 8), ([4, 8], [0, 0], [1, 1], 1)),
    ((3, 4, 40), (6, 2, 16), ([16], [0], [1], 2)),
    ((1, 2, 5, 4, 9), (7, 2, 2, 1, 4), ([2, 1, 4], [0, 0, 0], [1, 3, 1], 1)),
    ((3, 6, 8, 8), (6, 2, 2, 2), ([2, 2], [0, 0], [1, 1], 3)),
    ((2, 3, 160, 160), (8, 3, 16, 16), ([16, 16], [0, 0], [1, 1], 1)),
]


def test_results_and_gradients_are_exact(block: BlockConfig) -> None:
    dtype = getattr(torch, block.dtype)
    for at, (x_shape, w_shape, geometry) in enumerate([*TILED, *cases(40, seed=block.lanes)]):
        x, w = drawn(x_shape, dtype, 1), drawn(w_shape, dtype, 2)
        y, grad, dx, dw = reference(x, w, geometry)
        layout = at % 3 if at >= len(TILED) else 2
        if layout == 0 and x.dim() in FORMATS:
            x, grad = (t.contiguous(memory_format=FORMATS[x.dim()]) for t in (x, grad))
        if layout == 1:  # elements apart, between NaN
            x, w, grad = (spread(t) for t in (x, w, grad))
        what = f"{x_shape} {w_shape} {geometry}"
        assert torch.equal(convolution.forward(x, w, None, *geometry), y.to(dtype)), what
        assert torch.equal(convolution.input_gradient(grad, w, x.shape, *geometry), dx.to(dtype)), what
        assert torch.equal(convolution.weight_gradient(grad, x, w.shape, *geometry), dw.to(dtype)), what
        bias = drawn((w_shape[0],), dtype, 3)
        added = (y + bias.double().view(-1, *[1] * (x.dim() - 2))).to(dtype)
        assert torch.equal(convolution.forward(x, w, bias, *geometry), added), what
        bias = drawn((x_shape[1],), dtype, 4)
        added = (dx + bias.double().view(-1, *[1] * (x.dim() - 2))).to(dtype)
        assert torch.equal(convolution.input_gradient(grad, w, x.shape, *geometry, bias), added), what


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
def test_more_rows_of_the_filter_than_are_packed_at_a_time(
    dtype: torch.dtype, stride: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A block of A has so many with 2 MiB of L2."""
    chosen = driver.config(str(dtype).removeprefix("torch."))
    chosen = dataclasses.replace(chosen, mc=(ROWS // chosen.mr + 2) * chosen.mr)
    assert chosen.mc > ROWS
    monkeypatch.setattr(convolution, "_driver", lambda dtype: direct.CALL(driver.patches_address(chosen)))
    x, w = drawn((2, chosen.mc, 4, 4), dtype, 1), drawn((5, chosen.mc, 3, 3), dtype, 2)
    geometry: Geometry = ([stride, stride], [1, 1], [1, 1], 1)
    _, grad, dx, _ = reference(x, w, geometry)
    assert torch.equal(convolution.input_gradient(grad, w, x.shape, *geometry), dx.to(dtype))


def spread(t: Tensor) -> Tensor:
    whole = t.new_full([2 * size + 1 for size in t.shape], float("nan"))
    return whole[tuple(slice(1, None, 2) for _ in t.shape)].copy_(t)


def test_padding_and_pages_beyond_operands_are_not_read(block: BlockConfig) -> None:
    """Operands end where a page that cannot be read begins, or begin where one ends."""
    dtype = getattr(torch, block.dtype)
    for (x_shape, w_shape, geometry), at_end in itertools.product([*TILED[:4], *cases(8, seed=5)], (True, False)):
        x, w = drawn(x_shape, dtype, 1), drawn(w_shape, dtype, 2)
        y, grad, dx, dw = reference(x, w, geometry)
        guards = [Guarded(t, at_end) for t in (x, w, grad)]
        try:
            one, other, gradient = (guard.tensor for guard in guards)
            assert torch.equal(convolution.forward(one, other, None, *geometry), y.to(dtype))
            assert torch.equal(convolution.input_gradient(gradient, other, x.shape, *geometry), dx.to(dtype))
            assert torch.equal(convolution.weight_gradient(gradient, one, w.shape, *geometry), dw.to(dtype))
        finally:
            for guard in guards:
                guard.protect(mmap.PROT_READ | mmap.PROT_WRITE)


class Guarded:
    """A copy of a tensor between two pages that cannot be read, beside one of them."""

    def __init__(self, t: Tensor, at_end: bool) -> None:
        size = t.numel() * t.element_size()
        pages = -(-size // PAGE)
        self.memory = mmap.mmap(-1, (pages + 2) * PAGE)
        self.base = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        offset = PAGE + pages * PAGE - size if at_end else PAGE
        self.tensor = torch.frombuffer(self.memory, dtype=t.dtype, count=t.numel(), offset=offset).view(t.shape)
        self.tensor.copy_(t)
        self.protect(0)

    def protect(self, rights: int) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        for page in (self.base, self.base + len(self.memory) - PAGE):
            assert libc.mprotect(ctypes.c_void_p(page), ctypes.c_size_t(PAGE), rights) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_do_not_depend_on_batch_image_layout_or_threads(dtype: torch.dtype) -> None:
    if not convolution.supports(torch.ones(1, 1, 1, dtype=dtype), torch.ones(1, 1, 1, dtype=dtype)):
        pytest.skip("torch convolves bfloat16 where pairs are multiplied")
    x, w = torch.randn(3, 40, 19, 23).to(dtype), torch.randn(33, 40, 3, 3).to(dtype)
    geometry: Geometry = ([1, 1], [1, 1], [1, 1], 1)
    whole, last = convolution.forward(x, w, None, *geometry), x.contiguous(memory_format=torch.channels_last)
    grads = convolution.input_gradient(x[:, :33].contiguous(), w, (3, 40, 19, 23), *geometry)
    assert_same_bits(convolution.forward(x[1:2], w, None, *geometry), whole[1:2])
    assert_same_bits(convolution.forward(last, w, None, *geometry).contiguous(), whole)
    cut = convolution.forward(x[:, :, :11, :9].contiguous(), w, None, *geometry)
    assert_same_bits(cut[:, :, :10, :8].contiguous(), whole[:, :, :10, :8].contiguous())
    threads = torch.get_num_threads()
    for count in (1, 2):
        torch.set_num_threads(count)
        try:
            assert_same_bits(convolution.forward(x, w, None, *geometry), whole)
            one = convolution.input_gradient(x[2:, :33].contiguous(), w, (1, 40, 19, 23), *geometry)
            assert_same_bits(one, grads[2:])
        finally:
            torch.set_num_threads(threads)


def test_plans_are_few_and_hold_no_address() -> None:
    """The second call of a shape reads its plan, with other tensors."""
    plans = (convolution.forward_plan, convolution.input_gradient_plan, convolution.weight_gradient_plan)
    geometry: Geometry = ([2, 2], [1, 1], [1, 1], 1)
    before = [plan.cache_info().hits for plan in plans]
    for seed in (1, 2):
        x, w = drawn((2, 3, 9, 7), torch.float32, seed), drawn((4, 3, 3, 3), torch.float32, seed + 2)
        y, grad, dx, dw = reference(x, w, geometry)
        assert torch.equal(convolution.forward(x, w, None, *geometry), y.float())
        assert torch.equal(convolution.input_gradient(grad, w, x.shape, *geometry), dx.float())
        assert torch.equal(convolution.weight_gradient(grad, x, w.shape, *geometry), dw.float())
    assert all(plan.cache_info().hits > hits for plan, hits in zip(plans, before, strict=True))
    assert all(plan.cache_info().maxsize == REMEMBERED for plan in plans)


def test_more_pixels_than_an_address_can_tell_are_left_to_torch() -> None:
    filter, pixel = torch.ones(1, 1, 3), torch.ones(())
    assert convolution.supports(pixel.expand(1, 1, convolution.MOST_PIXELS), filter)
    assert not convolution.supports(pixel.expand(1, 1, convolution.MOST_PIXELS + 1), filter)
    assert not convolution.supports(filter, pixel.expand(2, 1, convolution.MOST_PIXELS))


@PROFILER
def test_nothing_but_the_result_is_allocated() -> None:
    x, w = torch.randn(2, 16, 24, 24), torch.randn(16, 16, 3, 3)
    geometry: Geometry = ([2, 2], [1, 1], [1, 1], 1)
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        y = convolution.forward(x, w, None, *geometry)
        convolution.input_gradient(y, w, x.shape, *geometry)
        convolution.weight_gradient(y, x, w.shape, *geometry)
    made = sum(max(event.self_cpu_memory_usage, 0) for event in profile.events())
    assert made <= 4 * (y.numel() + x.numel() + w.numel())
