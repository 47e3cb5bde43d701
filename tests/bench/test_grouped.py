"""`python -m bench grouped`: the layers, what is compared, and a row of the table."""

import pytest
import torch

from matmul_grad.bench import __main__ as bench
from matmul_grad.bench import grouped


@pytest.mark.parametrize("layer", grouped.LAYERS, ids=str)
def test_sizes_add_up_and_are_skewed_or_not(layer: grouped.Layer) -> None:
    sizes = layer.sizes()
    assert sum(sizes) == layer.rows and len(sizes) == layer.experts and min(sizes) >= 0
    assert (sizes[0] > 2 * layer.rows // layer.experts) == layer.is_skewed


@pytest.mark.parametrize("dtype", ["f32", "bf16", "f64"])
def test_steps_compute_the_same(dtype: str) -> None:
    torch.manual_seed(0)
    calls = grouped.steps(grouped.QUICK[0], grouped.DTYPES[dtype])
    assert list(calls) == ["matmul_grad", "loop", "torch"][: 2 if dtype == "f64" else 3]
    ours, *others = (call() for call in calls.values())
    for other in others:
        torch.testing.assert_close(ours, other)


def test_quick_run_prints_a_row_a_dtype(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["grouped", "--quick", "--threads", "1"]) == 0
    title, _, *rows = capsys.readouterr().out.splitlines()
    assert title.startswith("1 threads") and [row.split()[3] for row in rows] == ["f32", "bf16"]


def test_a_target_without_instructions_is_no_target_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {}
    for instructions in (False, True):
        monkeypatch.setattr(grouped, "instructions", lambda dtype, are=instructions: are or dtype == "f32")
        found[instructions] = [grouped.missed(dtype, {"loop": 1.1, "torch": 4.9}) for dtype in ("f32", "bf16", "f64")]
    assert found == {False: ["  below 1.2", "  below 5", ""], True: ["  below 1.2", "", ""]}
