"""Load the compiled entries, and register those of ``own_entries.py`` with torch's dispatcher."""

from __future__ import annotations

import ctypes
import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..cpu import build, compile_beside, driver, host
from ..cpu.fork_safety import fork_safe_lock
from . import graph, launch_table, pending, python_functions, torch_layout
from .op_table import COMPOSED, OWN
from .state import (
    ABI_VERSION,
    DTYPE_CODES,
    FUNCTIONALIZE_KEY,
    FUNCTORCH_KEY,
    GEMMS,
    KEYS_AT,
    NOT_ACCELERATED,
    NOT_LOADED,
    PLAIN_KEYS,
    PYTHON_KEY,
    RAISE,
    RECORD_ANY,
    RECORD_PRODUCT,
)
from .state import words as state

_lock = fork_safe_lock()
_own: list[build.Loaded] = []  # the entries of products, once they are registered
_kept: list[object] = []  # what native code points at, for the life of the process


class Unavailable(RuntimeError):
    """Nothing can be registered natively here; the message is the reason."""


@ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64)
def _load_gemm(code):
    """Called by an entry at the first product of a dtype.

    It sets the word of the dtype, or leaves the exception that interrupted it pending.
    """
    try:
        dtype = next(name for name, known in DTYPE_CODES.items() if known == code)
        state[GEMMS + code] = driver.address(dtype) or NOT_ACCELERATED
    except BaseException as error:
        pending.keep(error)
    return 0


def symbols(mangled: Mapping[str, str]) -> dict[str, int]:
    """Addresses that entries are linked with: torch's functions and what this module offers them.

    Raises Unavailable where torch's C ABI, or one of the few C++ functions beside it, is missing.
    """
    found = {name: torch_layout.address(name) for name in torch_layout.STABLE}
    found |= {name: torch_layout.address(cpp) for name, cpp in mangled.items()}
    missing = sorted(name for name, address in found.items() if address == 0)
    if missing:
        raise Unavailable(f"torch {torch.__version__} has no {', '.join(missing)}")
    found["matmul_grad_load_gemm"] = ctypes.cast(_load_gemm, ctypes.c_void_p).value or 0
    found["matmul_grad_state"] = ctypes.addressof(state)
    _fill_state()
    return found


def load_entries(name: str, kernels: Callable[[], build.Kernels], linked: Mapping[str, int]) -> build.Loaded:
    """A set of entries, which live as long as the process."""
    loaded = build.load(name, name, kernels, host.machine(host.cpu().isa), linked, __package__)
    _kept.append(loaded)
    return loaded


def load_own_entries() -> build.Loaded:
    """The entries of the operators of ``matmul_grad`` and of the functions of CPython."""
    return load_entries("own_entries", _entries, symbols_of_python())


def load_out_entries() -> build.Loaded:
    """The entries of the functions of CPython that write to ``out``."""
    return load_entries("out_entries", _out_entries, symbols_of_python())


def symbols_of_python() -> dict[str, int]:
    """``symbols``, and those of the functions of CPython. What is missing stands for something that is never called."""
    linked = symbols(torch_layout.MANGLED)
    more = {name: address or linked["matmul_grad_state"] for name, address in python_functions.symbols().items()}
    return linked | more


def load_gradient_entries(own: build.Loaded) -> build.Loaded:
    """The entries of backward, and of products that are recorded for it; they call those of products, ``own``."""
    linked = symbols(torch_layout.MANGLED)
    called = {name: own.address(name) for name in ("matmul_grad_compute", "matmul_grad_multiply_batches")}
    return load_entries("gradient_entries", _gradient_entries, linked | called)


def register() -> None:
    """Put the compiled entries under the operators of ``matmul_grad`` for the keys CPU and AutogradCPU.

    Raises Unavailable as ``symbols`` does.
    """
    with _lock:
        loaded = load_own_entries()
        _own.append(loaded)
        for name in (op.name for op in (*OWN, *COMPOSED)):
            _implement(name, "CPU", loaded.address(f"matmul_grad_{name}"))
            _implement(name, "AutogradCPU", loaded.address(f"matmul_grad_{name}_autograd"))
        graph.prepare()
        python_functions.install(loaded.address, python_functions.NAMES)


def register_outs() -> None:
    """Make the functions of CPython that write to ``out``: after ``register``, where there is one.

    Raises Unavailable as ``symbols`` does.
    """
    with _lock:
        python_functions.install(load_out_entries().address, python_functions.OUT_NAMES)


