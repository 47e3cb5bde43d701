"""TMA descriptors as Triton's launcher passes them: encoded by the driver once for each address, then kept."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from torch import Tensor

from .arguments import DescriptorArg

MAX_ENCODED = 4096  # kept at once: 128 bytes each, and the numbers beside them


class PrecheckedDescriptor:
    """The attributes of a TensorDescriptor that Triton's launcher reads, without the checks of its constructor."""

    __slots__ = ("base", "block_shape", "padding", "round_f32_to_tf32", "shape", "strides")

    def __init__(self, base: Any, argument: DescriptorArg) -> None:
        self.base, self.block_shape = base, list(argument.block)
        self.shape, self.strides = list(argument.shape), list(argument.strides)
        self.padding, self.round_f32_to_tf32 = "zero", False


class Address:
    """What a launcher reads of a tensor."""

    def __init__(self, address: int) -> None:
        self._address = address

    def data_ptr(self) -> int:
        return self._address


class CompiledDescriptor:
    """A descriptor argument of one compiled kernel, with Triton's metadata: all that is encoded but the address.

    make: Triton's function that encodes it. From Triton 3.8 on it has a third argument, which TMA does not use.
    """

    __slots__ = ("argument", "make", "metadata", "rest")

    def __init__(self, argument: DescriptorArg, metadata: Any, make: Callable[..., Any]) -> None:
        self.argument, self.metadata, self.make = argument, metadata, make
        self.rest = (None,) * (make.__code__.co_argcount - 2)

    def of(self, tensor: Tensor) -> tuple[Any, ...]:
        """What a kernel takes in place of the descriptor: the encoded map, then sizes and strides."""
        return encode(self, tensor.data_ptr())


@lru_cache(maxsize=MAX_ENCODED)
def encode(descriptor: CompiledDescriptor, address: int) -> tuple[Any, ...]:
    """Encode a descriptor for an address.

    A map holds the address, the sizes, strides and box of its descriptor, and nothing of the memory there. So one that
    is kept stays valid when the address is freed and used again; a tensor of another shape, layout or dtype there has
    another launch, and so another descriptor.
    """
    described = PrecheckedDescriptor(Address(address), descriptor.argument)
    return tuple(descriptor.make(described, descriptor.metadata, *descriptor.rest))


def launcher_of_encoded(compiled: Any, arguments: list[DescriptorArg]) -> tuple[Any, list[CompiledDescriptor]] | None:
    """Triton's launcher of a kernel without the step that encodes, and what it is given in place of each descriptor.

    None where the kernel has no descriptors, or where this Triton builds its launcher in another way.
    """
    described = getattr(getattr(compiled, "metadata", None), "tensordesc_meta", None)
    encodes = getattr(compiled.run, "launch", None)
    if not described or len(described) != len(arguments) or not inspect.isfunction(encodes):
        return None
    from triton.backends.nvidia import driver

    launch = inspect.getclosurevars(encodes).nonlocals.get("launcher")
    make = getattr(driver, "make_tensordesc_arg", None)
    if launch is None or not inspect.isfunction(make):
        return None
    launcher = copy.copy(compiled.run)
    launcher.launch = launch
    return launcher, [CompiledDescriptor(*pair, make) for pair in zip(arguments, described, strict=True)]
