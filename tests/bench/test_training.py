"""`python -m bench training`: steps compute the same, a quick run prints its tables."""

import pytest
import torch

from matmul_grad.bench import __main__ as bench
from matmul_grad.bench import training, training_calls, weight_gradients
from matmul_grad.bench.training_calls import BACKENDS, SMALL


@pytest.mark.parametrize("dtype", ["f32", "f64"])
@pytest.mark.parametrize("step", training.STEPS, ids=["mlp", "swiglu"])
def test_steps_compute_the_same(step: training_calls.Step, dtype: str) -> None:
    small = step._replace(rows=SMALL.rows, width=SMALL.width, hidden=SMALL.hidden)
    operands = training_calls.draw(small, training_calls.DTYPES[dtype])
    ours, *others = (training_calls.call_of(name, small, operands)() for name in BACKENDS)
    assert len(ours) == len(operands)
    for other in others:
        torch.testing.assert_close(ours, other)


def test_peak_of_a_step_holds_its_gradients() -> None:
    found = training_calls.memory.forked(lambda: training_calls.peak("fused", SMALL, torch.float32, 1))
    assert 0 <= found["peak bytes"] < 16 << 20


def test_quick_run_prints_its_tables(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_gradients, "peak", weight_gradients.peak_here)  # in no process of its own
    assert bench.main(["training", "--quick", "--threads", "1", "--dtypes", "bf16"]) == 0
    title, heads, *rows = capsys.readouterr().out.splitlines()
    assert title.startswith("1 threads") and heads.split()[:3] == [*BACKENDS]
    assert [row[36:40] for row in rows[:2]] == ["bf16"] * 2
    if hasattr(torch.Tensor, "grad_dtype"):
        assert rows[-1].split()[:2] == ["64×48→80", "bf16"]