def register_gradients() -> None:
    """Likewise those of ``mm_backward``, and of what ``graph.py`` needs: after ``register``, where backward is near."""
    with _lock:
        loaded = load_gradient_entries(*_own)
        _implement("mm_backward", "CPU", loaded.address("matmul_grad_mm_backward"))
        _implement("mm_backward", "AutogradCPU", loaded.address("matmul_grad_mm_backward_autograd"))
        if not graph.reason():
            state[RECORD_PRODUCT] = loaded.address("matmul_grad_record")
            state[RECORD_ANY] = loaded.address("matmul_grad_record_any")
            for (namespace, name, key), entry in graph.ENTRIES.items():
                _implement(name, key, loaded.address(entry), namespace)


def compile_first_gemm_beside() -> None:
    """Called where entries have to be compiled: the GEMM of the default dtype is likely to be needed next."""
    compile_beside.start(str(torch.get_default_dtype()).removeprefix("torch."))


def _entries() -> build.Kernels:
    compile_first_gemm_beside()
    from . import broadcast, call, own_entries, python_entries

    return _of(call, broadcast, own_entries, python_entries)


def _gradient_entries() -> build.Kernels:
    from . import backward_entries, gradients, graph_entries

    return _of(gradients, backward_entries, graph_entries)


def _out_entries() -> build.Kernels:
    from . import call_out, python_out_entries

    return _of(call_out, python_out_entries)


def _of(*modules: Any) -> build.Kernels:
    """All kernels of some modules."""
    sets = [module.KERNELS for module in modules]
    names = list(itertools.chain.from_iterable(sets))
    if len(names) != len(set(names)):
        raise RuntimeError(f"two entries have one C name among {sorted(names)}")
    return {name: kernel for kernels in sets for name, kernel in kernels.items()}


def register_cuda(cuda_driver: Mapping[str, int]) -> None:
    """Put the compiled entries of ``cuda_entries.py`` under ``matmul_grad::mm`` for the keys CUDA and AutogradCUDA.

    cuda_driver: addresses of what they call of CUDA's driver. Raises Unavailable as ``symbols`` does.
    """
    with _lock:
        loaded = load_cuda({**cuda_driver, "matmul_grad_cuda_stream": _needed("aoti_torch_get_current_cuda_stream")})
        launch_table.words[launch_table.PLAIN_KEYS] = torch._C._dispatch_keys(torch.empty(1, device="cuda")).raw_repr()
        for key, entry in (("CUDA", "matmul_grad_mm_cuda"), ("AutogradCUDA", "matmul_grad_mm_cuda_autograd")):
            _implement("mm", key, loaded.address(entry))


def load_cuda(cuda_driver: Mapping[str, int]) -> build.Loaded:
    """The entries of ``cuda_entries.py``, linked with these functions of the driver's, or with what stands for them."""

    def entries() -> build.Kernels:
        from .cuda_entries import KERNELS

        return KERNELS

    linked = symbols(torch_layout.MANGLED) | {"matmul_grad_cuda_table": ctypes.addressof(launch_table.words)}
    return load_entries("cuda_entries", entries, {**linked, **cuda_driver})


def _needed(name: str) -> int:
    address = torch_layout.address(name)
    if address == 0:
        raise Unavailable(f"torch {torch.__version__} has no {name}")
    return address


@functools.cache
def _fill_state() -> None:
    major, minor, patch = torch_layout.version()
    state[ABI_VERSION] = major << 56 | minor << 48 | patch << 40
    state[PYTHON_KEY] = torch_layout.dispatch_key("Python")
    state[FUNCTORCH_KEY] = torch_layout.dispatch_key("FuncTorchDynamicLayerBackMode")
    state[FUNCTIONALIZE_KEY] = torch_layout.dispatch_key("Functionalize")
    state[KEYS_AT], state[PLAIN_KEYS] = torch_layout.plain_keys()
    handle = torch._C._dispatch_find_schema_or_throw("matmul_grad::_raise", "")
    _kept.append(handle)
    state[RAISE] = torch_layout.cpp_object(handle)
    driver.parallel_for.value = torch_layout.address("torch_parallel_for")
    for code in DTYPE_CODES.values():
        state[GEMMS + code] = NOT_LOADED


def _implement(name: str, key: str, entry: int, namespace: str = "matmul_grad") -> None:
    library = ctypes.c_void_p()
    functions = torch_layout.libtorch()
    init: Callable = functions.aoti_torch_library_init_impl
    strings = namespace.encode(), key.encode(), b"matmul_grad", name.encode()
    _kept.extend(strings)
    failed = init(strings[0], strings[1], strings[2], 0, ctypes.byref(library))
    version = ctypes.c_uint64(state[ABI_VERSION])
    failed = failed or functions.torch_library_impl(library, strings[3], ctypes.c_void_p(entry), version)
    if failed:
        raise Unavailable(f"torch {torch.__version__} did not take the {key} kernel of {name}")
    _kept.append(library)
