"""One launch, made again and again: compiled and specialised once, then handed to the driver without looking again."""

from __future__ import annotations

import subprocess
import warnings
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .plan import Described, Launch, Number, Operand
from .recipe import Recipe, recipe

failed: list[str] = []  # why Triton can build nothing here, once it could not


class CannotBuild(RuntimeError):
    """Triton cannot build the launcher of a kernel, as where there is no C compiler; the message says why."""


class Checked:
    """What Triton's launcher reads of a TensorDescriptor, without the checks that the first call has made."""

    __slots__ = ("base", "block_shape", "padding", "round_f32_to_tf32", "shape", "strides")

    def __init__(self, base: Tensor, shape: list[int], strides: list[int], block_shape: list[int]) -> None:
        self.base, self.shape, self.strides, self.block_shape = base, shape, strides, block_shape
        self.padding, self.round_f32_to_tf32 = "zero", False


class Runner:
    """A launch whose tensors and numbers alone change; tensors keep shape, strides, dtype, device and alignment.

    The first call goes through Triton's JIT, which compiles; those after it call what it compiled, and skip the
    binding, the specialisation and the look-up of its launch. Where a profiler listens all calls go the long way.
    """

    def __init__(self, launch: Launch) -> None:
        self._launch = launch
        self._operands = [(i, x.name) for i, x in enumerate(launch.arguments) if isinstance(x, Operand | Number)]
        self._described = [
            (i, x.name, list(x.shape), list(x.strides), list(x.block))
            for i, x in enumerate(launch.arguments)
            if isinstance(x, Described)
        ]
        constants = [launch.constants[name] for name in launch.kernel.arg_names[len(launch.arguments) :]]
        self._arguments = [*launch.arguments, *constants]
        self._compiled: Any = None

    def recipe(self) -> Recipe | None:
        """What the driver was given, but for the addresses; None before the first call, and where that is not all."""
        return None if self._compiled is None else recipe(self._launch, self._compiled)

    def _build_and_launch(self, arguments: list[Any]) -> Any:
        launch = self._launch
        try:
            return launch.kernel[launch.grid](*arguments, **launch.options)
        except (OSError, subprocess.CalledProcessError, RuntimeError) as error:
            reason = reason_not_to_build(error)
            if not reason:
                raise
            note_failure(reason)
            raise CannotBuild(reason) from error

    def __call__(self, tensors: dict[str, Any]) -> None:
        arguments = self._arguments.copy()
        for position, name in self._operands:
            arguments[position] = tensors[name]
        compiled = self._compiled
        jit = compiled is None or listened()
        describe = TensorDescriptor if jit else Checked
        for position, name, shape, strides, block in self._described:
            arguments[position] = describe(tensors[name], shape, strides, block)
        if jit:
            self._compiled = self._build_and_launch(arguments)
            return
        stream = torch._C._cuda_getCurrentRawStream(torch.cuda.current_device())
        function, metadata = compiled.function, compiled.packed_metadata
        compiled.run(*self._launch.grid, 1, stream, function, metadata, None, None, None, *arguments)


def reason_not_to_build(error: Exception) -> str:
    """Why Triton's C compiler did not run or failed; empty for an error of another kind."""
    if isinstance(error, (OSError, subprocess.CalledProcessError)) or "C compiler" in str(error):
        return " ".join(f"{type(error).__name__}: {error}".split())
    return ""


def note_failure(reason: str) -> None:
    """One warning a process: products of CUDA tensors go to torch from now on."""
    if not failed:
        failed.append(reason)
        warnings.warn(
            f"matmul_grad: Triton cannot build its kernels here, products on the GPU go to torch: {reason}",
            RuntimeWarning,
            stacklevel=2,
        )


def listened() -> bool:
    """Whether a profiler has hooked itself into Triton's launches. Newer Tritons keep a chain of hooks there."""
    hooks = triton.knobs.runtime.launch_enter_hook, triton.knobs.runtime.launch_exit_hook
    return any(getattr(hook, "calls", hook) for hook in hooks)
