"""A record gives the driver what the compiled kernel takes: parameter by parameter, in size and in order."""

from __future__ import annotations

import re
from types import SimpleNamespace

import aot
import pytest
import triton
from triton.backends.compiler import GPUTarget

from matmul_grad.kernels.gpu.arguments import Strides
from matmul_grad.kernels.gpu.choose import candidates
from matmul_grad.kernels.gpu.config import Problem
from matmul_grad.kernels.gpu.epilogue import Epilogue
from matmul_grad.kernels.gpu.gemm import gemm
from matmul_grad.kernels.gpu.launch_record import Constant, Descriptor, LaunchRecord, Parameter, Pointer, record_of
from matmul_grad.kernels.gpu.plan import Plan, plans

pytestmark = pytest.mark.skipif(
    not isinstance(gemm, aot.triton.JITFunction), reason="TRITON_INTERPRET is set for the whole session"
)

TYPES = {"a": "bf16", "b": "bf16", "c": "bf16", "source": "bf16", "work": "fp32"}


def plans_of(m: int, n: int, k: int, letters: str, arch: int, path: str, parts: bool = False) -> list[Plan]:
    a, b = ((Strides(cols, 1) if x == "N" else Strides(1, rows)) for x, rows, cols in zip(letters, (m, k), (k, n)))
    problem = Problem(m, n, k, "bfloat16", letters[0], letters[1], "ieee", True, arch >= 90)
    target = aot.target_of(arch)
    tile = next(x for x in candidates(problem, target) if x.path == path and (x.split_k > 1) == parts)
    return plans(problem, tile, target, (a, b, Strides(n, 1)), store_tma=True)


CASES = {
    "pointers": plans_of(256, 512, 1024, "NN", 80, "pointers"),
    "vector": plans_of(1, 512, 1024, "NN", 90, "vector"),
    "tma": plans_of(256, 512, 1024, "NN", 90, "tma"),
    "tma-transposed": plans_of(256, 512, 1024, "TT", 90, "tma"),
    "tma-sm_100": plans_of(256, 512, 1024, "NT", 100, "tma"),
    "parts": plans_of(64, 128, 65536, "NN", 90, "tma", parts=True),
}


def compiled(plan: Plan, arch: int) -> SimpleNamespace:
    """What Triton makes of a launch, and a handle, which only a GPU would give."""
    kernel = triton.compile(aot.source(plan, TYPES, True), target=GPUTarget("cuda", arch, 32), options=plan.options)
    return SimpleNamespace(metadata=kernel.metadata, src=kernel.src, function=7, ptx=kernel.asm["ptx"])


def bytes_of_parameters(ptx: str) -> list[int]:
    """The sizes of a kernel's parameters, as its assembly declares them."""
    declared = ptx[ptx.index(".entry") :].split(")")[0]
    sizes = []
    for match in re.finditer(r"\.param ([^,)]+)", declared):
        array = re.search(r"\.b8 \w+\[(\d+)\]", match[1])
        number = re.search(r"\.[ubsf](\d+)", match[1])
        assert array or number, match[0]
        sizes.append(int(array[1]) if array else int(number[1]) // 8)
    return sizes


def size_of(parameter: Parameter, declared: int) -> int:
    if isinstance(parameter, Descriptor):
        return 128
    if isinstance(parameter, Pointer):
        return 8
    assert -(2 ** (8 * declared - 1)) <= parameter.value < 2 ** (8 * declared - 1)
    return declared


def made(name: str) -> list[tuple[Plan, LaunchRecord, SimpleNamespace]]:
    arch = 80 if name == "pointers" else 100 if name.endswith("100") else 90
    found = []
    for plan in CASES[name]:
        kernel = compiled(plan, arch)
        written = record_of(plan, kernel)
        assert written is not None
        found.append((plan, written, kernel))
    return found


@pytest.mark.parametrize("name", CASES)
def test_parameters_match_those_that_the_kernel_declares(name: str) -> None:
    for plan, written, kernel in made(name):
        declared = bytes_of_parameters(kernel.ptx)
        assert len(declared) == len(written.parameters)
        assert [size_of(x, size) for x, size in zip(written.parameters, declared, strict=True)] == declared
        assert written.programs == plan.programs and written.function == 7
        assert written.threads == 32 * plan.options["num_warps"] and written.shared == kernel.metadata.shared


def test_pointers_and_constants_are_in_the_order_of_the_arguments() -> None:
    ((_, written, _),) = made("pointers")
    names = [x.name for x in written.parameters if isinstance(x, Pointer)]
    numbers = [x.value for x in written.parameters if isinstance(x, Constant)]
    assert names == ["a", "b", "c"]
    assert numbers == [256, 512, 1024, 1024, 0, 512, 0, 512, 0, 0, 0]  # sizes; strides but those of 1; scratch


def test_descriptors_are_as_the_driver_encodes_them() -> None:
    """cuTensorMapEncodeTiled takes the innermost dimension first, and strides in bytes, of all but that."""
    ((plan, written, _),) = made("tma-transposed")
    a, b, c = (x for x in written.parameters if isinstance(x, Descriptor))
    blocks = plan.constants
    assert (a.name, a.sizes, a.strides) == ("a", (256, 1024), (512,))
    assert (b.name, b.sizes, b.strides) == ("b", (1024, 512), (2048,))
    assert (c.name, c.sizes, c.strides) == ("c", (512, 256), (1024,))
    bfloat16, swizzle_of_128_bytes = 9, 3  # of the driver's enumerations
    assert {x.element for x in (a, b, c)} == {bfloat16} and a.swizzle == swizzle_of_128_bytes
    assert a.box[0] * 2 <= 128 and a.box[1] == blocks["BLOCK_K"]


def test_split_product_has_a_record_of_each_kernel() -> None:
    (_, first, _), (_, second, _) = made("parts")
    assert "work" in {x.name for x in first.parameters if isinstance(x, Pointer)}
    assert [x.name for x in second.parameters if isinstance(x, Pointer)] == ["work", "c"]


def test_plan_with_an_epilogue_has_no_record() -> None:
    """alpha and beta change from call to call, and a record holds constants alone."""
    problem = Problem(256, 512, 1024, "bfloat16", "N", "N", "ieee", True, False)
    target, strides = aot.target_of(80), (Strides(1024, 1), Strides(512, 1), Strides(512, 1))
    tile = candidates(problem, target)[0]
    for source in (None, Strides(0, 1)):
        (plan,) = plans(problem, tile, target, strides, epilogue=Epilogue(source=source))
        assert record_of(plan, compiled(plan, 80)) is None


@pytest.mark.parametrize("unknown", ["num_ctas", "launch_pdl", "launch_cooperative_grid", "global_scratch_size"])
def test_kernel_with_unsupported_metadata_has_no_record(unknown: str) -> None:
    ((plan, _, kernel),) = made("vector")
    kernel.metadata = SimpleNamespace(**kernel.metadata._asdict() | {unknown: 2})
    assert record_of(plan, kernel) is None
