"""The machine code of the microkernels: the multiply-adds of each tile, and no spilled register."""

from __future__ import annotations

import functools
import re

import pytest

from matmul_grad.kernels.cpu import build, host
from matmul_grad.kernels.cpu.config import BlockConfig, Cpu, choose
from matmul_grad.kernels.cpu.dtype_kernels import make_kernels
from matmul_grad.kernels.cpu.levels import LEVELS, LINUX_X86, Machine
from matmul_grad.kernels.cpu.microkernel import UNROLL

X86 = [isa for isa in host.host_isas() if isa != "neon"]
REGISTER = {"avx512": "zmm", "avx2": "ymm", "generic": "xmm"}


@functools.cache
def assembly(block: BlockConfig) -> str:
    """Of all kernels."""
    machine, kernels = host.machine(block.isa), make_kernels(block)
    module = build.to_module(kernels, machine, ("matmul_grad_config",))
    return machine.llvm().emit_assembly(module)


def loops(text: str) -> list[list[str]]:
    """Instructions of the basic blocks that jump back to their own label."""
    label, body, found = "", [], []
    for line in map(str.strip, text.splitlines()):
        if start := re.match(r"^([.\w$]+):", line):
            label, body = start[1], []
        elif line and not line.startswith((".", "#", "//")):
            body.append(line)
            if jump := re.match(r"(?:j\w+|b\.\w+|b|cbn?z\s+\w+,)\s+([.\w$]+)$", line):
                if jump[1] == label:
                    found.append(body)
                label, body = "", []
    return found


@functools.cache
def k_loops(block: BlockConfig, machine: Machine) -> list[list[str]]:
    every = make_kernels(block)
    kernels = {name: every[name] for name in every if name.endswith(("_microkernel", "_transposed"))}
    return loops(machine.llvm().emit_assembly(build.to_module(kernels, machine, ())))


def arithmetic_of(block: BlockConfig) -> str:
    if block.isa == "neon":
        return r"fmla\s"
    if block.bf16_dot:
        return "vdpbf16ps"
    return r"vfn?madd\d+p[sd]" if block.fused else r"v?mulp[sd]"


def check_k_loops(block: BlockConfig, machine: Machine) -> list[list[str]]:
    """The unrolled k-loops of the largest tiles, which keep their sums in registers."""
    arithmetic, expected = arithmetic_of(block), block.mr * block.vectors * UNROLL
    every = k_loops(block, machine)
    counts = [sum(bool(re.match(arithmetic, line)) for line in body) for body in every]
    # The register tile, and the one that copies B.
    assert counts.count(expected) >= 2, f"no unrolled k-loop of {expected} multiply-adds among {counts}"
    chosen = [body for body, count in zip(every, counts, strict=True) if count == expected]
    for body in chosen:
        # The portable tile may reload an address: 16 registers do not hold every row's, and it costs it little.
        vectors_only = r"mm\d.*" if block.isa == "generic" else ""
        stack = rf"{vectors_only}(%rsp|-\d+\(%rbp\)|\[sp)|(%rsp|-\d+\(%rbp\)).*{vectors_only}"
        spilled = [line for line in body if re.search(stack, line)]
        assert not spilled, f"{block.name} spills in a k-loop for {machine.cpu}: {spilled[:4]}"
    return chosen


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("isa", X86)
def test_k_loop_has_all_multiply_adds_and_no_spill(isa: str, dtype: str) -> None:
    block = choose(dtype, host.cpu(isa))
    for body in check_k_loops(block, host.machine(isa)):
        # An addition a step for A, for B and its copy, and the counter. More would be a walk down the rows of A, each
        # waiting for the one before, as long as the multiply-adds take. A transposing tile has as many steps as lanes.
        additions = [line for line in body if re.match(r"(add|lea|sub|inc|dec)[lq]\s", line)]
        assert len(additions) <= 3 * max(UNROLL, block.lanes) + 2, f"{block.name} adds in the k-loop: {additions}"
        accumulating = [line for line in body if re.match(arithmetic_of(block), line)]
        assert all(REGISTER[isa] in line for line in accumulating)


# CPUs that users have, by LLVM's names: what is generated for one spills where what is generated for another does not.
WIDE = "-prefer-256-bit"
OTHERS = [
    ("avx512", Machine(LINUX_X86, "znver5", "")),
    ("avx512", Machine(LINUX_X86, "znver4", "")),
    ("avx512", Machine(LINUX_X86, "skylake-avx512", WIDE)),
    ("avx512", Machine(LINUX_X86, "sapphirerapids", WIDE)),
    ("avx2", Machine(LINUX_X86, "znver3", "")),
    ("avx2", Machine(LINUX_X86, "haswell", "")),
    ("avx2", Machine(LINUX_X86, "alderlake", "")),
    ("neon", Machine("aarch64-unknown-linux-gnu", "neoverse-v1", "")),
    *((level.isa, level.machine) for level in LEVELS),
]


@pytest.mark.parametrize(("isa", "machine"), OTHERS, ids=lambda value: getattr(value, "cpu", value))
def test_k_loop_spills_on_no_other_cpu(isa: str, machine: Machine) -> None:
    bf16_dot = machine in [level.machine for level in LEVELS if level.bf16_dot]
    check_k_loops(choose("bfloat16" if bf16_dot else "float32", Cpu(isa, bf16_dot=bf16_dot)), machine)


@pytest.mark.parametrize("isa", [isa for isa in X86 if isa != "avx512"])
def test_narrower_isa_uses_no_wider_register(isa: str) -> None:
    text = assembly(choose("float32", host.cpu(isa)))
    forbidden = {"avx2": r"%zmm|%k[1-7]|%[xy]mm(1[6-9]|2\d|3[01])", "generic": r"%ymm|%zmm|\bvfmadd"}[isa]
    assert not re.search(forbidden, text)
