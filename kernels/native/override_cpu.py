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
from typing import Any

import torch

from ..cpu import build
from ..cpu.once import Once
from . import register, torch_layout
from .op_table import ABOVE_AUTOGRAD, OVERLOADS
from .register import Unavailable
from .state import ABOVE, ACTIVE, FALLBACKS, GRAD_DTYPE, OVERRIDE, autograd_entry_name, entry_name
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
    install_entries("aten", OVERLOADS, _prepare_above())
    if state[OVERRIDE] == 0:
        raise Unavailable(f"torch {torch.__version__} did not take the kernels")


def _prepare_above() -> tuple[str, ...]:
    """The operators of ABOVE_AUTOGRAD whose kernels are torch's, which are looked up; none where torch lacks the dtype.

    Our kernels are ``matmul_grad::_aten_*``: see matmul_grad/aten_override_kept.py.
    """
    found = []
    for name in ABOVE_AUTOGRAD if find_grad_dtype() else ():
        dump = torch._C._dispatch_dump(f"aten::{name}").split("\n")
        registered = next((line for line in dump if line.startswith("AutogradCPU: ")), "")
        if not registered or "VariableType" in registered:
            set_above(name, f"aten::{name}", f"matmul_grad::_aten_{name}")
            found.append(name)
    return tuple(found)


def find_grad_dtype() -> bool:
    """Whether torch tells compiled code in which dtype a gradient is kept."""
    state[GRAD_DTYPE] = torch_layout.address(torch_layout.GRAPH_MANGLED["grad_dtype"])
    return state[GRAD_DTYPE] != 0


def set_above(name: str, theirs: str, ours: str) -> None:
    """Have the entry of one of ABOVE_AUTOGRAD call the kernels that two operators have under autograd."""
    at = ABOVE + 4 * list(ABOVE_AUTOGRAD).index(name)
    for place, operator in ((at, theirs), (at + 2, ours)):
        kernel = kernel_of(operator, key=torch._C.DispatchKey.AutogradCPU)
        state[place], state[place + 1] = kernel.boxed, kernel.functor


def install_entries(namespace: str, overloads: Sequence[str], above: Sequence[str] = ()) -> dict[str, int]:
    """Register the entries of ``overloads``, and of those ``above`` autograd, under the operators of that name in a
    namespace; the addresses of the former."""
    entries = {name: load().address(entry_name(name)) for name in overloads}
    others = {name: load().address(autograd_entry_name(name)) for name in above}
    kept = [_as_registered(namespace, group) for group in (entries, others)]
    _call_quietly("matmul_grad_install", ctypes.addressof(kept[0][0]), ctypes.addressof(kept[1][0]) if above else 0)
    return entries


def _as_registered(namespace: str, entries: dict[str, int]) -> tuple[ctypes.Array[ctypes.c_int64], list[object]]:
    """The argument of ``matmul_grad_install``, and what it points at."""
    functions = [_cpp_function(entry) for entry in entries.values()]
    names = [ctypes.create_string_buffer(name.encode()) for name in (namespace, *entries)]
    pairs = [ctypes.addressof(part) for pair in zip(names[1:], functions, strict=True) for part in pair]
    pointers = (ctypes.c_int64 * (2 + len(pairs)))(ctypes.addressof(names[0]), len(entries), *pairs)
    return pointers, [functions, names]


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
    from . import aten_entries, call, call_out

    return call.KERNELS | call_out.KERNELS | aten_entries.KERNELS


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


def kernel_of(operator: str, is_code: Callable[[int], bool] | None = None, key: Any = None) -> KernelFunction:
    """The kernel of an operator under a key, CPU; Unavailable where its function is none by ``is_code``."""
    is_code = is_code or _is_library_code
    kernel = torch._C._dispatch_get_computed_kernel_for_dispatch_key(operator, key or torch._C.DispatchKey.CPU)
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
