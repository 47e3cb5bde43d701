"""From Numba functions to addresses: compile once, keep the object file, load it with LLVM alone afterwards.

A warm start needs neither Numba nor its import: the kernels become one relocatable object for each set. A wheel may
carry it (prebuilt.py); else it is cached under a name that hashes the sources of this folder, the versions of this
package, Numba and llvmlite, and the CPU.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import hashlib
import importlib.util
import os
import pkgutil
import platform
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import metadata
from pathlib import Path

import llvmlite.binding as llvm

from . import object_file, prebuilt
from .compile_lock import compiling
from .levels import Machine as Machine
from .numba_settings import needed_settings

SCHEDULER = ("sched_getcpu", "sched_getaffinity", "sched_setaffinity") if sys.platform == "linux" else ()
LIBC = ("malloc", "free", "memset", "memcpy", *SCHEDULER)

SLOW = 2.0  # seconds of compiling after which the user is notified

_notified: list[str] = []  # what was being compiled at the notification

# Kernels by C name: (Python function, Numba signature) for Numba to compile, or IR text that is ready.
Kernels = Mapping[str, "str | tuple[Callable, object]"]


@functools.cache
def sources_digest(package: str = __package__) -> str:
    """Hash of every module of this package, and of ``package``, as it would be imported; "" where none can be read.

    The modules may be sources, compiled files or an archive. An edit to any of them recompiles.
    """
    digest = hashlib.sha256()
    try:
        for name in sorted({__package__, package}):
            for module in (name, *sorted(f"{name}.{x.name}" for x in pkgutil.iter_modules(sys.modules[name].__path__))):
                spec = importlib.util.find_spec(module)
                digest.update(module.rpartition(".")[2].encode())
                digest.update(spec.loader.get_data(spec.origin))  # type: ignore[union-attr]  # raises if there is none
    except Exception:  # whatever an importer may raise; every importer of Python's own gives the data
        return ""
    return digest.hexdigest()


def cache_folder() -> Path | None:
    """``$MATMUL_GRAD_CACHE``, or ``matmul_grad`` in the user's cache folder; None where the user has no home folder."""
    chosen = os.environ.get("MATMUL_GRAD_CACHE")
    try:
        if chosen:
            return Path(chosen).expanduser()
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "matmul_grad"
    except RuntimeError:
        return None


@functools.cache
def _versions() -> tuple[str, ...]:
    """What a compiled set depends on beside its sources: this package, Numba, llvmlite and Python."""
    own = getattr(sys.modules.get(__package__.partition(".")[0]), "__version__", "")
    return own, *(_version(name) for name in ("numba", "llvmlite")), platform.python_version()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # bundled without it
        if package == "numba":
            import numba

            return numba.__version__
        import llvmlite

        return llvmlite.__version__


def object_path(key: str, name: str, machine: Machine, package: str = __package__) -> Path | None:
    """The file of a compiled set; None where none can be kept: no folder, or no sources to key it by."""
    folder, sources = cache_folder(), sources_digest(package)
    if folder is None or not sources:
        return None
    parts = key, sources, *_versions(), machine.triple, machine.cpu, machine.features
    return folder / object_file.file_name(name, *parts)


def to_module(kernels: Kernels, machine: Machine, symbols: Iterable[str]) -> llvm.ModuleRef:
    """One module with ``kernels`` under their C names, optimised; all else in it is inlined or private.

    Numba's functions return whether they raise. Kernels raise nothing: once everything but the entry points is
    internal, LLVM proves it, so that the object needs no Numba at run time.
    """
    module, seen = llvm.parse_assembly(""), set[object]()
    for name, kernel in kernels.items():
        if isinstance(kernel, str):
            texts: Iterable[str] = (kernel,)
        else:
            from .front_end import lowered

            texts = lowered(*kernel, name, seen)
        for text in texts:
            module.link_in(llvm.parse_assembly(text))
    for value in (*module.functions, *module.global_variables):
        if not value.is_declaration and value.name not in kernels:
            value.linkage = "internal"
    target = machine.llvm()
    module.triple, module.data_layout = machine.triple, str(target.target_data)
    options = llvm.create_pipeline_tuning_options(speed_level=2 if seen else 3)
    if seen:  # loops of Numba's functions run a few times: unrolled and vectorised they take longer to compile alone
        options.loop_unrolling = options.loop_vectorization = False
    builder = llvm.create_pass_builder(target, options)
    builder.getModulePassManager().run(module, builder)
    missing = {
        value.name for value in (*module.functions, *module.global_variables)
        if value.is_declaration and not value.name.startswith("llvm.")
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
    """The compiled set ``name``, as the wheel or the cache has it, else compiled, with ``symbols`` bound to addresses.

    ``package`` is the one whose sources it is compiled from, beside those of this folder.
    """
    code = prebuilt.find(key, name, sources_digest(package), machine)
    if code is None:
        code = compiled(key, name, kernels, machine, symbols, package)
    return Loaded(code, machine, symbols)


def compiled(
    key: str,
    name: str,
    kernels: Callable[[], Kernels],
    machine: Machine,
    symbols: Iterable[str],
    package: str = __package__,
) -> bytes:
    """The object of a set, from the cache where it is there; of those who start together one compiles it."""
    path = object_path(key, name, machine, package)
    code = None if path is None else object_file.read(path)
    if code is not None:
        return code
    with _notify_if_slow(name, path), compiling(path):
        code = None if path is None else object_file.read(path)
        if code is None:
            with _without_collections(), needed_settings():
                code = machine.llvm().emit_object(to_module(kernels(), machine, symbols))
            if path is not None:
                object_file.write(path, code)
    return code


@contextlib.contextmanager
def _without_collections() -> Iterator[None]:
    """A block that makes many objects and few cycles: a collection would look through all that torch has loaded."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def notify(message: str) -> None:
    """One line on stderr, where there is one."""
    with contextlib.suppress(OSError, ValueError):
        if sys.stderr is not None:
            print(f"matmul_grad: {message}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _notify_if_slow(name: str, path: Path | None) -> Iterator[None]:
    """Notify the user, the first time in a process that compiling takes longer than SLOW seconds."""
    timer = threading.Timer(SLOW, _notify_once, (name, None if path is None else path.parent))
    timer.daemon = True
    with contextlib.suppress(RuntimeError):  # no more threads
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _notify_once(name: str, folder: Path | None) -> None:
    kept = "cannot be kept: there is no cache folder" if folder is None else f"are kept in {folder}"
    if not _notified:
        _notified.append(name)
        notify(f"compiling CPU kernels ({name}), some seconds a set, longer on a busy machine; they {kept}")


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
