"""Products as functions of CPython, without torch's dispatcher: for ordinary tensors, where nothing follows a call.

``functions.mm(a, b)`` is compiled code that reads the tensors in the Python objects, computes and returns a tensor;
``functions.mm_out(a, b, out)`` writes to ``out``, of the right sizes, and returns it: its version is the caller's.
They return None, and have done nothing, for any other call: the caller then takes the way through the dispatcher. So do
all calls until the kernels are loaded, and where CPython or torch lacks what this needs.

TENSOR, PARAMETER       addresses of the two types of Python objects that are tensors and nothing else
TENSOR_AT               bytes from such an object to the tensor in it
NOTHING, FLOAT, INT     addresses of None and of two types of numbers
PLAIN_KEYS, INFERENCE_KEYS  the dispatch keys of an ordinary tensor, and of one made in inference mode
VIEW_KEY                the dispatch key of the kernels that guard what is written, which inference mode leaves out
AUTOCAST_KEY            the dispatch key that is excluded unless autocast is on
MODE_KEYS …             dispatch keys of modes, tracers and transforms, 0 behind the last
"""

from __future__ import annotations

import ctypes
import functools
import sysconfig
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from . import torch_layout

TENSOR, PARAMETER, TENSOR_AT, NOTHING, FLOAT, INT, PLAIN_KEYS, INFERENCE_KEYS = range(8)
VIEW_KEY, AUTOCAST_KEY, MODE_KEYS = range(8, 11)
# Keys that the state of a thread can put in front of autograd. FuncTorchDynamicLayerFrontMode is on with its back mode.
MODES = (
    "Python",
    "FuncTorchDynamicLayerBackMode",
    "FuncTorchVmapMode",
    "VmapMode",
    "Functionalize",
    "Tracer",
    "PythonDispatcher",
    "PreDispatch",
    "DeferredInit",
    "TESTING_ONLY_GenericMode",
)
OUT = "_out"  # the same with a tensor behind the other arguments, which is written and returned
WITH_OUT = ("mm", "bmm", "addmm", "baddbmm", "mv", "addmv", "dot")
NAMES = (*WITH_OUT, "matmul", "linear")
OUT_NAMES = tuple(name + OUT for name in WITH_OUT)
CPYTHON = (
    "Py_IncRef",
    "PyEval_SaveThread",
    "PyEval_RestoreThread",
    "PyFloat_AsDouble",
    "PyErr_Occurred",
    "PyErr_Clear",
)
METH_FASTCALL = 0x80

words = (ctypes.c_int64 * (MODE_KEYS + len(MODES) + 1))()
_kept: list[object] = []


def _returns_none(*operands: Any) -> None:
    return None


functions = SimpleNamespace(**dict.fromkeys((*NAMES, *OUT_NAMES), _returns_none))


class Method(ctypes.Structure):
    """PyMethodDef of CPython."""

    _fields_ = [
        ("name", ctypes.c_char_p),
        ("function", ctypes.c_void_p),
        ("flags", ctypes.c_int),
        ("doc", ctypes.c_char_p),
    ]


def entry_name(name: str) -> str:
    """C name of the compiled code of one of the functions."""
    return f"matmul_grad_python_{name}"


@functools.cache
def symbols() -> dict[str, int]:
    """Addresses that the compiled code is linked with; 0 for a function of CPython's or torch's that is missing."""
    found = {f"matmul_grad_{name}": _cpython(name) for name in CPYTHON}
    found |= {name: torch_layout.address(cpp) for name, cpp in torch_layout.PYTHON_MANGLED.items()}
    return {**found, "matmul_grad_python": ctypes.addressof(words)}


def install(address: Callable[[str], int], names: tuple[str, ...]) -> bool:
    """Make ``functions`` of compiled code; False where CPython or torch is not as it needs."""
    if sysconfig.get_config_var("Py_GIL_DISABLED") or not all(symbols().values()) or not _fill():
        return False
    make = ctypes.PYFUNCTYPE(ctypes.py_object, *[ctypes.c_void_p] * 4)(("PyCMethod_New", ctypes.pythonapi))
    for name in names:
        method = Method(name.encode(), address(entry_name(name)), METH_FASTCALL, None)
        _kept.append(method)
        setattr(functions, name, make(ctypes.addressof(method), None, None, None))
    return True


def uninstall() -> None:
    """Back to ``functions`` that return None."""
    for name in (*NAMES, *OUT_NAMES):
        setattr(functions, name, _returns_none)


def _cpython(name: str) -> int:
    function: Any = getattr(ctypes.pythonapi, name, None)
    return ctypes.cast(function, ctypes.c_void_p).value or 0


def _fill() -> bool:
    """Set the words; False where one of them cannot be found."""
    at = torch_layout.tensor_offset()
    modes = [torch_layout.parsed_dispatch_key(name) for name in MODES]
    keys = torch_layout.plain_keys()[1], torch_layout.inference_keys()
    if at == 0 or 0 in keys or 0 in modes:
        return False
    words[TENSOR], words[PARAMETER] = id(torch.Tensor), id(torch.nn.Parameter)
    words[TENSOR_AT], (words[PLAIN_KEYS], words[INFERENCE_KEYS]) = at, keys
    words[NOTHING], words[FLOAT], words[INT] = id(None), id(float), id(int)
    words[VIEW_KEY] = torch_layout.dispatch_key("ADInplaceOrView")
    words[AUTOCAST_KEY] = torch_layout.dispatch_key("AutocastCPU")
    for index, key in enumerate(modes):
        words[MODE_KEYS + index] = key
    return True
