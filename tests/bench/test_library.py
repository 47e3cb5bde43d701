"""`matmul_grad.bench.compare`: what it finds, what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import matmul_grad
from matmul_grad import bench
from matmul_grad.bench import inputs

SHAPES = [(33, 17, 300)]


def copy(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.mm(a, b)


@pytest.mark.parametrize("product", ["forward", "dgrad", "wgrad", "step"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_kernels_are_compared(product: str, dtype: torch.dtype) -> None:
    (found,) = bench.compare(matmul_grad.mm, torch.mm, SHAPES, product=product, dtype=dtype, layout="TN", seconds=0)
    assert found.shape == SHAPES[0] and found.rounds == 3
    assert 0 < found.ratio.low <= found.ratio.median <= found.ratio.high
    assert str(found).startswith("33×17×300: ")


def test_slow_function_is_shown(clock: Any) -> None:
    def slow(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        clock.now += 0.05
        return torch.mm(a, b)

    (found,) = bench.compare(torch.mm, slow, SHAPES, seconds=0)
    assert found.b.low > 0.05 and found.ratio.low > 10


def test_function_in_disguise_has_the_same_bits() -> None:
    (found,) = bench.compare(torch.mm, copy, SHAPES, seconds=0)
    assert found.same_bits and str(found).endswith("the same bits")
    (found,) = bench.compare(torch.mm, matmul_grad.mm, SHAPES, seconds=0)
    assert not found.same_bits


def test_function_against_itself_is_refused() -> None:
    with pytest.raises(ValueError, match="one function"):
        bench.compare(torch.mm, torch.mm, SHAPES)


def test_wrong_function_is_not_timed() -> None:
    with pytest.raises(AssertionError, match=r"fn_b, forward-f32-NN-33x17x300.*on integers 33 of 33 rows are wrong"):
        bench.compare(torch.mm, lambda a, b: torch.mm(a, b) + 1, SHAPES)


def test_zeros_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "fill_normal", lambda memory, generator, longest: memory.zero_())
    with pytest.raises(inputs.Unfit, match="not standard normal"):
        bench.compare(torch.mm, copy, SHAPES)


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"product": "backward"}, "product of"), ({"layout": "N"}, "layout of"), ({"dtype": torch.int8}, "dtype of"),
        ({"shapes": [(1, 2)]}, "shapes are"), ({"shapes": [(0, 1, 1)]}, "each at least 1"),
        ({"device": "cuda"}, "no CUDA device"),
    ],
)  # fmt: skip
def test_arguments_that_cannot_be(given: dict[str, Any], why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    shapes = given.pop("shapes", SHAPES)
    with pytest.raises(ValueError, match=why):
        bench.compare(torch.mm, copy, shapes, **given)
