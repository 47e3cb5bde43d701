"""Compile the kernel for a GPU that need not be there, and read from the machine code what it costs."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .config import ALIGNMENT, SHORT_NAMES, Problem, Target, TileConfig
from .gemm import constants, gemm, options

# Shared bytes that one block may have, by compute capability (CUDA programming guide).
SHARED_BYTES = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
MULTIPROCESSORS = {80: 108, 86: 84, 89: 128, 90: 132, 100: 148, 120: 170}

COPY = re.compile(r"cp\.async\.c[ag]\.[^;]*, 0x(\w+),")
LOAD = re.compile(r"ld\.global[\w.]*?(?:\.v(\d))?\.[bfsu](\d+)")
INSTRUCTION = re.compile(r"\b(tcgen05\.mma|wgmma\.mma_async|mma\.sync|fma\.rn)\.([\w.:]+)")


@dataclass(frozen=True)
class CompiledReport:
    """What one compiled kernel is: its name, and what a thread or a block of it takes.

    registers: a thread. spills: bytes of stack a thread, all of them spills, since the kernel has no arrays.
    shared: bytes a block. instruction: the PTX instruction that multiplies. load_bytes: the narrowest load
    of an operand.
    """

    name: str
    registers: int
    spills: int
    shared: int
    instruction: str
    load_bytes: int


def target_of(arch: int) -> Target:
    """A GPU of a compute capability as sold in its largest common form; for choosing tiles without one."""
    return Target(arch, MULTIPROCESSORS[arch], SHARED_BYTES[arch])


def compile_for(problem: Problem, config: TileConfig, arch: int) -> CompiledReport:
    """Compile the kernel for one problem, tile and compute capability; needs no GPU.

    Arguments are specialised as a launch with `problem.aligned` and `problem`'s layouts would have them:
    adjacent strides are the constant 1, the other sizes and strides divisible by 16 if aligned.
    """
    if not isinstance(gemm, triton.JITFunction):
        raise RuntimeError("the kernel cannot be compiled under TRITON_INTERPRET=1")
    target = GPUTarget("cuda", arch, 32)
    kernel = triton.compile(source(problem, config), target=target, options=options(config))
    registers, spills = resources(kernel.asm["cubin"])
    return CompiledReport(
        name=kernel.metadata.name,
        registers=registers,
        spills=spills,
        shared=kernel.metadata.shared,
        instruction=multiply_instruction(kernel.asm["ptx"]),
        load_bytes=narrowest_load(kernel.asm["ptx"]),
    )


def source(problem: Problem, config: TileConfig) -> ASTSource:
    """The kernel with its argument types, constants and divisibilities filled in."""
    values: dict[str, Any] = constants(problem, config)
    adjacent = {"a_row": problem.a == "T", "a_col": problem.a == "N"}
    adjacent |= {"b_row": problem.b == "T", "b_col": problem.b == "N", "c_col": True}
    values |= {name: 1 for name, is_one in adjacent.items() if is_one}
    pointer_type = f"*{SHORT_NAMES[problem.dtype]}"
    signature, divisible = {}, {}
    for position, name in enumerate(gemm.arg_names):
        pointer = name.endswith("_ptr")
        signature[name] = "constexpr" if name in values else pointer_type if pointer else "i32"
        if name not in values and (pointer or problem.aligned):
            divisible[(position,)] = [["tt.divisibility", ALIGNMENT]]
    return ASTSource(gemm, signature, constexprs=values, attrs=divisible)


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
    for family in ("tcgen05.mma", "wgmma.mma_async", "mma.sync", "fma.rn"):
        if family in found:
            return found[family]
    raise RuntimeError("no multiplication in the compiled kernel")


def narrowest_load(ptx: str) -> int:
    """Bytes of the narrowest global load, asynchronous copies included; 16 is the widest."""
    copies = [int(match[1], 16) for match in COPY.finditer(ptx)]
    loads = [int(match[1] or 1) * int(match[2]) // 8 for match in LOAD.finditer(ptx)]
    return min(copies + loads)
