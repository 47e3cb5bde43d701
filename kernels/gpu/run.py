"""Run a plan repeatedly: Triton compiles and specialises it once; later calls go straight to the compiled kernel."""

from __future__ import annotations

import subprocess
import warnings
from typing import Any, NamedTuple

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from .arguments import DescriptorArg, PointerArg, ScalarArg, is_group
from .descriptors import CompiledDescriptor, PrecheckedDescriptor, launcher_of_encoded
from .launch_record import LaunchRecord, record_of
from .plan import Plan

build_failures: list[str] = []  # why Triton cannot build its kernels here, once it has failed


class CannotBuild(RuntimeError):
    """Triton cannot build the launcher of a kernel, as without a C compiler, or no tile is valid; it says why."""


class Kept(NamedTuple):
    """What Triton compiled, and how later calls launch it.

    encoded: position, tensor and descriptor of each argument that is encoded before `launcher` is called, the last
    one first, since each becomes several arguments; None where `launcher` encodes.
    """

    compiled: Any
    launcher: Any
    encoded: list[tuple[int, str, CompiledDescriptor]] | None


class Runner:
    """Launches one plan. From call to call tensors keep shape, strides, dtype, device and alignment.

    The first call goes through Triton's JIT, which compiles; later ones call what it compiled, without binding,
    specialising and looking it up again, with descriptors that are kept by address. Where a profiler has hooks in
    Triton's launches, all calls go through the JIT.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._named = [(i, x.name) for i, x in enumerate(plan.arguments) if isinstance(x, PointerArg | ScalarArg)]
        self._tuples = [
            (i, x, pointers)
            for i, x in enumerate(plan.arguments)
            if is_group(x)
            if (pointers := [(field, arg.name) for field, arg in enumerate(x) if isinstance(arg, PointerArg)])
        ]
        self._described = [(i, x) for i, x in enumerate(plan.arguments) if isinstance(x, DescriptorArg)]
        constants = [plan.constants[name] for name in plan.kernel.arg_names[len(plan.arguments) :]]
        self._arguments = [*plan.arguments, *constants]
        self._kept: Kept | None = None

    def record(self) -> LaunchRecord | None:
        """What the driver was given, but for the addresses; None before the first call, or where no record holds it."""
        return None if self._kept is None else record_of(self._plan, self._kept.compiled)

    def _build_and_launch(self, arguments: list[Any]) -> Any:
        plan = self._plan
        try:
            return plan.kernel[plan.programs,](*arguments, **plan.options)
        except (OSError, subprocess.CalledProcessError, RuntimeError) as error:
            reason = reason_not_to_build(error)
            if not reason:
                raise
            note_failure(reason)
            raise CannotBuild(reason) from error

    def __call__(self, tensors: dict[str, Any]) -> None:
        arguments = self._arguments.copy()
        for position, name in self._named:
            arguments[position] = tensors[name]
        for position, fields, pointers in self._tuples:
            values = list(fields)
            for field, name in pointers:
                values[field] = tensors[name]
            arguments[position] = type(fields)(*values)
        kept = self._kept
        if kept is None or has_profiler_hooks():
            for position, argument in self._described:
                layout = list(argument.shape), list(argument.strides), list(argument.block)
                arguments[position] = TensorDescriptor(tensors[argument.name], *layout)
            self._keep(self._build_and_launch(arguments))
            return
        if kept.encoded is None:
            for position, argument in self._described:
                arguments[position] = PrecheckedDescriptor(tensors[argument.name], argument)
        else:
            for position, name, descriptor in kept.encoded:
                arguments[position : position + 1] = descriptor.of(tensors[name])
        stream = torch._C._cuda_getCurrentRawStream(torch.cuda.current_device())
        function, metadata = kept.compiled.function, kept.compiled.packed_metadata
        kept.launcher(self._plan.programs, 1, 1, stream, function, metadata, None, None, None, *arguments)

    def _keep(self, compiled: Any) -> None:
        if compiled is None:  # Triton's interpreter
            return
        found = launcher_of_encoded(compiled, [argument for _, argument in self._described])
        if found is None:
            self._kept = Kept(compiled, compiled.run, None)
            return
        launcher, descriptors = found
        named = zip(self._described, descriptors, strict=True)
        self._kept = Kept(compiled, launcher, [(i, x.name, descriptor) for (i, x), descriptor in named][::-1])


def reason_not_to_build(error: Exception) -> str:
    """Why Triton's C compiler did not run or failed; empty for an error of another kind."""
    if isinstance(error, (OSError, subprocess.CalledProcessError)) or "C compiler" in str(error):
        return " ".join(f"{type(error).__name__}: {error}".split())
    return ""


def note_failure(reason: str) -> None:
    """Warn once a process that products of CUDA tensors fall back to torch from now on."""
    if not build_failures:
        build_failures.append(reason)
        warnings.warn(
            f"matmul_grad: Triton cannot build its kernels here, products on the GPU go to torch: {reason}",
            RuntimeWarning,
            stacklevel=2,
        )


def has_profiler_hooks() -> bool:
    """Whether a profiler has hooks in Triton's launches. Newer versions of Triton keep a chain of hooks there."""
    hooks = triton.knobs.runtime.launch_enter_hook, triton.knobs.runtime.launch_exit_hook
    return any(getattr(hook, "calls", hook) for hook in hooks)
