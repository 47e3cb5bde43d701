"""The machine code of the microkernels: the multiply-adds of each tile, and no spilled register."""

from __future__ import annotations

import functools
import re

import pytest

from matmul_grad.kernels.cpu import build, host
from matmul_grad.kernels.cpu.config import BlockConfig, choose
from matmul_grad.kernels.cpu.dtype_kernels import make_kernels
from matmul_grad.kernels.cpu.microkernel import UNROLL

X86 = [isa for isa in host.host_isas() if isa != "neon"]
REGISTER = {"avx512": "zmm", "avx2": "ymm", "generic": "xmm"}


@functools.cache
def assembly(block: BlockConfig, multiplies: bool = False) -> str:
    """Of all kernels, or of those that multiply: activations have multiply-adds, and loops of their own."""
    machine, kernels = host.machine(block.isa), make_kernels(block)
    if multiplies:
        kernels = {name: text for name, text in kernels.items() if not name.endswith(("_store", "_derivative"))}
    module = build.to_module(kernels, machine, ("matmul_grad_config",))
    return machine.llvm().emit_assembly(module)


def basic_blocks(text: str) -> list[list[str]]:
    """Instructions between labels and branches."""
    blocks: list[list[str]] = [[]]
    for line in text.splitlines():
        line = line.strip()
        if re.match(r"^[.\w$]+:", line):
            blocks.append([])
        elif line and not line.startswith((".", "#")):
            blocks[-1].append(line)
            if re.match(r"j\w+\s", line):
                blocks.append([])
    return blocks


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("isa", X86)
def test_k_loop_has_all_multiply_adds_and_no_spill(isa: str, dtype: str) -> None:
    block = choose(dtype, host.cpu(isa))
    arithmetic = r"vfn?madd\d+p[sd]" if block.fused else r"v?mulp[sd]"
    arithmetic = "vdpbf16ps" if block.bf16_dot else arithmetic
    text = assembly(block, multiplies=True)
    loops = [body for body in basic_blocks(text) if sum(bool(re.match(arithmetic, line)) for line in body) >= block.mr]
    expected = block.mr * block.vectors
    counts = [sum(bool(re.match(arithmetic, line)) for line in body) for body in loops]
    assert expected * UNROLL in counts, f"no unrolled k-loop of {expected} × {UNROLL} among {counts}"
    for body, count in zip(loops, counts, strict=True):
        if count != expected * UNROLL:
            continue
        # The portable tile may reload an address: 16 registers do not hold every row's, and it costs it little.
        vectors_only = r"mm\d.*" if isa == "generic" else ""
        stack = rf"{vectors_only}(%rsp|-\d+\(%rbp\))|(%rsp|-\d+\(%rbp\)).*{vectors_only}"
        spilled = [line for line in body if re.search(stack, line)]
        assert not spilled, f"{block.name} spills in the k-loop: {spilled[:4]}"
        # An addition a step for A, for B and its copy, and the counter. More would be a walk down the rows of A, each
        # waiting for the one before, as long as the multiply-adds take. A transposing tile has as many steps as lanes.
        additions = [line for line in body if re.match(r"(add|lea|sub|inc|dec)[lq]\s", line)]
        assert len(additions) <= 3 * max(UNROLL, block.lanes) + 2, f"{block.name} adds in the k-loop: {additions}"
        accumulating = [line for line in body if re.match(arithmetic, line)]
        assert all(REGISTER[isa] in line for line in accumulating)


@pytest.mark.parametrize("isa", [isa for isa in X86 if isa != "avx512"])
def test_narrower_isa_uses_no_wider_register(isa: str) -> None:
    text = assembly(choose("float32", host.cpu(isa)))
    forbidden = {"avx2": r"%zmm|%k[1-7]|%[xy]mm(1[6-9]|2\d|3[01])", "generic": r"%ymm|%zmm|\bvfmadd"}[isa]
    assert not re.search(forbidden, text)
