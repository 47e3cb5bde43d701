"""Numba's front end alone: the IR of a kernel and of all that it calls, as Numba lowers it.

Numba would optimise each function by itself, generate its machine code, and optimise it once more in each of its
callers. Here the functions of a set are one module before anything is optimised, see ``build.to_module``. Its types and
implementations are those of numbers and tuples, of the hundreds that Numba loads.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba.core import cgutils, compiler, types, typing, untyped_passes
from numba.core import typed_passes as typed
from numba.core.codegen import Codegen, CodeLibrary
from numba.core.compiler_machinery import PassManager
from numba.core.cpu import CPUContext, CPUTargetOptions
from numba.core.descriptors import TargetDescriptor
from numba.core.dispatcher import Dispatcher
from numba.core.imputils import Registry
from numba.core.target_extension import CPU, dispatcher_registry, jit_registry, target_override, target_registry

NAME = "matmul_grad"  # of these kernels as a target of Numba
RAISED = "matmul_grad_raised"  # undefined, so that a kernel that may raise does not link

OPTIONS = {"nopython": True, "error_model": "numpy", "no_cpython_wrapper": True, "no_cfunc_wrapper": True}


class _Library(CodeLibrary):
    """The IR of one function, and the libraries of those that it calls."""

    def __init__(self, codegen: Codegen, name: str) -> None:
        super().__init__(codegen, name)
        self.texts: list[str] = []
        self.called: list[_Library] = []

    def add_ir_module(self, ir_module: ir.Module) -> None:
        self.texts.append(cgutils.normalize_ir_text(str(ir_module)))

    def add_linking_library(self, library: _Library) -> None:
        self.called.append(library)

    def finalize(self) -> None:
        self._finalized = True

    def get_pointer_to_function(self, name: str) -> int:
        return 0

    def get_function(self, name: str) -> None:
        raise NotImplementedError

    def get_llvm_str(self) -> str:
        return "\n".join(self.texts)

    def get_asm_str(self) -> str:
        raise NotImplementedError


class _Codegen(Codegen):
    """Of the process's own triple: data layouts of one architecture are one."""

    _library_class = _Library

    def __init__(self) -> None:
        llvm.initialize_native_target()
        self._triple = llvm.get_process_triple()
        self._target_data = llvm.Target.from_triple(self._triple).create_target_machine().target_data
        self._data_layout = str(self._target_data)

    def _create_empty_module(self, name: str) -> ir.Module:
        module = ir.Module(cgutils.normalize_ir_text(name))
        module.triple, module.data_layout = self._triple, self._data_layout
        return module

    def _add_module(self, module: object) -> None:
        """Nothing is loaded."""

    def set_env(self, name: str, environment: object) -> None:
        """Kernels use no Python object."""


class _TypingContext(typing.Context):
    def __init__(self) -> None:
        super().__init__()
        self._known: dict[object, object] = {}

    def load_additional_registries(self) -> None:
        """No types beyond those that Numba always has."""

    def resolve_function_type(self, func: object, args: tuple, kws: dict) -> object:
        """As Numba's, which looks anew at each call, and compiles a function anew for each constant that it gets."""
        if isinstance(func, types.Dispatcher):
            args = tuple(types.unliteral(arg) for arg in args)
        key = func, tuple(args), tuple(dict(kws).items())
        if key not in self._known:
            self._known[key] = super().resolve_function_type(func, args, kws)
        return self._known[key]


class _Context(CPUContext):
    intrinsics = Registry(NAME)

    def init(self) -> None:
        self.is32bit = False
        self._internal_codegen = _Codegen()

    def load_additional_registries(self) -> None:
        self.install_registry(self.intrinsics)  # the first one, where Numba puts them
        from numba.core import optional  # noqa: F401  # registers
        from numba.cpython import builtins, iterators, mathimpl, numbers, rangeobj, tupleobj  # noqa: F401

        self.install_registry(mathimpl.registry)

    def post_lowering(self, module: ir.Module, library: _Library) -> None:
        """Nothing is counted by references."""


class _Target(TargetDescriptor):
    options = CPUTargetOptions

    @functools.cached_property
    def typing_context(self) -> _TypingContext:
        return _TypingContext()

    @functools.cached_property
    def target_context(self) -> _Context:
        return _Context(self.typing_context, NAME)


class _Compiler(compiler.CompilerBase):
    """Numba's passes, without those for what kernels do not use: closures, context managers, arrays, exceptions."""

    def define_pipelines(self) -> list[PassManager]:
        passes = PassManager("kernels")
        for one in (
            untyped_passes.TranslateByteCode,
            untyped_passes.FixupArgs,
            untyped_passes.IRProcessing,
            untyped_passes.ReconstructSSA,
            typed.NopythonTypeInference,
            typed.PreLowerStripPhis,
            typed.NativeLowering,
            typed.NoPythonBackend,
        ):
            passes.add_pass(one)
        passes.finalize()
        return [passes]


_target = _Target(NAME)


class _Function(Dispatcher):
    targetdescr = _target


class _Kernels(CPU):
    """Has what is for any CPU."""


def jit(function: Callable) -> Callable:
    """Make ``function`` part of the kernels that call it; no division or index of it may raise."""
    return _Function(function, targetoptions=OPTIONS, pipeline_class=_Compiler)


def _overload(**options: object) -> Callable:
    """What Numba makes of its own implementations in Python, such as ``min``."""
    return functools.partial(_Function, targetoptions=options | OPTIONS, pipeline_class=_Compiler)


target_registry[NAME] = _Kernels
dispatcher_registry[_Kernels] = _Function
jit_registry[_Kernels] = _overload


def lowered(function: Callable, signature: typing.Signature, name: str, seen: set[object]) -> Iterator[str]:
    """The IR of the C function ``name``, and of what it calls beside what has been ``seen``."""
    flags = compiler.Flags()
    CPUTargetOptions.parse_as_flags(flags, OPTIONS)
    flags.no_compile, flags.enable_pyobject = True, False
    with target_override(NAME):  # else Numba loads what it has for arrays too
        result = compiler.compile_extra(
            _target.typing_context, _target.target_context, function, signature.args, signature.return_type, flags, {},
            pipeline_class=_Compiler,
        )  # fmt: skip
    yield _c_function(result.fndesc, name)
    yield from _texts(result.library, seen)


def _texts(library: _Library, seen: set[object]) -> Iterator[str]:
    if library not in seen:
        seen.add(library)
        yield from library.texts
        for called in library.called:
            yield from _texts(called, seen)


def _c_function(description: Any, name: str) -> str:
    """The C function that calls a compiled one, whose result is a status."""
    context, module = _target.target_context, ir.Module(name)
    call_conv, kinds = context.call_conv, description.argtypes
    callee = ir.Function(module, call_conv.get_function_type(description.restype, kinds), description.llvm_func_name)
    kind = ir.FunctionType(context.get_value_type(description.restype), [context.get_value_type(x) for x in kinds])
    function = ir.Function(module, kind, name)
    builder = ir.IRBuilder(function.append_basic_block("entry"))
    status, result = call_conv.call_function(builder, callee, description.restype, kinds, function.args)
    with builder.if_then(status.is_error, likely=False):
        builder.call(ir.Function(module, ir.FunctionType(ir.VoidType(), []), RAISED), [])
    builder.ret(result)
    return str(module)
