"""A step of `matmul-grad gpu-report` by itself."""

from typing import Any

from matmul_grad.bench import backends, results
from matmul_grad.bench.stages import StageContext


def given(name: str, gpu: Any, seconds: float = 60.0, **more: Any) -> tuple[StageContext, list[Any]]:
    """What the step of this name is called with, and the rows that it adds; ``gpu`` is the fixture of that name."""
    del gpu
    record = results.Record(None, results.begin("gpu-report", {"date": "2026-01-02", "device": "cuda"}, {}, 0))
    selected = backends.chosen(["torch"], "cuda")
    return StageContext(name, record, seconds, selected=selected, **more), record.result["rows"]
