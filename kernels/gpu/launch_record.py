"""Launch records: what a compiled entry needs to launch a kernel again without Triton and without Python.

Pure: made from a plan of ``plan.py`` and the kernel that Triton compiled for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from .arguments import DescriptorArg, PointerArg, ScalarArg, is_group
from .plan import Plan

# Triton's codes of an element, as its metadata has them, to CUtensorMapDataType of the driver's API.
ELEMENTS = {**{code: code for code in range(8)}, 8: 10, 9: 8, 10: 9}
WARP = 32


@dataclass(frozen=True)
class Constant:
    """A parameter that is a number, the same in every launch."""

    value: int


@dataclass(frozen=True)
class Pointer:
    """A parameter that is the address of a tensor, by its name."""

    name: str


@dataclass(frozen=True)
class Descriptor:
    """A parameter that is a TMA descriptor, as the driver encodes it: innermost dimension first, strides in bytes."""

    name: str
    element: int
    swizzle: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]


Parameter = Constant | Pointer | Descriptor


@dataclass(frozen=True)
class LaunchRecord:
    """One launch: the driver's handle of the kernel, its programs and resources, and its parameters in order."""

    function: int
    programs: int
    threads: int
    shared: int
    parameters: tuple[Parameter, ...]


def record_of(plan: Plan, compiled: Any) -> LaunchRecord | None:
    """The record of a plan that Triton has compiled; None for a kernel that needs more than a record holds.

    compiled: Triton's CompiledKernel. Its signature marks the arguments that became constants of the code: those are
    not passed.
    """
    metadata = compiled.metadata
    if metadata.num_ctas != 1 or metadata.launch_pdl or metadata.launch_cooperative_grid:
        return None
    if metadata.global_scratch_size or metadata.profile_scratch_size:
        return None
    passed = list(compiled.src.signature.values())[: len(plan.arguments)]
    arguments = [pair for pair in zip(flat(plan.arguments), flat(passed), strict=True) if pair[1] != "constexpr"]
    if any(isinstance(argument, ScalarArg) for argument, _ in arguments):
        return None
    described = iter(metadata.tensordesc_meta or ())
    parameters: list[Parameter] = []
    for argument, _ in arguments:
        if isinstance(argument, PointerArg):
            parameters.append(Pointer(argument.name))
        elif isinstance(argument, DescriptorArg):
            parameters += descriptor(argument, next(described))
        else:
            parameters.append(Constant(argument))
    parameters += [Constant(0), Constant(0)]  # the addresses of two scratch buffers that these kernels do not have
    return LaunchRecord(compiled.function, plan.programs, WARP * metadata.num_warps, metadata.shared, tuple(parameters))


def flat(values: Iterable[Any]) -> Iterator[Any]:
    """Arguments, or their types, in the order in which a kernel takes them: tuples field by field."""
    for value in values:
        if is_group(value):
            yield from flat(value)
        else:
            yield value


def descriptor(argument: DescriptorArg, metadata: dict[str, Any]) -> list[Parameter]:
    """The parameters of a descriptor: the encoded one, then its sizes and strides, which the kernel may or may not use.

    metadata: Triton's, which every kernel of path "tma" has: those GPUs have TMA.
    """
    item = metadata["elem_size"]
    strides = tuple(item * stride for stride in reversed(argument.strides[:-1]))
    encoded = Descriptor(
        argument.name, ELEMENTS[metadata["elem_type"]], metadata["swizzle"],
        tuple(reversed(argument.shape)), strides, tuple(reversed(metadata["block_size"])),
    )  # fmt: skip
    return [encoded, *(Constant(x) for x in (*argument.shape, *argument.strides))]
