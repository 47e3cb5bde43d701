"""Settings of the launcher, and what it refuses without a GPU."""

from __future__ import annotations

import processes
import pytest
import torch

# Each line is a setting, and what a float32 product on a GPU is then; old and new ways of setting mix.
PRECISION_NOW = """
import torch
from matmul_grad.kernels.gpu.launch import precision_now
assert precision_now() == "ieee"
torch.set_float32_matmul_precision("high"); assert precision_now() == "tf32"
torch.set_float32_matmul_precision("highest"); assert precision_now() == "ieee"
torch.backends.cuda.matmul.allow_tf32 = True; assert precision_now() == "tf32"
torch.backends.cuda.matmul.allow_tf32 = False; assert precision_now() == "ieee"
torch.backends.cuda.matmul.fp32_precision = "tf32"; assert precision_now() == "tf32"
torch.backends.cuda.matmul.fp32_precision = "ieee"; assert precision_now() == "ieee"
"""


def test_precision_now_follows_every_setting_without_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", raising=False)
    child = processes.run(PRECISION_NOW, "-W", "error")
    assert (child.returncode, child.stdout, child.stderr) == (0, "", "")


def test_cpu_tensors_raise_without_the_interpreter() -> None:
    from matmul_grad.kernels.gpu import launch

    if launch.INTERPRETED:
        pytest.skip("TRITON_INTERPRET is set for the whole session")
    x = torch.ones(2, 2)
    assert not launch.supports(x)
    with pytest.raises(ValueError, match="both operands must be on one GPU"):
        launch.mm(x, x)


def test_launch_that_reads_padded_copies_has_no_record(monkeypatch: pytest.MonkeyPatch) -> None:
    """A record holds the addresses of the operands themselves."""
    from matmul_grad import cuda
    from matmul_grad.kernels.gpu import launch

    made: list[bool] = []
    x = torch.ones(2, 2)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(cuda, "encoded", lambda *_: made.append(True))
    for padded in ((False, False), (True, False), (False, True)):
        kept = launch.Launch((), (2, 2), padded=padded)
        monkeypatch.setattr(launch, "launch_of", lambda *_, kept=kept: kept)
        cuda.offer(x, x, x)
    assert made == [True]
