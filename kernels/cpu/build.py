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
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import llvmlite.binding as llvm

_UNLINKED = ctypes.c_int64()

# One kernel: C name → (Python function, Numba signature).
Kernels = Mapping[str, tuple[Callable, object]]


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
        # "jitdefault": code and the torch functions it calls may lie further apart than 2 GiB.
        return target.create_target_machine(
            cpu=self.cpu, features=self.features, opt=3, reloc="default", codemodel="jitdefault", jit=True
        )


@functools.cache
def sources_digest() -> str:
    """Hash of every source file of this folder: an edit to any of them recompiles."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.name.encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def cache_folder() -> Path:
    """``$MATMUL_GRAD_CACHE``, or ``matmul_grad`` in the user's cache folder."""
    chosen = os.environ.get("MATMUL_GRAD_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "matmul_grad"


def object_path(name: str, machine: Machine) -> Path:
    versions = [metadata.version(package) for package in ("numba", "llvmlite")]
    key = "\n".join(
        [sources_digest(), *versions, platform.python_version(), machine.triple, machine.cpu, machine.features]
    )
    return cache_folder() / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:24]}.o"


def to_ir(kernels: Kernels) -> str:
    """Optimised LLVM IR of all ``kernels`` in one module, each under its C name."""
    from numba import cfunc

    llvm_module = None
    for name in kernels:
        # Numba links each function when it compiles it; those of this set find each other only in the object.
        llvm.add_symbol(name, ctypes.addressof(_UNLINKED))
    for name, (function, signature) in kernels.items():
        compiled = cfunc(signature, error_model="numpy")(function)
        text = compiled.inspect_llvm().replace(compiled.native_name, name)
        module = llvm.parse_assembly(text)
        if llvm_module is None:
            llvm_module = module
        else:
            llvm_module.link_in(module)
    return str(llvm_module)


def to_assembly(kernels: Kernels, machine: Machine) -> str:
    """Assembly text of ``kernels``, for tests that count instructions."""
    return machine.llvm().emit_assembly(llvm.parse_assembly(to_ir(kernels)))


def to_object(kernels: Kernels, machine: Machine) -> bytes:
    return machine.llvm().emit_object(llvm.parse_assembly(to_ir(kernels)))


def load(
    name: str, kernels: Callable[[], Kernels], machine: Machine, symbols: Mapping[str, int]
) -> Loaded:
    """The compiled set ``name``, from the cache where it is there, with ``symbols`` bound to addresses."""
    for symbol, address in symbols.items():
        llvm.add_symbol(symbol, address)
    path = object_path(name, machine)
    code = _read(path)
    if code is None:
        code = to_object(kernels(), machine)
        _write(path, code)
    return Loaded(code, machine)


class Loaded:
    """Machine code in memory for the rest of the process; ``address(name)`` finds a function in it."""

    def __init__(self, code: bytes, machine: Machine) -> None:
        self._engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine.llvm())
        self._engine.add_object_file(llvm.ObjectFileRef.from_data(code))
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
