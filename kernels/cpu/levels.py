"""What code is generated for: the CPU at hand, or one of the levels that a wheel carries objects for."""

from __future__ import annotations

from dataclasses import dataclass

import llvmlite.binding as llvm

LINUX_X86 = "x86_64-unknown-linux-gnu"


@dataclass(frozen=True)
class Machine:
    """LLVM's triple, CPU name and feature string."""

    triple: str
    cpu: str
    features: str

    def llvm(self) -> llvm.TargetMachine:
        llvm.initialize_all_targets()
        llvm.initialize_all_asmprinters()
        target = llvm.Target.from_triple(self.triple)
        # "large": the code may lie more than 2 GiB from the torch functions and the state that it uses.
        return target.create_target_machine(
            cpu=self.cpu, features=self.features, opt=3, reloc="default", codemodel="large", jit=True
        )


@dataclass(frozen=True)
class Level:
    """CPUs that run the same objects: those with every feature of ``needs``.

    isa, bf16_dot  what `config.Cpu` is on them
    machine        what LLVM generates code for; it uses no feature beyond ``needs`` and those of every x86-64
                   operating system that saves vector registers
    """

    name: str
    isa: str
    bf16_dot: bool
    machine: Machine
    needs: tuple[str, ...]


_V3 = ("avx", "avx2", "bmi", "bmi2", "cx16", "f16c", "fma", "lzcnt", "movbe", "popcnt", "sahf", "xsave")
_V4 = (*_V3, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")

# Best first. LLVM tunes x86-64-v4 for CPUs that clock down in 512-bit code, where the tiles were not cut for them.
LEVELS = (
    Level("avx512_bf16", "avx512", True, Machine(LINUX_X86, "x86-64-v4", "-prefer-256-bit,+avx512bf16"),
          (*_V4, "avx512bf16")),
    Level("avx512", "avx512", False, Machine(LINUX_X86, "x86-64-v4", "-prefer-256-bit"), _V4),
    Level("avx2", "avx2", False, Machine(LINUX_X86, "x86-64-v3", ""), _V3),
)  # fmt: skip


def fitting(machine: Machine) -> tuple[Level, ...]:
    """The levels whose objects run on ``machine``, best first.

    >>> [level.name for level in fitting(Machine("x86_64-pc-linux-gnu", "x86-64-v3", ""))]
    ['avx2']
    >>> fitting(Machine("aarch64-unknown-linux-gnu", "neoverse-v1", "+fullfp16")), fitting(Machine("", "", ""))
    ((), ())
    """
    architecture, _, system = machine.triple.partition("-")
    if architecture != "x86_64" or "linux" not in system:
        return ()
    has = {feature[1:] for feature in machine.features.split(",") if feature.startswith("+")}
    for level in LEVELS:
        if (machine.cpu, machine.features) == (level.machine.cpu, level.machine.features):
            has |= {*level.needs}
    return tuple(level for level in LEVELS if has.issuperset(level.needs))
