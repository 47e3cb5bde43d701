"""One launch, made again and again: compiled and specialised once, then handed to the driver without looking again."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .plan import Described, Launch, Operand


class Runner:
    """A launch whose tensors alone change, and they keep shape, strides, dtype, device and alignment.

    The first call goes through Triton's JIT, which compiles; those after it call what it compiled, and skip the
    binding, the specialisation and the look-up of its launch. A profiler's hooks get the long way.
    """

    def __init__(self, launch: Launch) -> None:
        self._launch = launch
        self._operands = [(i, x.name) for i, x in enumerate(launch.arguments) if isinstance(x, Operand)]
        self._described = [(i, x) for i, x in enumerate(launch.arguments) if isinstance(x, Described)]
        names = getattr(launch.kernel, "arg_names", ())[len(launch.arguments) :]
        self._rest = [launch.constants[name] for name in names if name in launch.constants]
        self._compiled: Any = None

    def __call__(self, tensors: dict[str, Tensor]) -> None:
        arguments = list(self._launch.arguments)
        for position, name in self._operands:
            arguments[position] = tensors[name]
        for position, x in self._described:
            arguments[position] = TensorDescriptor(tensors[x.name], list(x.shape), list(x.strides), list(x.block))
        compiled = self._compiled
        if compiled is None or triton.knobs.runtime.launch_enter_hook or triton.knobs.runtime.launch_exit_hook:
            launch = self._launch
            self._compiled = launch.kernel[launch.grid](*arguments, **launch.constants, **launch.options)
            return
        index = torch.cuda.current_device()
        stream = torch._C._cuda_getCurrentRawStream(index)
        compiled.run(
            *self._launch.grid, 1, stream, compiled.function, compiled.packed_metadata, None, None, None,
            *arguments, *self._rest,
        )  # fmt: skip
