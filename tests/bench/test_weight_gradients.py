"""The part of `bench training` on weight gradients: what is compared, and the errors."""

import pytest
import torch

from matmul_grad.bench import weight_gradients

pytestmark = pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="this torch has no grad_dtype")


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_calls_compute_the_same(dtype: str) -> None:
    torch.manual_seed(0)
    calls = weight_gradients.calls(weight_gradients.QUICK[0], weight_gradients.DTYPES[dtype])
    plain = calls["plain"]()
    assert plain.dtype == torch.float32
    assert torch.equal(calls["accumulated"](), plain)
    torch.testing.assert_close(calls["added"](), 2 * plain)


def test_errors_are_those_of_a_rounding() -> None:
    layer = weight_gradients.QUICK[0]
    ours, theirs = (weight_gradients.error(layer, torch.bfloat16, 16, mine) for mine in (True, False))
    assert ours[0] <= weight_gradients.MOST_ERROR < theirs[0]
