"""Plans: no kernel has more than 25 parameters, and what the tests compile is what Triton's launcher would."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import aot
import pytest
import torch
import triton
from scripts import ROOT
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import create_function_from_signature

from matmul_grad.kernels.gpu.arguments import PointerArg, ScalarArg, Strides
from matmul_grad.kernels.gpu.backward import backward_tma
from matmul_grad.kernels.gpu.config import Problem, TileConfig, is_valid
from matmul_grad.kernels.gpu.convolution_plan import (
    Convolution,
    convolution_plans,
    forward_product,
    input_gradient_product,
)
from matmul_grad.kernels.gpu.convolution_plan import Tensor as Shape
from matmul_grad.kernels.gpu.epilogue import SCALARS, Epilogue
from matmul_grad.kernels.gpu.gemm import gemm
from matmul_grad.kernels.gpu.grouped_plan import GroupedProduct, grouped_plan
from matmul_grad.kernels.gpu.groups import gemm_groups
from matmul_grad.kernels.gpu.groups_tma import gemm_groups_tma
from matmul_grad.kernels.gpu.patches import gemm_patches
from matmul_grad.kernels.gpu.plan import Plan, options, plans
from matmul_grad.kernels.gpu.reduce import reduce
from matmul_grad.kernels.gpu.tma import gemm_tma
from matmul_grad.kernels.gpu.vector import matvec

# Of CUDA: programs of a grid along x; registers of a block, of which no thread has more than 255.
MOST_ALONG_X, REGISTERS = 2**31 - 1, 65536

KERNELS = (gemm, gemm_tma, matvec, reduce, backward_tma, gemm_patches, gemm_groups, gemm_groups_tma)
FOLDER = ROOT / "kernels" / "gpu"
TARGET = GPUTarget("cuda", 80, 32)

compiles = pytest.mark.skipif(
    not isinstance(gemm, triton.JITFunction), reason="TRITON_INTERPRET is set for the whole session"
)


def test_every_module_is_imported_by_the_package() -> None:
    """A wheel holds every file of kernels/gpu: what only tests use is not among them."""
    paths = [path for name in ("kernels/gpu", "matmul_grad", "bench") for path in (ROOT / name).rglob("*.py")]
    modules = sorted(path for path in FOLDER.glob("*.py") if path.stem != "__init__")
    assert len(modules) > 10
    for module in modules:
        name = module.stem
        imported = re.compile(rf"from [\w.]*\.{name} import |from [\w.]*(gpu|\.) import (.*\b)?{name}\b")
        assert any(imported.search(path.read_text("utf-8")) for path in paths if path != module), name


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.__name__)
def test_kernels_have_at_most_25_parameters(kernel: Any) -> None:
    assert len(kernel.arg_names) <= 25


@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("path", ["pointers", "tma"])
def test_batches_may_have_more_products_than_a_grid_has_along_y(path: str, splits: int) -> None:
    batch, n, k = 70_000, 4, 4096
    tile = TileConfig(64, 64, 64, 2, 4, split_k=splits, path=path)
    problem = Problem(n, n, k, "bfloat16", tma=True, batch=batch)
    target, strides = aot.target_of(90), (Strides(k, 1, n * k), Strides(n, 1, n * k), Strides(n, 1, n * n))
    assert is_valid(tile, problem, target)
    made = plans(problem, tile, target, strides, store_tma=True)
    assert len(made) == (1 if splits == 1 else 2)
    assert [plan.programs for plan in made] == [batch * splits, batch][: len(made)]
    assert all(plan.programs <= MOST_ALONG_X for plan in made)


def test_no_kernel_reads_another_dimension_of_the_grid() -> None:
    """Along y and z a grid has at most 65,535 programs."""
    texts = [path.read_text("utf-8") for path in FOLDER.glob("*.py")]
    used = {call for text in texts for call in re.findall(r"(?:program_id|num_programs)\(\w*\)", text)}
    assert used == {"program_id(0)", "num_programs(0)"}


@pytest.mark.parametrize("warps", [1, 2, 4, 8, 16])
def test_a_block_has_no_more_registers_than_there_are(warps: int) -> None:
    most = options(TileConfig(64, 64, 16, 2, warps))["maxnreg"]
    assert most == min(255, REGISTERS // (32 * warps)) and most * 32 * warps <= REGISTERS


def functions() -> Iterator[tuple[str, ast.FunctionDef]]:
    for path in sorted(FOLDER.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                yield f"{path.name}: {node.name}", node


def test_functions_of_the_host_have_at_most_8_parameters() -> None:
    """Of the functions that Triton compiles, one that is inlined may have more: constants of its caller."""
    host = {
        name: node
        for name, node in functions()
        if not any("triton.jit" in ast.unparse(decorator) for decorator in node.decorator_list)
    }
    counts = {name: len([*x.args.posonlyargs, *x.args.args, *x.args.kwonlyargs]) for name, x in host.items()}
    assert len(counts) > 50
    assert {name: count for name, count in counts.items() if count > 8} == {}


@pytest.fixture
def specialise(monkeypatch: pytest.MonkeyPatch) -> Any:
    """How Triton's launcher specialises the arguments of a call, for a GPU that is not there."""
    driver = SimpleNamespace(get_current_target=lambda: TARGET, get_current_device=lambda: 0)
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    backend = triton.compiler.make_backend(TARGET)

    def types_constants_and_attributes(plan: Plan, arguments: list[Any]) -> tuple[Any, ...]:
        kernel, options = plan.kernel, {"debug": False, **plan.options}
        constants = [plan.constants[name] for name in kernel.arg_names[len(plan.arguments) :]]
        bind = create_function_from_signature(kernel.signature, kernel.params, backend)
        bound, found, excess = bind(*arguments, *constants, **options)
        _, signature, constexprs, attributes = kernel._pack_args(backend, options, bound, found, excess)
        return signature, constexprs, {path: known for path, known in attributes.items() if known}

    return types_constants_and_attributes


