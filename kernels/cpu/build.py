"""From Numba functions to addresses: compile once, keep the object file, load it with LLVM alone afterwards.

A warm start needs neither Numba nor its import: the kernels become one relocatable object for each set, cached
under a name that hashes the sources of this folder, the versions of Numba and llvmlite, and the CPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import llvmlite.binding as llvm

SCHEDULER = ("sched_getcpu", "sched_getaffinity", "sched_setaffinity") if sys.platform == "linux" else ()
LIBC = ("malloc", "free", "memset", "memcpy", "snprintf", *SCHEDULER)

_UNLINKED = ctypes.c_int64()

# Kernels by C name: (Python function, Numba signature) for Numba to compile, or IR text that is ready.
Kernels = Mapping[str, "str | tuple[Callable, object]"]


@dataclass(frozen=True)
class Machine:
    """What code is generated for: LLVM's triple, CPU name and feature string."""

    triple: str
    cpu: str
    features: str

    def llvm(self) -> llvm.TargetMachine:
        llvm.initialize_all_targets()
        llvm.initialize_all_asmprinters()
        target = llvm.Target.from_triple(self.triple)
        # "large": the code may lie more than 2 GiB from the torch functions and the tables that it uses.
        return target.create_target_machine(
            cpu=self.cpu, features=self.features, opt=3, reloc="default", codemodel="large", jit=True
        )


@functools.cache
def sources_digest(package: str = __package__) -> str:
    """Hash of every source file of this folder, and of ``package``: an edit to any of them recompiles."""
    digest = hashlib.sha256()
    for folder in sorted({Path(__file__).parent, *(Path(x) for x in sys.modules[package].__path__)}):
        for path in sorted(folder.glob("*.py")):
            digest.update(path.name.encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


def cache_folder() -> Path:
    """``$MATMUL_GRAD_CACHE``, or ``matmul_grad`` in the user's cache folder."""
    chosen = os.environ.get("MATMUL_GRAD_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "matmul_grad"


def object_path(key: str, name: str, machine: Machine, package: str = __package__) -> Path:
    versions = [metadata.version(package) for package in ("numba", "llvmlite")]
    key = "\n".join(
        [
            key,
            sources_digest(package),
            *versions,
            platform.python_version(),
            machine.triple,
            machine.cpu,
            machine.features,
        ]
    )
    return cache_folder() / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:24]}.o"


def to_module(kernels: Kernels, machine: Machine, symbols: Iterable[str]) -> llvm.ModuleRef:
    """One module with ``kernels`` under their C names; all else in it is inlined or private.

    Numba's C wrapper reports exceptions through the interpreter. Kernels raise none: once everything but the
    entry points is internal, LLVM proves it and drops that code, so that the object needs no Numba at run time.
    """
    from numba import cfunc

    for name in (*kernels, *symbols):
        # Numba links what it compiles, never to be run; the names get their meaning in `Loaded`.
        llvm.add_symbol(name, ctypes.addressof(_UNLINKED))
    module = llvm.parse_assembly("")
    for name, kernel in kernels.items():
        if isinstance(kernel, str):
            text = kernel
        else:
            function, signature = kernel
            compiled = cfunc(signature, error_model="numpy")(function)
            text = compiled.inspect_llvm().replace(compiled.native_name, name)
        module.link_in(llvm.parse_assembly(text))
    for value in (*module.functions, *module.global_variables):
        if not value.is_declaration and value.name not in kernels:
            value.linkage = "internal"
    target = machine.llvm()
    module.triple, module.data_layout = machine.triple, str(target.target_data)
    builder = llvm.create_pass_builder(target, llvm.create_pipeline_tuning_options(speed_level=3))
    builder.getModulePassManager().run(module, builder)
    missing = {
        function.name for function in module.functions
        if function.is_declaration and not function.name.startswith("llvm.")
    } - {*symbols, *LIBC}  # fmt: skip
    if missing:
        raise RuntimeError(f"the kernels {', '.join(kernels)} refer to {', '.join(sorted(missing))}")
    return module


def load(
    key: str,
    name: str,
    kernels: Callable[[], Kernels],
    machine: Machine,
    symbols: Mapping[str, int],
    package: str = __package__,
) -> Loaded:
    """The compiled set ``name``, from the cache where it is there, with ``symbols`` bound to addresses.

    ``package`` is the one whose sources it is compiled from, beside those of this folder.
    """
    path = object_path(key, name, machine, package)
    code = _read(path)
    if code is None:
        code = machine.llvm().emit_object(to_module(kernels(), machine, symbols))
        _write(path, code)
    return Loaded(code, machine, symbols)


class Loaded:
    """Machine code in memory for the rest of the process; ``address(name)`` finds a function in it."""

    def __init__(self, code: bytes, machine: Machine, symbols: Mapping[str, int]) -> None:
        for symbol, address in symbols.items():
            llvm.add_symbol(symbol, address)
        self._code = code  # LLVM reads the object from here and keeps no copy
        self._engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine.llvm())
        self._engine.add_object_file(llvm.ObjectFileRef.from_data(self._code))
        self._engine.finalize_object()

    def address(self, name: str) -> int:
        address = self._engine.get_function_address(name)
        if address == 0:
            raise RuntimeError(f"no function {name} in the compiled kernels")
        return address


def _read(path: Path) -> bytes | None:
    """The cached object; None where it is missing, unreadable or cut short."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    digest, code = data[:32], data[32:]
    return code if hashlib.sha256(code).digest() == digest else None


def _write(path: Path, code: bytes) -> None:
    """Keep ``code``, whole or not at all; a folder that cannot be written only costs the next start."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(hashlib.sha256(code).digest() + code)
            os.replace(temporary, path)
        except OSError:
            os.unlink(temporary)
            raise
