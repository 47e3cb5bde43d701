"""A launch as the driver takes it: what a compiled entry needs to make it again without Triton and without Python.

Pure: from a launch of ``plan.py`` and what Triton made of it. Nothing here knows how the words are kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .plan import Described, Launch, Number, Operand

# Triton's codes of an element, as its metadata has them, to CUtensorMapDataType of the driver's API.
ELEMENTS = {**{code: code for code in range(8)}, 8: 10, 9: 8, 10: 9}
WARP = 32


@dataclass(frozen=True)
class Constant:
    """A scalar of a parameter list."""

    value: int


@dataclass(frozen=True)
class Pointer:
    """The address of a tensor, by its name."""

    name: str


@dataclass(frozen=True)
class Descriptor:
    """A TMA descriptor of a tensor as the driver encodes it: innermost dimension first, strides in bytes."""

    name: str
    element: int
    swizzle: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]


Parameter = Constant | Pointer | Descriptor


@dataclass(frozen=True)
class Recipe:
    """One launch: the driver's handle of the kernel, its grid and resources, and its parameters in order."""

    function: int
    grid: tuple[int, int]
    threads: int
    shared: int
    parameters: tuple[Parameter, ...]


def recipe(launch: Launch, compiled: Any) -> Recipe | None:
    """The recipe for a launch that Triton has compiled; None for one that takes more than this knows to give.

    compiled: Triton's CompiledKernel. Its signature says what became a constant of the code, and so is not passed.
    """
    metadata = compiled.metadata
    if metadata.num_ctas != 1 or metadata.launch_pdl or metadata.launch_cooperative_grid:
        return None
    if metadata.global_scratch_size or metadata.profile_scratch_size:
        return None
    if any(isinstance(argument, Number) for argument in launch.arguments):
        return None
    passed = [kind for kind in compiled.src.signature.values()][: len(launch.arguments)]
    described = iter(metadata.tensordesc_meta or [])
    parameters: list[Parameter] = []
    for argument, kind in zip(launch.arguments, passed, strict=True):
        if kind == "constexpr":
            continue
        if isinstance(argument, Operand):
            parameters.append(Pointer(argument.name))
        elif isinstance(argument, Described):
            parameters += descriptor(argument, next(described, None))
        else:
            parameters.append(Constant(argument))
    parameters += [Constant(0), Constant(0)]  # the addresses of two scratch buffers that these kernels do not have
    return Recipe(compiled.function, launch.grid, WARP * metadata.num_warps, metadata.shared, tuple(parameters))


def descriptor(argument: Described, metadata: dict[str, Any] | None) -> list[Parameter]:
    """What a kernel takes for a descriptor: the encoded one, then sizes and strides, which it may use or not.

    Without metadata, where the GPU has no copy engine, the kernel takes an address in its place.
    """
    again = [Constant(x) for x in (*argument.shape, *argument.strides)]
    if metadata is None:
        return [Pointer(argument.name), *again, Constant(0), Constant(0), *again]
    item = metadata["elem_size"]
    strides = tuple(item * stride for stride in reversed(argument.strides[:-1]))
    encoded = Descriptor(
        argument.name, ELEMENTS[metadata["elem_type"]], metadata["swizzle"],
        tuple(reversed(argument.shape)), strides, tuple(reversed(metadata["block_size"])),
    )  # fmt: skip
    return [encoded, *again]