def filled(value: Any, tensor: Tensor) -> Any:
    """An argument of a call: tensors that are aligned, and numbers that are divisible by 16."""
    if isinstance(value, PointerArg):
        return tensor
    if isinstance(value, ScalarArg):
        return 32
    if isinstance(value, tuple):
        return type(value)(*(filled(field, tensor) for field in value))
    return value


def plan_of(path: str, epilogue: Epilogue | None, splits: int = 1) -> Plan:
    n, tile = 4096, TileConfig(64, 64, 16, 2, 4, split_k=splits)
    if path == "vector":
        tile = TileConfig(16, 1, 256, 2, 4, path="vector")
    problem = Problem(n, 1 if path == "vector" else n, n, "float32", "N", "T")
    strides = Strides(n, 1), Strides(1, n), Strides(problem.n, 1)
    return plans(problem, tile, aot.target_of(80), strides, epilogue=epilogue)[-1]


@compiles
@pytest.mark.parametrize("source", [Strides(4096, 1), Strides(0, 1), Strides(1, 0), None], ids=str)
@pytest.mark.parametrize("path", ["gemm", "vector", "reduce"])
def test_arguments_are_specialised_as_by_the_launcher(path: str, source: Strides | None, specialise: Any) -> None:
    """Field by field of a tuple: types, constants and divisibility, with and without an epilogue."""
    for epilogue in (None, Epilogue(source=source), Epilogue(1, 1, source, "gelu", True)):
        plan = plan_of(path, epilogue, splits=4 if path == "reduce" else 1)
        found = specialise(plan, [filled(x, torch.zeros(64)) for x in plan.arguments])
        ahead = aot.source(plan, dict.fromkeys(("a", "b", "c", "work", "source", "pre"), "fp32"), True)
        assert (ahead.signature, ahead.constants, ahead.attrs) == found


@compiles
@pytest.mark.parametrize("stride", [1, 2])
def test_arguments_of_convolutions_are_specialised_as_by_the_launcher(stride: int, specialise: Any) -> None:
    conv, image = Convolution((stride,), (1,), (1,)), Shape((2, 24, 33), (24 * 33, 33, 1))
    filters, result = Shape((48, 24, 3), (72, 3, 1)), Shape((2, 48, 17), (48 * 17, 17, 1))
    products = forward_product(conv, image, filters, result), input_gradient_product(conv, result, filters, image)
    for product in products:
        tile = TileConfig(64, 64, 16, 2, 4)
        (plan,) = convolution_plans(product, product.problem("float32", "ieee", False), tile, bias=True)
        found = specialise(plan, [filled(x, torch.zeros(64)) for x in plan.arguments])
        ahead = aot.source(plan, dict.fromkeys(("a", "b", "c", "source"), "fp32"), True)
        assert (ahead.signature, ahead.constants, ahead.attrs) == found


@compiles
@pytest.mark.parametrize("groups", [1, 16])
@pytest.mark.parametrize("by_steps", [False, True])
def test_arguments_of_groups_are_specialised_as_by_the_launcher(by_steps: bool, groups: int, specialise: Any) -> None:
    product = GroupedProduct(40, 48, 64, groups, by_steps, "float32")
    strides = Strides(64, 1), Strides(48, 1, 0 if by_steps else 64 * 48), Strides(48, 1, 40 * 48 if by_steps else 0)
    plan = grouped_plan(product, TileConfig(64, 64, 16, 2, 4), aot.target_of(80), strides)
    found = specialise(plan, [filled(x, torch.zeros(64)) for x in plan.arguments])
    ahead = aot.source(plan, dict.fromkeys(("a", "b", "c", "offs"), "fp32"), True)
    assert (ahead.signature, ahead.constants, ahead.attrs) == found


@compiles
def test_no_value_of_alpha_or_beta_is_compiled_anew(specialise: Any) -> None:
    """Not 0 or 1, which Triton makes constants of, nor multiples of 16. In a tuple they would be."""
    plan = plan_of("gemm", Epilogue(source=Strides(4096, 1)))
    first = len(plan.arguments) - len(SCALARS)
    seen = []
    for numbers in ((0, 1, 16, 17), (2, 3, 5, 7), (1, 1, 1, 1)):
        arguments = [filled(x, torch.zeros(64)) for x in plan.arguments[:first]]
        seen.append(specialise(plan, [*arguments, *numbers]))
    assert seen[0] == seen[1] == seen[2]
