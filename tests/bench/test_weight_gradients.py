"""`python -m bench weight-gradients`: what is compared, and a row of the table."""

import pytest
import torch

from matmul_grad.bench import __main__ as bench
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


def test_quick_run_prints_a_row_a_dtype(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_gradients, "peak", weight_gradients.peak_here)  # in no process of its own
    assert bench.main(["weight-gradients", "--quick", "--threads", "1", "--dtypes", "bf16"]) == 0
    *_, row = capsys.readouterr().out.splitlines()
    assert row.split()[:2] == ["64×48→80", "bf16"]
