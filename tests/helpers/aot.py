"""Compile a plan for a GPU that need not be there, and read from the machine code what it costs."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from gpu_targets import TARGETS
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from matmul_grad.kernels.gpu.arguments import DescriptorArg, PointerArg, ScalarArg, is_group
from matmul_grad.kernels.gpu.config import ALIGNMENT, Target
from matmul_grad.kernels.gpu.plan import Plan

COPY = re.compile(r"cp\.async\.c[ag]\.[^;]*, 0x(\w+),")
LOAD = re.compile(r"ld\.global[\w.]*?(?:\.v(\d))?\.[bfsu](\d+)")
INSTRUCTION = re.compile(r"\b(tcgen05\.mma|wgmma\.mma_async|mma\.sync|fma\.rn)\.([\w.:]+)")


ARCHES = (80, 90, 100, 120)
TRITON = tuple(int(part) for part in triton.__version__.split(".")[:2])

# The matrix unit of each architecture; there is none for IEEE float32, and the oldest serves float64.
INSTRUCTIONS = {
    (90, "fp8"): r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k32\.f32\.(e4m3|e5m2)\.(e4m3|e5m2)",
    (100, "fp8"): r"tcgen05\.mma\.cta_group::1\.kind::f8f6f4",
    **{
        (arch, "half"): r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.(bf16\.bf16|f16\.f16)\.f32" for arch in (80, 120)
    },
    (90, "half"): r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k16\.f32\.(bf16\.bf16|f16\.f16)",
    (100, "half"): r"tcgen05\.mma\.cta_group::1\.kind::f16",
    **{(arch, "tf32"): r"mma\.sync\.aligned\.m16n8k8\.row\.col\.f32\.tf32\.tf32\.f32" for arch in (80, 120)},
    (90, "tf32"): r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k8\.f32\.tf32\.tf32",
    (100, "tf32"): r"tcgen05\.mma\.cta_group::1\.kind::tf32",
    **{(arch, "fp32"): r"fma\.rn\.f32(x2)?" for arch in ARCHES},
    **{(arch, "fp64"): r"mma\.sync\.aligned\.m\d+n8k\d+\.row\.col\.f64\.f64\.f64\.f64" for arch in ARCHES},
    # Before 3.8, Triton does not use the float64 matrix unit of sm_100; sm_120 is without in some.
    **({(100, "fp64"): r"fma\.rn\.f64"} if TRITON < (3, 8) else {}),
    (120, "fp64"): r"fma\.rn\.f64|mma\.sync\.aligned\.m\d+n8k\d+\.row\.col\.f64\.f64\.f64\.f64",
}


@dataclass(frozen=True)
class CompiledReport:
    """What one compiled kernel is: its name, and what a thread or a block of it takes.

    registers: a thread. spills: bytes of stack a thread, all of them spills, since the kernels have no arrays.
    shared: bytes a block. instruction: the PTX instruction that multiplies, "" for none. load_bytes: the narrowest
    load of an operand, 0 where only TMA loads. copy_bytes: the widths of asynchronous copies into shared memory. ttgir:
    Triton's last form before machine code, with its loops.
    """

    name: str
    registers: int
    spills: int
    shared: int
    instruction: str
    load_bytes: int
    copy_bytes: set[int]
    ttgir: str = field(repr=False)


def target_of(arch: int) -> Target:
    """The GPU of TARGETS that has this compute capability."""
    return TARGETS[f"sm{arch}"]


def compile_for(plan: Plan, types: dict[str, str], arch: int, *, aligned: bool = True) -> CompiledReport:
    """Compile a plan for one compute capability; needs no GPU.

    types: the short name of each operand's dtype. aligned: addresses divide by 16. Arguments are specialised as
    Triton's launcher would: 1 is a constant, and what divides by 16 is known to.
    """
    if not isinstance(plan.kernel, triton.JITFunction):
        raise RuntimeError("the kernel cannot be compiled under TRITON_INTERPRET=1")
    target = GPUTarget("cuda", arch, 32)
    kernel = triton.compile(source(plan, types, aligned), target=target, options=plan.options)
    registers, spills = resources(kernel.asm["cubin"])
    return CompiledReport(
        name=kernel.metadata.name,
        registers=registers,
        spills=spills,
        shared=kernel.metadata.shared,
        instruction=multiply_instruction(kernel.asm["ptx"]),
        load_bytes=narrowest_load(kernel.asm["ptx"]),
        copy_bytes={int(match[1], 16) for match in COPY.finditer(kernel.asm["ptx"])},
        ttgir=kernel.asm["ttgir"],
    )


def source(plan: Plan, types: dict[str, str], aligned: bool) -> ASTSource:
    """The kernel with its argument types, constants and divisibilities filled in, as Triton's launcher does."""
    constants: dict[str | tuple[int, ...], Any] = dict(plan.constants)
    divisible = {}

    def type_at(path: tuple[int, ...], value: Any) -> Any:
        if is_group(value):
            return type(value)._make(type_at((*path, index), field) for index, field in enumerate(value))
        if value is None or (isinstance(value, int) and value == 1):
            constants[path] = value
            return "constexpr"
        if aligned if isinstance(value, PointerArg) else isinstance(value, int) and value % ALIGNMENT == 0:
            divisible[path] = [["tt.divisibility", ALIGNMENT]]
        return type_of(value, types)

    names = plan.kernel.arg_names
    types_of_arguments = [type_at((position,), value) for position, value in enumerate(plan.arguments)]
    types_of_constants = ["constexpr"] * (len(names) - len(plan.arguments))
    signature = dict(zip(names, [*types_of_arguments, *types_of_constants], strict=True))
    return ASTSource(plan.kernel, signature, constexprs=constants, attrs=divisible)


def type_of(value: Any, types: dict[str, str]) -> str:
    """Triton's name for the type of an argument.

    >>> type_of(PointerArg("a"), {"a": "bf16"}), type_of(2**31, {})
    ('*bf16', 'i64')
    """
    if isinstance(value, PointerArg):
        return f"*{types[value.name]}"
    if isinstance(value, DescriptorArg):
        return f"tensordesc<{types[value.name]}{list(value.block)}>"
    return "i32" if isinstance(value, ScalarArg) or -(2**31) <= value < 2**31 else "i64"


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers and stack bytes a thread, read by the cuobjdump that Triton's wheel carries."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(path)]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"no resource usage in {usage!r}")
    return int(found[1]), int(found[2])


def multiply_instruction(ptx: str) -> str:
    """The instruction that multiplies, that of the newest matrix unit if there are several."""
    found = {match[1]: match[0] for match in INSTRUCTION.finditer(ptx)}
    families = ("tcgen05.mma", "wgmma.mma_async", "mma.sync", "fma.rn")
    return next((found[family] for family in families if family in found), "")


def narrowest_load(ptx: str) -> int:
    """Bytes of the narrowest global load, asynchronous copies included; 16 is the widest."""
    copies = [int(match[1], 16) for match in COPY.finditer(ptx)]
    loads = [int(match[1] or 1) * int(match[2]) // 8 for match in LOAD.finditer(ptx)]
    return min(copies + loads, default=0)
