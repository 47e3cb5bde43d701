"""`python -m bench training`: steps compute the same, weight gradients add up, a quick run prints its tables."""

import pytest
import torch

from matmul_grad.bench import __main__ as bench
from matmul_grad.bench import training, training_calls
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_accumulated_gradients_are_sums(dtype: torch.dtype) -> None:
    x, grad = torch.ones(4, 3, dtype=dtype), torch.full((4, 2), 2.0, dtype=dtype)
    for way in (training_calls.accumulate, training_calls.accumulate_by_torch):
        main = torch.ones(2, 3)
        way(main, grad, x)
        assert way(main, grad, x) is main and main.tolist() == [[17.0] * 3] * 2


def test_errors_are_counted_in_roundings_of_the_largest_element(monkeypatch: pytest.MonkeyPatch) -> None:
    def off_by_one(main: torch.Tensor, grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        main.copy_((grad.t().double() @ x.double()).float())
        return main.flatten()[main.abs().argmax()].mul_(1 + 2.0**-20)

    monkeypatch.setattr(training_calls, "accumulate_by_torch", off_by_one)
    found = training_calls.errors(SMALL, 1)
    assert found["torch"] == pytest.approx(16, abs=1.1) and 0 < found["ours"] < 4


def test_peak_of_a_step_holds_its_gradients() -> None:
    found = training_calls.memory.forked(lambda: training_calls.peak("fused", SMALL, torch.float32, 1))
    assert 0 <= found["peak bytes"] < 16 << 20


def test_quick_run_prints_its_tables(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["training", "--quick", "--threads", "1"]) == 0
    title, heads, *rows = capsys.readouterr().out.splitlines()
    assert title.startswith("1 threads") and heads.split()[:3] == [*BACKENDS]
    assert [row.split()[-4:-3] for row in rows[:2]] and "microbatches" in rows[-1]
    assert sum(row.startswith(("f32", "bf16")) for row in rows) == 2
