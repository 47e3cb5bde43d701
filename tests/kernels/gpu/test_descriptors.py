"""Descriptors kept by address: Triton's own launcher and metadata, on a driver that only notes what it is given."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import aot
import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver

from matmul_grad.kernels.gpu import run
from matmul_grad.kernels.gpu.arguments import Strides
from matmul_grad.kernels.gpu.choose import TMA_TILES
from matmul_grad.kernels.gpu.config import Problem
from matmul_grad.kernels.gpu.gemm import gemm
from matmul_grad.kernels.gpu.plan import Plan, backward_plan, plans
from matmul_grad.kernels.gpu.run import Runner

pytestmark = pytest.mark.skipif(
    not isinstance(gemm, aot.triton.JITFunction), reason="TRITON_INTERPRET is set for the whole session"
)

TYPES = dict.fromkeys(("a", "b", "c", "grad", "da", "db"), "bf16")
TARGET = aot.target_of(90)


class Utils:
    """Stands for the driver's functions: a map is what it was encoded from, a launch is noted."""

    def __init__(self) -> None:
        self.encoded: list[tuple[Any, ...]] = []
        self.launched: list[list[Any]] = []

    def fill_tma_descriptor_tiled(self, *values: Any) -> tuple[Any, ...]:
        self.encoded.append(tuple(tuple(x) if isinstance(x, list) else x for x in values))
        return self.encoded[-1]

    fill_tma_descriptor = fill_tma_descriptor_tiled

    def launch(self, *arguments: Any) -> None:
        *first, last = arguments
        self.launched.append([*first, *last] if isinstance(last, list | tuple) else [*arguments])


@pytest.fixture
def utils(monkeypatch: pytest.MonkeyPatch) -> Utils:
    utils = Utils()
    active = SimpleNamespace(utils=utils, allocate_default_profile_scratch=lambda *_: None)
    monkeypatch.setattr(triton.runtime.driver, "_active", active)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda _: 7, raising=False)
    return utils


def launcher_of(kernel: Any, utils: Utils, **more: Any) -> Any:
    """Triton's launcher of a kernel, but for the C module that some versions compile for it."""
    launcher: Any = object.__new__(driver.CudaLauncher)
    fixed = ("global_scratch_size", "global_scratch_align", "profile_scratch_size", "profile_scratch_align")
    vars(launcher).update(dict.fromkeys(fixed, 0))
    launcher.launch = driver.wrap_handle_tensordesc(utils.launch, kernel.src.signature, kernel.metadata.tensordesc_meta)
    launcher.num_ctas, launcher.launch_cooperative_grid, launcher.launch_pdl = 1, False, False
    launcher.arg_annotations, launcher.kernel_signature, launcher.gsan_enabled = (), b"", False
    return launcher


def runner_of(plan: Plan, utils: Utils) -> Runner:
    """A runner whose kernel is compiled, and not launched the first time."""
    kernel = triton.compile(aot.source(plan, TYPES, True), target=GPUTarget("cuda", 90, 32), options=plan.options)
    compiled = SimpleNamespace(
        function=11, packed_metadata=b"", run=launcher_of(kernel, utils), metadata=kernel.metadata
    )

    class Jit:
        arg_names = plan.kernel.arg_names

        def __getitem__(self, grid: Any) -> Callable[..., Any]:
            return lambda *arguments, **options: compiled

    return Runner(Plan(Jit(), plan.programs, plan.arguments, plan.constants, plan.options))


def product(m: int, n: int, k: int, batch: int = 1) -> Plan:
    problem = Problem(m, n, k, "bfloat16", "N", "N", tma=True, batch=batch)
    strides = [Strides(cols, 1, rows * cols * (batch > 1)) for rows, cols in ((m, k), (k, n), (m, n))]
    return plans(problem, TMA_TILES[-1], TARGET, (strides[0], strides[1], strides[2]), store_tma=True)[0]


def backward() -> Plan:
    strides = (Strides(256, 1), Strides(256, 1), Strides(256, 1))
    return backward_plan(Problem(256, 256, 256, "bfloat16", tma=True), TMA_TILES[2], TARGET, strides)


def bf16(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.bfloat16)


def tensors(*names: str) -> dict[str, torch.Tensor]:
    return {name: bf16(2, 256, 256) for name in names}


@pytest.mark.parametrize(
    ("plan", "names"),
    [(product(256, 256, 256), "a b c"), (product(128, 256, 64, 2), "a b c"), (backward(), "a b grad da db")],
    ids=["product", "batch", "backward"],
)
def test_kernels_are_given_what_tritons_own_launcher_gives_them(
    plan: Plan, names: str, utils: Utils, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = tensors(*names.split())
    call = runner_of(plan, utils)
    call(given)
    for _ in range(2):
        call(given)
    monkeypatch.setattr(run, "launcher_of_encoded", lambda *_: None)
    usual = runner_of(plan, utils)
    usual(given)
    usual(given)
    first, second, expected = utils.launched
    assert first == second == expected
    maps = [x for x in expected if isinstance(x, tuple) and x in utils.encoded]
    assert len(maps) == len(utils.encoded) / 2  # ours once, Triton's launcher once
    assert {x[0] for x in maps} == {x.data_ptr() for x in given.values()}


def test_an_address_is_encoded_once_and_another_one_anew(utils: Utils) -> None:
    call, given = runner_of(product(256, 256, 256), utils), tensors("a", "b", "c")
    for _ in range(3):
        call(given)
    assert [x[0] for x in reversed(utils.encoded)] == [given[name].data_ptr() for name in "abc"]
    moved = given | tensors("b")
    call(moved)
    call(given)
    assert [x[0] for x in utils.encoded[3:]] == [moved["b"].data_ptr()]
    assert utils.launched[-1] == utils.launched[0] != utils.launched[-2]


def test_an_address_that_another_shape_uses_is_encoded_anew(utils: Utils) -> None:
    """As where memory is freed and used again: only the plan tells what is there now."""
    shapes = (256, 256, 256), (128, 256, 256), (256, 512, 128)
    given = tensors("a", "b", "c")
    for count, shape in enumerate(shapes, 1):
        call = runner_of(product(*shape), utils)
        for _ in range(2):
            call(given)
        assert len(utils.encoded) == 3 * count
    sizes = {x[0]: set() for x in utils.encoded}
    for address, *rest in utils.encoded:
        sizes[address].add(tuple(rest))
    assert [len(sizes[given[name].data_ptr()]) for name in "abc"] == [3, 2, 3]


def test_a_launcher_of_another_kind_encodes_by_itself(utils: Utils, monkeypatch: pytest.MonkeyPatch) -> None:
    call = runner_of(product(256, 256, 256), utils)
    monkeypatch.setattr(inspect, "getclosurevars", lambda _: SimpleNamespace(nonlocals={}))
    given = tensors("a", "b", "c")
    for _ in range(3):
        call(given)
    assert len(utils.encoded) == 6 and utils.launched[0] == utils.launched[1]
