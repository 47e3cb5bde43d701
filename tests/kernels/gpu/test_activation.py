"""Activations in the epilogue, under Triton's interpreter: argument and result of one launch, and errors."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from case_process import CaseProcess, assert_no_complaint
from epilogue_cases import configs, launched, operands
from gpu_cases import assert_same_bits, at_arch, embed, integers, serve_cases
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": partial(torch.nn.functional.gelu, approximate="tanh"),
    "silu": torch.nn.functional.silu,
    "tanh": torch.tanh,
}


def check_activation(sizes: tuple, dtype: str, config: Any, name: str = "gelu", arch: int = 90) -> None:
    """Its argument exactly, and its result, into new memory and into canaries; the same bits with and without both."""
    from matmul_grad.kernels.gpu import launch

    a, b = operands(*sizes, dtype, "NT")
    source = integers(1, sizes[1], a.dtype, 7)[0]
    exact = 0.25 * (a.long() @ b.long()).double() + source.double()
    want, eps = ACTIVATIONS[name](exact), torch.finfo(a.dtype).eps
    spoilt = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0])
    with at_arch(arch), launched(1 if config is None or config.split_k == 1 else 2):
        got = launch.addmm(a, b, launch.Epilogue(0.25, 1, source, name), config=config)
        layout = "N" if config is not None and config.path == "tma" else "T"
        out, pre = (embed(torch.full_like(got, float("nan")), layout) for _ in range(2))
        assert launch.addmm(a, b, launch.Epilogue(0.25, 1, source, name, pre), out, config=config) is out
        assert_same_bits(pre, exact.to(a.dtype))
        assert_same_bits(out, got)
        for x in (out, pre):
            assert x._base is not None
            x.fill_(float("nan"))
            assert bool(x._base.isnan().all()), "written outside of C"
        special = spoilt.to(a.dtype).repeat(sizes[1])[: sizes[1]]
        with np.errstate(invalid="ignore", over="ignore"):
            odd = launch.addmm(torch.zeros_like(a), b, launch.Epilogue(1, 1, special, name), config=config)
    exponent = exact**2 + exact.abs() ** 3 / 4  # what is rounded in it is a factor of the result
    cancelled = exact.abs() * eps if dtype == "fp64" else 0
    allowed = eps * (4 + exponent) * want.abs() + 4 * cancelled + torch.finfo(a.dtype).tiny
    worst = (got.double() - want).abs() - allowed
    assert bool((worst <= 0).all()), f"{name} {dtype}: {worst.max()}"
    torch.testing.assert_close(odd[0], ACTIVATIONS[name](special.double()).to(a.dtype), equal_nan=True)


def check_activation_arguments() -> None:
    """A launch for each activation, and errors for what cannot be written or activated."""
    from matmul_grad.kernels.gpu import launch

    a, b = torch.full((8, 8), -0.5), torch.ones(8, 8)
    found = [float(launch.addmm(a, b, launch.Epilogue(activation=name))[0, 0]) for name in ("relu", "tanh", "")]
    assert found[0] == 0 and abs(found[1] - np.tanh(-4)) < 1e-6 and found[2] == -4
    with pytest.raises(ValueError, match="must have the layout of the result"):
        launch.addmm(a, b, launch.Epilogue(activation="relu", pre=torch.empty(8, 8).t()))
    with pytest.raises(ValueError, match="nothing to activate"):
        launch.addmm(a[:, :0], b[:0], launch.Epilogue(activation="relu"))


def on(path: str, sizes: tuple, dtype: str, name: str = "gelu") -> None:
    check_activation(sizes, dtype, None if path == "vector" else configs()[path], name)


CASES: dict[str, Callable[[], None]] = {
    **{name: partial(on, "pointers", (9, 10, 11), "fp32", name) for name in ACTIVATIONS},
    **{
        f"{path}-{dtype}-{sizes[0]}": partial(on, path, sizes, dtype)
        for path, dtype, sizes in (
            ("pointers", "fp64", (9, 10, 11)),
            ("pointers-split", "fp16", (72, 24, 232)),
            ("tma", "bf16", (72, 40, 72)),
            ("tma-halves", "fp16", (72, 40, 72)),
            ("tma-halves", "fp16", (71, 39, 72)),
            ("tma-quarters", "fp16", (71, 199, 24)),
            ("tma-split", "fp16", (72, 24, 232)),
            ("vector", "fp32", (70, 1, 40)),
        )
    },
    "arguments": check_activation_arguments,
}


@pytest.mark.parametrize("case", CASES)
def test_interpreted(case: str, interpreter: CaseProcess) -> None:
    assert_no_complaint(interpreter.complaint(case))


if __name__ == "__main__":
    serve_cases(CASES)
