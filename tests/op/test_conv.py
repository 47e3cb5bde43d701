"""Convolutions by function against torch: exact values, layouts, errors, autocast, fallbacks, FLOPs."""

import itertools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from dtypes import EVERY
from outcomes import outcome
from torch import Tensor
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

import matmul_grad
from matmul_grad import convolution_ops, convolution_shapes
from matmul_grad.testing import assert_same_bits

NAMES = ("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
CONVOLUTION, WEIGHT_GRADIENT = torch.ops.matmul_grad.convolution, torch.ops.matmul_grad.convolution_weight_gradient


def whole_numbers(*size: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """Small ones, whose sums of products every dtype of accumulation holds."""
    made = torch.randint(-2, 3, size, generator=torch.Generator().manual_seed(seed))
    return made.to(dtype)


def operands(name: str, dtype: torch.dtype = torch.float32, size: int = 6, groups: int = 1) -> list[Tensor]:
    """(2, 4, …) by 6 filters, and a bias."""
    rank = int(name[-2])
    weight = (4, 6 // groups) if "transpose" in name else (6, 4 // groups)
    shapes = (2, 4, *range(size, size + rank)), (*weight, *(3, 2, 3)[:rank]), (6,)
    return [whole_numbers(*shape, dtype=dtype, seed=seed) for seed, shape in enumerate(shapes)]


def step(function: Callable[..., Tensor], tensors: list[Tensor], **named: Any) -> list[Tensor]:
    """The result and the gradients of a sum, whose own gradient is one element, expanded."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    result = function(*leaves, **named)
    return [result.detach(), *torch.autograd.grad(result.sum(), leaves)]


@pytest.mark.parametrize("dtype", EVERY)
@pytest.mark.parametrize("name", NAMES)
def test_exact(name: str, dtype: torch.dtype) -> None:
    """Strides, paddings, dilations, groups: values and gradients are whole numbers, so they are torch's in float64."""
    choices = itertools.product((1, 2, 3), (0, 2), (1, 2), (1, 2))
    for number, (stride, padding, dilation, groups) in enumerate(choices):
        named: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
        if "transpose" in name:
            named["output_padding"] = number % max(stride, dilation)
        given = operands(name, dtype, groups=groups)
        expected = step(getattr(functional, name), [x.double() for x in given], **named)
        with matmul_grad.strict():
            found = step(getattr(matmul_grad, name), given, **named)
        for ours, theirs in zip(found, expected, strict=True):
            assert_same_bits(ours + 0.0, theirs.to(dtype) + 0.0, str(named))


@pytest.mark.parametrize("name", NAMES)
def test_layouts(name: str) -> None:
    """Sliced, transposed, expanded, channels last: the values are the same, the result has the input's format."""
    given = operands(name)
    expected, ours = getattr(functional, name)(*given, padding=1), getattr(matmul_grad, name)
    x, w, b = given
    spread = torch.full((2 * x.shape[0], *x.shape[1:]), torch.nan)[::2].copy_(x)
    reordered = x.transpose(0, -1).contiguous().transpose(0, -1)
    filters = w.transpose(0, 1).contiguous().transpose(0, 1)
    for image, weight in itertools.product((x, spread, reordered), (w, filters, w.flip(0).flip(0))):
        assert_same_bits(ours(image, weight, b, padding=1), expected)
    assert_same_bits(ours(x[:1].expand_as(x), w, b, padding=1)[1], expected[0])
    if x.dim() > 3:
        last = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
        result = ours(x.to(memory_format=last), w.to(memory_format=last), b, padding=1)
        assert_same_bits(result, expected)
        assert result.is_contiguous(memory_format=last) and not result.is_contiguous()


@pytest.mark.parametrize("name", NAMES)
def test_unbatched_and_empty(name: str) -> None:
    x, w, b = operands(name)
    with matmul_grad.strict():
        assert_same_bits(getattr(matmul_grad, name)(x[0], w, b), getattr(functional, name)(x[0], w, b))
        found = step(getattr(matmul_grad, name), [x[:0], w, b])
    for ours, theirs in zip(found, step(getattr(functional, name), [x[:0], w, b]), strict=True):
        assert_same_bits(ours, theirs)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("name", NAMES[:3])
def test_padding_by_name(name: str) -> None:
    given = operands(name, size=8)
    for padding, dilation in itertools.product(("same", "valid"), (1, 2, 3)):
        found, expected = (
            step(getattr(module, name), given, padding=padding, dilation=dilation)
            for module in (matmul_grad, functional)
        )
        for ours, theirs in zip(found, expected, strict=True):
            assert_same_bits(ours + 0.0, theirs + 0.0, f"{padding} {dilation}")


TENSORS = ("input", "weight", "bias")
WRONG: list[tuple[str, dict[str, Any]]] = [
    (name, named)
    for name in ("conv2d", "conv_transpose2d")
    for named in (
        {"stride": 0}, {"stride": (1, 2, 3)}, {"stride": -1}, {"stride": 1.5}, {"stride": "1"}, {"padding": -1},
        {"padding": (1, 2, 3)}, {"padding": "same", "stride": 2}, {"padding": "none"}, {"padding": 1.0},
        {"dilation": 0}, {"dilation": 9}, {"groups": 0}, {"groups": 3}, {"groups": -1}, {"groups": 2}, {"groups": None},
        {"stride": []}, {"stride": (True, 1)}, {"stride": [2]}, {"padding": [1, 2]}, {"bias": torch.ones(5)},
        {"bias": torch.ones(6, 1)}, {"bias": torch.ones(6).double()}, {"bias": 1.0}, {"bias": torch.ones(())},
        {"weight": torch.ones(6, 4)}, {"weight": torch.ones(6, 5, 3, 3)},
        {"weight": torch.ones(6, 4, 3, 3).double()}, {"weight": None},
        {"weight": torch.ones(6, 4, 9, 9)}, {"weight": torch.ones(6, 4, 0, 3)}, {"weight": torch.ones(0, 4, 3, 3)},
        {"input": torch.ones(4, 4)}, {"input": torch.ones(2, 5, 6, 7)}, {"input": torch.ones(2, 4, 0, 7)},
        {"input": torch.ones(1, 2, 4, 6, 7)}, {"input": 3}, {"input": torch.ones(2, 0, 6, 7)}, {"nothing": 1},
    )
] + [("conv_transpose2d", {"output_padding": more}) for more in (1, -1, (0, 2), "0")]  # fmt: skip


@pytest.mark.parametrize(("name", "named"), WRONG, ids=lambda x: x if isinstance(x, str) else next(iter(x)))
def test_wrong_arguments(name: str, named: dict[str, Any]) -> None:
    """torch's error in every letter, or its result."""
    tensors = [named.get(key, given) for key, given in zip(TENSORS, operands(name), strict=True)]
    found, expected = (
        outcome(getattr(module, name), *tensors, **{k: v for k, v in named.items() if k not in TENSORS})
        for module in (matmul_grad, functional)
    )
    if isinstance(expected, Tensor):
        torch.testing.assert_close(found, expected, check_stride=False)
    elif "nothing" in named:  # Python itself words this one
        assert found[0] is expected[0] is TypeError
    else:
        assert found == expected


@pytest.mark.parametrize("name", NAMES)
def test_autocast(name: str) -> None:
    """The dtypes are torch's; a gradient has that of its parameter, inside of the block too."""
    for dtypes in itertools.product((torch.float32, torch.bfloat16, torch.float64), repeat=2):
        given = [x.to(dtype) for x, dtype in zip(operands(name)[:2], dtypes, strict=True)]
        with torch.autocast("cpu", torch.bfloat16):
            found, expected = (
                outcome(lambda f: step(f, given), getattr(module, name)) for module in (matmul_grad, functional)  # noqa: B023
            )  # fmt: skip
        if isinstance(expected, tuple):
            assert found == expected, dtypes
        else:
            assert [x.dtype for x in found] == [x.dtype for x in expected], dtypes
            torch.testing.assert_close(found, expected, rtol=0, atol=0)
    leaves = [x.requires_grad_() for x in operands(name)]
    result = getattr(matmul_grad, name)(*leaves)
    with torch.autocast("cpu", torch.bfloat16):
        assert {x.dtype for x in torch.autograd.grad(result.sum(), leaves)} == {torch.float32}


@pytest.mark.filterwarnings("ignore:Casting complex values")
@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64, torch.bool], ids=str)
def test_other_dtypes_are_torchs(dtype: torch.dtype) -> None:
    given = [x.to(dtype) for x in operands("conv2d")]
    found, expected = (outcome(module.conv2d, *given) for module in (matmul_grad, functional))
    if isinstance(expected, Tensor):
        assert_same_bits(found, expected)
    else:
        assert found == expected
    with matmul_grad.strict(), pytest.raises(RuntimeError, match="strict"):
        matmul_grad.conv2d(*given)


def test_one_channel_a_group_is_torchs() -> None:
    x, w = whole_numbers(2, 4, 6, 6, dtype=torch.float32), whole_numbers(8, 1, 3, 3, dtype=torch.float32)
    for ours, theirs in zip(*(step(f.conv2d, [x, w], groups=4) for f in (matmul_grad, functional)), strict=True):
        assert_same_bits(ours, theirs)
    with matmul_grad.strict(), pytest.raises(RuntimeError, match="strict"):
        matmul_grad.conv2d(x, w, groups=4)


@pytest.mark.parametrize("name", NAMES)
def test_flops(name: str) -> None:
    counts = []
    for module in (matmul_grad, functional):
        leaves = [x.requires_grad_() for x in operands(name)]
        with FlopCounterMode(display=False) as forward:
            result = getattr(module, name)(*leaves, stride=2)
        with FlopCounterMode(display=False) as backward:
            result.sum().backward()
        counts.append((forward.get_total_flops(), backward.get_total_flops()))
    assert counts[0] == counts[1]
    assert counts[0][1] == 2 * counts[0][0] > 0


def test_freed_storages_raise() -> None:
    for number in range(3):
        given = operands("conv2d")
        given[number].untyped_storage().resize_(0)
        with pytest.raises(RuntimeError):
            matmul_grad.conv2d(*given)
    grad, x = whole_numbers(2, 6, 4, 6, dtype=torch.float32), operands("conv2d")[0]
    grad.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError):
        WEIGHT_GRADIENT(grad, x, [6, 4, 3, 2], [1, 1], [0, 0], [1, 1], 1)


