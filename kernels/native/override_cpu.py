"""Put the compiled entries of ``aten_entries.py`` under aten's own CPU key, and remove them again.

torch's stable C ABI cannot do this alone: it hands a kernel no Scalar (alpha, beta), and it hides torch's kernel.
So the kernels are registered as torch registers its own, as a C++ object, and torch's kernel is read out of the
object in which Python gets it. Both layouts stand in ``torch_layout.py``; before they are used on aten,
``override_probe.py`` tries them in a process of its own.
"""

from __future__ import annotations

import ctypes
import functools
import sys
import warnings
from collections.abc import Callable, Sequence

import torch

from ..cpu import build
from ..cpu.once import Once
from . import register, torch_layout
from .op_table import OVERLOADS
from .register import Unavailable
from .state import ACTIVE, FALLBACKS, OVERRIDE, entry_name
from .state import words as state
from .torch_layout import CppFunction, KernelFunction

_own: dict[tuple[str, str], KernelFunction] = {}  # PyTorch's kernels, by overload and torch's note on their origin
_replaced: list[str] = []  # torch's notes on the origin of the replaced kernels
_given: dict[tuple[int, int], object] = {}  # Python's objects of kernels, which a running call may use


def install() -> None:
    """Override aten's operators; raises Unavailable where that cannot be.

    The layouts of this torch have to be tried before: ``override_probe.require``.
    """
    if state[OVERRIDE] != 0:
        state[ACTIVE] = 1
        return
    load()
    _replaced.clear()
    for index, name in enumerate(OVERLOADS):
        kernel = _present_kernel(name)
        state[FALLBACKS + 2 * index], state[FALLBACKS + 2 * index + 1] = kernel.boxed, kernel.functor
    install_entries("aten", OVERLOADS)
    if state[OVERRIDE] == 0:
        raise Unavailable(f"torch {torch.__version__} did not take the kernels")


def install_entries(namespace: str, overloads: Sequence[str]) -> dict[str, int]:
    """Register the entries of ``overloads`` under the operators of that name in a namespace; their addresses."""
    entries = {name: load().address(entry_name(name)) for name in overloads}
    functions = [_cpp_function(entry) for entry in entries.values()]
    names = [ctypes.create_string_buffer(name.encode()) for name in (namespace, *overloads)]
    pairs = [ctypes.addressof(part) for pair in zip(names[1:], functions, strict=True) for part in pair]
    pointers = (ctypes.c_int64 * (2 + len(pairs)))(ctypes.addressof(names[0]), len(overloads), *pairs)
    _call_quietly("matmul_grad_install", ctypes.addressof(pointers))
    return entries


def suspend() -> None:
    """Leave the entries in place, but let them call the kernels that they replaced: ``install`` is then quick.

    Where one of those is not torch's, and may go away, they are removed.
    """
    if all("RegisterCPU" in registered for registered in _replaced):
        state[ACTIVE] = 0
    else:
        uninstall()


def uninstall() -> None:
    """Restore what ``install`` replaced."""
    if state[OVERRIDE] != 0:
        _call_quietly("matmul_grad_uninstall")


def load() -> build.Loaded:
    """The compiled entries; raises Unavailable where there can be none."""
    if sys.platform != "linux" or not torch._C._GLIBCXX_USE_CXX11_ABI:
        raise Unavailable(f"the override needs torch as it is built for Linux, not for {sys.platform}")
    try:
        return _loaded.result()
    except RuntimeError as reason:
        raise Unavailable(str(reason)) from None


def _load_entries() -> build.Loaded:
    linked = register.symbols(torch_layout.MANGLED | torch_layout.OVERRIDE_MANGLED)
    return register.load_entries("aten_entries", _entries, linked)


_loaded = Once(_load_entries)


def _entries() -> build.Kernels:
    register.compile_first_gemm_beside()
    from . import aten_entries, call

    return call.KERNELS | aten_entries.KERNELS


def _present_kernel(overload: str) -> KernelFunction:
    """The kernel that aten has now under CPU: PyTorch's, or one that another library registered.

    torch allocates a few bytes for each lookup, so its own kernels are looked up once.
    """
    dump = torch._C._dispatch_dump(f"aten::{overload}").split("\n")
    registered = overload, next((line for line in dump if line.startswith("CPU: ")), "")
    _replaced.append(registered[1])
    if "RegisterCPU" not in registered[1] or registered not in _own:
        _own[registered] = kernel_of(f"aten::{overload}")
    return _own[registered]


def kernel_of(operator: str, is_code: Callable[[int], bool] | None = None) -> KernelFunction:
    """The kernel of an operator under CPU; Unavailable where its function is none by ``is_code``."""
    is_code = is_code or _is_library_code
    kernel = torch._C._dispatch_get_computed_kernel_for_dispatch_key(operator, torch._C.DispatchKey.CPU)
    value = torch_layout.cpp_object(kernel)
    found = KernelFunction.from_buffer_copy(ctypes.string_at(value, ctypes.sizeof(KernelFunction)))
    if not is_code(found.boxed) or (found.unboxed and not is_code(found.unboxed)):
        raise Unavailable(f"torch {torch.__version__} keeps its kernel of {operator} in a way that is not known")
    _given.setdefault((found.boxed, found.functor), kernel)
    return found


@functools.cache
def _is_library_code(address: int) -> bool:
    """Whether an address lies in a loaded library."""
    return bool(ctypes.CDLL(None).dladdr(ctypes.c_void_p(address), (ctypes.c_void_p * 4)()))


def _cpp_function(entry: int) -> CppFunction:
    """A compiled entry as torch registers a kernel."""
    function = CppFunction()
    function.kernel.boxed = entry
    function.text = ctypes.addressof(function) + CppFunction.characters.offset
    return function


def _call_quietly(name: str, *arguments: int) -> None:
    """Call a compiled function where torch's warnings become Python's, and drop them.

    torch prints on stderr, once in a process, that a kernel is overridden, unless a function of its Python interface is
    running: ``apply_`` is one that calls back.
    """
    call = ctypes.CFUNCTYPE(ctypes.c_int64, *[ctypes.c_int64] * len(arguments))(load().address(name))
    with warnings.catch_warnings(), torch_layout.without_modes():
        warnings.simplefilter("ignore")
        torch.zeros(1, device="cpu").apply_(lambda _: float(call(*arguments)))
