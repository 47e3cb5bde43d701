"""What reaches Triton and, from the second call on, the driver: by a kernel that notes how it is called."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton

from matmul_grad.kernels.gpu import run
from matmul_grad.kernels.gpu.arguments import DescriptorArg, Matrix, PointerArg, ScalarArg, ScalePtrs
from matmul_grad.kernels.gpu.plan import Plan
from matmul_grad.kernels.gpu.run import Runner


class Kernel:
    """Stands for Triton's JIT function: launches on indexing and calling, and gives what it compiled."""

    arg_names = ("a_desc", "b", "scales", "m", "none", "BLOCK", "NAME")

    def __init__(self) -> None:
        self.slow: list[Any] = []
        self.fast: list[Any] = []

    def __getitem__(self, grid: tuple[int]) -> Any:
        def launch(*arguments: Any, **options: Any) -> Any:
            self.slow.append((grid, arguments, options))
            return SimpleNamespace(function="function", packed_metadata="metadata", run=lambda *x: self.fast.append(x))

        return launch


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[Kernel]:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: f"stream of {index}", raising=False)
    yield Kernel()


def runner(kernel: Kernel) -> Runner:
    described = DescriptorArg("a", (8, 16), (16, 1), (8, 8))
    arguments = (described, Matrix(PointerArg("b"), 4, 1), ScalePtrs(), 7, None)
    return Runner(Plan(kernel, 5, arguments, {"NAME": "name", "BLOCK": 32}, {"num_warps": 4}))


def tensors() -> dict[str, torch.Tensor]:
    return {"a": torch.zeros(8, 16), "b": torch.ones(4)}


def test_first_call_compiles_and_later_calls_go_to_the_driver(kernel: Kernel) -> None:
    call, first, second = runner(kernel), tensors(), tensors()
    call(first)
    ((grid, arguments, options),) = kernel.slow
    assert (grid, options, kernel.fast) == ((5,), {"num_warps": 4}, [])
    assert arguments[0].base is first["a"] and arguments[0].block_shape == [8, 8] and arguments[0].shape == [8, 16]
    assert arguments[1] == Matrix(first["b"], 4, 1) and arguments[1].ptr is first["b"]
    assert arguments[2:] == (ScalePtrs(), 7, None, 32, "name")
    call(second)
    ((*head, described, matrix, scales, m, none, block, name),) = kernel.fast
    assert head == [5, 1, 1, "stream of 3", "function", "metadata", None, None, None]
    assert {name: getattr(described, name) for name in vars(arguments[0]) if name != "base"} == {
        name: value for name, value in vars(arguments[0]).items() if name != "base"
    }
    assert described.base is second["a"] and matrix.ptr is second["b"] and matrix[1:] == (4, 1, None)
    assert (scales, m, none, block, name) == (ScalePtrs(), 7, None, 32, "name")
    assert len(kernel.slow) == 1


def test_scalars_are_those_of_the_call(kernel: Kernel) -> None:
    arguments = (PointerArg("b"), ScalarArg("alpha_low"), ScalarArg("alpha_high"), None, None)
    call = Runner(Plan(kernel, 1, arguments, {"NAME": "name", "BLOCK": 32, "none": None}, {}))
    for alpha in (1, 2, 3):
        call({"b": torch.ones(4), "alpha_low": alpha, "alpha_high": -alpha})
    (((_, (_, *slow), _),), fast) = kernel.slow, kernel.fast
    assert [slow[:3], *(one[-6:-3] for one in fast)] == [[1, -1, None], (2, -2, None), (3, -3, None)]


def test_calls_go_through_the_jit_while_a_profiler_has_hooks(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    call = runner(kernel)
    call(tensors())
    for hook in (print, SimpleNamespace(calls=[print])):
        monkeypatch.setattr(triton.knobs.runtime, "launch_exit_hook", hook)
        assert run.has_profiler_hooks()
        call(tensors())
    assert (len(kernel.slow), len(kernel.fast)) == (3, 0)
    monkeypatch.setattr(triton.knobs.runtime, "launch_exit_hook", SimpleNamespace(calls=[]))
    call(tensors())
    assert len(kernel.fast) == 1