def test_operators_raise_torchs_errors() -> None:
    x, w, b = operands("conv2d")
    plain: list[Any] = [[1, 1], [0, 0], [1, 1], False, [0, 0], 1]
    for number, wrong in ((0, [0, 1]), (1, [-1, 0]), (2, [0, 1]), (0, [1, 1, 1]), (5, 3), (5, 0)):
        arguments = [*plain[:number], wrong, *plain[number + 1 :]]
        found, expected = (
            outcome(operator, x, w, b, *arguments) for operator in (CONVOLUTION, torch.ops.aten.convolution)
        )
        assert found == expected and isinstance(found, tuple)
    found, expected = (
        outcome(operator, *(y.to(torch.complex64).requires_grad_() for y in (x, w, b)), *plain)
        for operator in (CONVOLUTION, torch.ops.aten.convolution)
    )
    assert found == expected  # which has no complex numbers: torch's functions compose them
    for size in ([6, 4, 2, 2], [6, 3, 3, 2], [6, 4, 3]):
        with pytest.raises(RuntimeError):
            WEIGHT_GRADIENT(whole_numbers(2, 6, 4, 6, dtype=torch.float32), x, size, *plain[:3], 1)


def test_functions_pickle() -> None:
    for name in NAMES:
        assert pickle.loads(pickle.dumps(getattr(matmul_grad, name))) is getattr(matmul_grad, name)


def test_sums_of_more_steps_than_an_address_can_tell_are_left_to_torch() -> None:
    """Of expanded operands, which take no memory."""
    pixel, geometry = torch.ones(()), convolution_shapes.untransposed((1,), (0,), (1,), 1)
    for channels, found in ((convolution_ops.MOST_STEPS, True), (convolution_ops.MOST_STEPS + 1, False)):
        image, filters = pixel.expand(1, channels, 1), pixel.expand(1, channels, 1)
        assert (convolution_ops._supported(image, filters, filters.shape, geometry) is not None) == found
