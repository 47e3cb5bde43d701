"""Put the compiled entries of ``aten_abi.py`` under aten's own CPU key, and take them away again.

torch's stable C ABI cannot do this alone: it hands a kernel no Scalar (alpha, beta), and it hides torch's own kernel.
So the kernels are registered as torch registers its own, as a C++ object of which this module knows the layout, and
torch's own kernel is read out of the object in which Python gets it. Both layouts are those of KNOWN versions of
torch; with any other the switch is Unavailable.
"""

from __future__ import annotations

import ctypes
import functools
import sys
import warnings

import torch
from torch.utils._python_dispatch import _disable_current_modes

from . import build, native
from .native import Unavailable
from .state import OVERLOADS, SWITCH, TORCHS, entry_name
from .state import words as state

KNOWN = ("2.13",)  # where the tests have run
MANGLED = {
    "matmul_grad_library_impl": "_ZNR5torch7Library5_implEPKcONS_11CppFunctionENS_17_RegisterOrVerifyE",
    "matmul_grad_resize_output": "_ZN2at6native13resize_outputERKNS_6TensorEN3c108ArrayRefIlEE",
}
_own: dict[tuple[str, str], _Kernel] = {}  # by overload and torch's words on where its kernel comes from
_given: dict[tuple[int, int], object] = {}  # what Python was given: what a running call uses must not go away


class _Kernel(ctypes.Structure):
    """c10::KernelFunction: a functor, the boxed function, two unboxed ones, and tokens."""

    _fields_ = [(name, ctypes.c_int64) for name in ("functor", "boxed", "unboxed", "symbolic", "tokens")]


class _Function(ctypes.Structure):
    """torch::CppFunction: a dispatch key (none: the library's), a kernel, a signature, a schema, a short string."""

    _fields_ = [
        ("key", ctypes.c_int64),
        ("kernel", _Kernel),
        ("signature", ctypes.c_int64 * 2),
        ("schema", ctypes.c_int64),
        ("text", ctypes.c_int64),
        ("length", ctypes.c_int64),
        ("characters", ctypes.c_char * 16),
    ]


def take_over() -> None:
    """Switch on; raises Unavailable where that cannot be."""
    loaded = _load()
    for index, name in enumerate(OVERLOADS):
        kernel = _torchs_kernel(name)
        state[TORCHS + 2 * index], state[TORCHS + 2 * index + 1] = kernel.boxed, kernel.functor
    functions = [_function(loaded.address(entry_name(name))) for name in OVERLOADS]
    names = [ctypes.create_string_buffer(name.encode()) for name in OVERLOADS]
    pairs = [ctypes.addressof(part) for pair in zip(names, functions, strict=True) for part in pair]
    table = (ctypes.c_int64 * (1 + len(pairs)))(len(OVERLOADS), *pairs)
    _call_quietly("matmul_grad_take_over", ctypes.addressof(table))
    if state[SWITCH] == 0:
        raise Unavailable(f"torch {torch.__version__} did not take the kernels")


def give_back() -> None:
    """Switch off: what ``take_over`` found is there again."""
    _call_quietly("matmul_grad_give_back")


@functools.cache
def _load() -> build.Loaded:
    version = torch.__version__
    if ".".join(version.split(".")[:2]) not in KNOWN:
        raise Unavailable(f"the switch knows torch {', '.join(KNOWN)}, not {version}")
    if sys.platform != "linux" or not torch._C._GLIBCXX_USE_CXX11_ABI:
        raise Unavailable(f"the switch knows torch as it is built for Linux, not for {sys.platform}")
    return native.load_entries("aten_abi", _entries, native.symbols(native.MANGLED | MANGLED))


def _entries() -> build.Kernels:
    from .aten_abi import KERNELS

    return KERNELS


def _torchs_kernel(overload: str) -> _Kernel:
    """The kernel that aten has now under CPU: torch's own, or what somebody has put there.

    torch keeps a few bytes for each one that it gives, so its own are asked for once.
    """
    dump = torch._C._dispatch_dump(f"aten::{overload}").split("\n")
    registered = overload, next((line for line in dump if line.startswith("CPU: ")), "")
    if "RegisterCPU" not in registered[1] or registered not in _own:
        kernel = torch._C._dispatch_get_computed_kernel_for_dispatch_key(f"aten::{overload}", torch._C.DispatchKey.CPU)
        value = ctypes.c_int64.from_address(id(kernel) + 2 * ctypes.sizeof(ctypes.c_void_p)).value  # pybind11's layout
        found = _Kernel.from_buffer_copy(ctypes.string_at(value, ctypes.sizeof(_Kernel)))
        if not _is_code(found.boxed) or (found.unboxed and not _is_code(found.unboxed)):
            raise Unavailable(f"torch {torch.__version__} keeps its kernel of {overload} in a way that is not known")
        _given.setdefault((found.boxed, found.functor), kernel)
        _own[registered] = found
    return _own[registered]


@functools.cache
def _is_code(address: int) -> bool:
    """Whether an address lies in a loaded library."""
    return bool(ctypes.CDLL(None).dladdr(ctypes.c_void_p(address), (ctypes.c_void_p * 4)()))


def _function(entry: int) -> _Function:
    function = _Function()
    function.kernel.boxed = entry
    function.text = ctypes.addressof(function) + _Function.characters.offset
    return function


def _call_quietly(name: str, *arguments: int) -> None:
    """Call a compiled function where torch's warnings become Python's, and drop them.

    torch says on stderr, once in a process, that a kernel is overridden, unless a function of its Python interface is
    running: ``apply_`` is one that calls back.
    """
    call = ctypes.CFUNCTYPE(ctypes.c_int64, *[ctypes.c_int64] * len(arguments))(_load().address(name))
    with warnings.catch_warnings(), torch._C.DisableTorchFunction(), _disable_current_modes():
        warnings.simplefilter("ignore")
        torch.zeros(1, device="cpu").apply_(lambda _: float(call(*arguments)))
