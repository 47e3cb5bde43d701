"""Load the compiled kernels and put them under torch's dispatcher, or say that it cannot be done.

``gemm_address(block)`` gives a driver to call by hand; ``register()`` makes the dispatcher call the entry points
of ``torch_abi.py`` for dense CPU tensors.
"""

from __future__ import annotations

import ctypes
import functools
import os
import re
import struct
import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from . import build, host, table
from .config import WORKSPACE_SLOTS, BlockConfig, choose
from .product import A_BS, ALPHA, B_BS, BATCH, BETA, C_BS, I_BS, I_CS, I_RS, INPUT, PRODUCT
from .state import (
    ABI_VERSION,
    AUTOGRAD_KEY,
    DTYPE_CODES,
    FUNCTIONALIZE_KEY,
    FUNCTORCH_KEY,
    GEMMS,
    KEYS_AT,
    NOT_ACCELERATED,
    NOT_LOADED,
    OPERATORS,
    PLAIN_KEYS,
    PYTHON_KEY,
    raised,
)
from .state import words as state

# Entry points of torch's stable C ABI that torch_abi.py calls.
SHIMS = (
    "aoti_torch_get_dim", "aoti_torch_get_sizes", "aoti_torch_get_strides", "aoti_torch_get_dtype",
    "aoti_torch_get_data_ptr", "aoti_torch_get_layout", "aoti_torch_empty_strided", "aoti_torch_delete_tensor_object",
    "aoti_torch_is_defined", "aoti_torch_grad_mode_is_enabled", "torch_get_num_threads", "torch_call_dispatcher",
    "torch_library_impl", "aoti_torch_library_init_impl", "aoti_torch_delete_library_object", "torch_parallel_for",
    "torch_list_get_item", "torch_delete_list", "aoti_torch_get_device_index",
)  # fmt: skip
# Functions of c10 and of the C++ runtime by their mangled names: promised by nobody, so each may be missing.
MANGLED = {
    "matmul_grad_check_fail": "_ZN3c106detail14torchCheckFailEPKcS2_jS2_",
    "matmul_grad_autograd_meta": "_ZNK3c1010TensorImpl13autograd_metaEv",
    "matmul_grad_requires_grad": "_ZNK3c1010TensorImpl13requires_gradEv",
    "matmul_grad_forward_grad": "_ZNK3c1010TensorImpl8_fw_gradEmRKN2at10TensorBaseE",
    "matmul_grad_key_included": "_ZN3c104impl28tls_is_dispatch_key_includedENS_11DispatchKeyE",
    "matmul_grad_new": "_Znwm",
    "matmul_grad_exclude_key": "_ZN3c104impl29tls_set_dispatch_key_excludedENS_11DispatchKeyEb",
}
IMPL_WORDS = 24  # of a TensorImpl: no torch known has a smaller one
workspace = (ctypes.c_int64 * (1 + 3 * WORKSPACE_SLOTS))()
_lock = threading.RLock()
_messages = threading.local()
_kept: list[object] = []  # what native code points at, for the life of the process


class Unavailable(RuntimeError):
    """Nothing can be registered natively here; the message says why."""


@functools.cache
def libtorch() -> ctypes.CDLL:
    return ctypes.CDLL(torch._C.__file__)


def _address(name: str) -> int:
    try:
        return ctypes.cast(getattr(libtorch(), name), ctypes.c_void_p).value or 0
    except AttributeError:
        return 0


@ctypes.CFUNCTYPE(ctypes.c_int32, *[ctypes.c_int64] * 5)
def _parallel_for_unavailable(begin, end, grain, function, context):
    task = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)(function)
    task(begin, end, context)
    return 0


def _gemm_symbols() -> dict[str, int]:
    fallback = ctypes.cast(_parallel_for_unavailable, ctypes.c_void_p).value or 0
    return {
        "matmul_grad_parallel_for": _address("torch_parallel_for") or fallback,
        "matmul_grad_workspace": ctypes.addressof(workspace),
    }


@functools.cache
def config(dtype: str, isa: str | None = None) -> BlockConfig:
    return choose(dtype, host.cpu(isa))


@functools.cache
def supports(dtype: torch.dtype) -> bool:
    """Whether this CPU has what the kernels of a dtype need: float16 needs conversions."""
    try:
        return bool(config(str(dtype).removeprefix("torch.")))
    except ValueError:
        return False


def gemm_address(block: BlockConfig) -> int:
    """Address of the driver for ``block``, compiled or loaded at the first call."""
    with _lock:
        return _gemm_address(block)


@functools.cache
def _gemm_address(block: BlockConfig) -> int:
    def kernels() -> build.Kernels:
        from .gemm import make_kernels

        return make_kernels(block)

    loaded = build.load(repr(block), block.name, kernels, host.machine(block.isa), _gemm_symbols())
    _kept.append(loaded)
    return loaded.address(block.name)


@ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64)
def _load_gemm(code):
    """Called by the native entry at the first product of a dtype; NOT_ACCELERATED makes it hand over to torch."""
    dtype = next(name for name, known in DTYPE_CODES.items() if known == code)
    try:
        state[GEMMS + code] = gemm_address(config(dtype))
        return state[GEMMS + code]
    except Exception as error:
        print(f"matmul_grad: {dtype} goes to torch, its CPU kernels cannot be compiled: {error}", file=sys.stderr)
        state[GEMMS + code] = NOT_ACCELERATED
        return NOT_ACCELERATED


@ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64)
def _last_error(exception):
    """Message of the error that torch's C ABI just swallowed in this thread, as torch would have worded it.

    ``exception`` is the address of the Python exception that was set, or 0; the reference to it is never given back.
    Without one, an error that passed through Python reads ``RuntimeError: message`` and then where it happened.
    """
    if exception:
        raised.error = ctypes.cast(exception, ctypes.py_object).value
        message = str(raised.error)
    else:
        what = getattr(libtorch(), "torch_exception_get_what_without_backtrace", None)
        message = "matmul_grad: a torch operator failed"  # torch < 2.13 does not tell
        if what is not None:
            what.restype = ctypes.c_char_p
            message = (what() or b"").decode(errors="replace") or message
        message = re.sub(r"\A\w+(Error|Exception): ", "", message).split("\n\nAt:\n")[0]
    _messages.kept = ctypes.create_string_buffer(message.encode())
    return ctypes.addressof(_messages.kept)


def symbols(mangled: Mapping[str, str]) -> dict[str, int]:
    """Addresses that entry points are linked with: SHIMS, ``mangled``, and what this module offers them.

    Raises Unavailable where torch's C ABI, or one of the few C++ functions beside it, is missing.
    """
    found = {name: _address(name) for name in SHIMS} | {name: _address(cpp) for name, cpp in mangled.items()}
    missing = sorted(name for name, address in found.items() if address == 0)
    if missing:
        raise Unavailable(f"torch {torch.__version__} has no {', '.join(missing)}")
    for name in ("PyGILState_Ensure", "PyGILState_Release", "PyErr_Fetch"):
        found[name] = ctypes.cast(getattr(ctypes.pythonapi, name), ctypes.c_void_p).value or 0
    found["matmul_grad_last_error"] = ctypes.cast(_last_error, ctypes.c_void_p).value or 0
    found["matmul_grad_load_gemm"] = ctypes.cast(_load_gemm, ctypes.c_void_p).value or 0
    found["matmul_grad_state"] = ctypes.addressof(state)
    _fill_state()
    return found


def load_entries(name: str, kernels: Callable[[], build.Kernels], linked: Mapping[str, int]) -> build.Loaded:
    """A set of entry points, which live as long as the process."""
    loaded = build.load(name, name, kernels, host.machine(host.cpu().isa), linked)
    _kept.append(loaded)
    return loaded


def register() -> None:
    """Put the compiled entries under the operators of ``matmul_grad`` for the keys CPU and AutogradCPU.

    Raises Unavailable as ``symbols`` does.
    """
    with _lock:
        linked = symbols(MANGLED)
        loaded = load_entries("torch_abi", _entries, linked)
        for name in (*OPERATORS, "mm_backward"):
            _implement(name, "CPU", loaded.address(f"matmul_grad_{name}"))
            _implement(name, "AutogradCPU", loaded.address(f"matmul_grad_{name}_autograd"))


def _entries() -> build.Kernels:
    from . import function_abi, torch_abi

    return torch_abi.KERNELS | function_abi.KERNELS


def register_cuda(driver: Mapping[str, int]) -> None:
    """Put the compiled entries of ``cuda_abi.py`` under ``matmul_grad::mm`` for the keys CUDA and AutogradCUDA.

    driver: addresses of what they call of CUDA's driver. Raises Unavailable as ``symbols`` does.
    """
    with _lock:
        loaded = load_cuda({**driver, "matmul_grad_cuda_stream": _needed("aoti_torch_get_current_cuda_stream")})
        table.words[table.PLAIN_KEYS] = torch._C._dispatch_keys(torch.empty(1, device="cuda")).raw_repr()
        for key, entry in (("CUDA", "matmul_grad_mm_cuda"), ("AutogradCUDA", "matmul_grad_mm_cuda_autograd")):
            _implement("mm", key, loaded.address(entry))


def load_cuda(driver: Mapping[str, int]) -> build.Loaded:
    """The entries of ``cuda_abi.py``, linked with these functions of the driver's, or with what stands for them."""

    def entries() -> build.Kernels:
        from .cuda_abi import KERNELS

        return KERNELS

    linked = symbols(MANGLED) | {"matmul_grad_cuda_table": ctypes.addressof(table.words)}
    return load_entries("cuda_abi", entries, {**linked, **driver})


def _needed(name: str) -> int:
    address = _address(name)
    if address == 0:
        raise Unavailable(f"torch {torch.__version__} has no {name}")
    return address


@functools.cache
def _fill_state() -> None:
    major, minor, patch = (int(part) for part in torch.__version__.split("+")[0].split(".")[:3])
    state[ABI_VERSION] = major << 56 | minor << 48 | patch << 40
    state[AUTOGRAD_KEY] = _key("AutogradFunctionality")
    state[PYTHON_KEY] = _key("Python")
    state[FUNCTORCH_KEY] = _key("FuncTorchDynamicLayerBackMode")
    state[FUNCTIONALIZE_KEY] = _key("Functionalize")
    state[KEYS_AT], state[PLAIN_KEYS] = _plain_keys()
    for code in DTYPE_CODES.values():
        state[GEMMS + code] = NOT_LOADED


def _plain_keys() -> tuple[int, int]:
    """Which word of a TensorImpl holds its dispatch keys, and what an ordinary tensor has there; (0, 0) if unknown.

    torch promises the place to nobody, so it is looked for: the one word that in tensors of several kinds is what
    torch says of their keys. (0, 0) fits no tensor, since a TensorImpl begins with the address of its methods.
    """
    with (
        _disable_current_modes(), torch._C.DisableTorchFunction(), torch._C._DisableFuncTorch(),
        torch.inference_mode(False),
    ):  # fmt: skip
        plain = torch.empty(1, device="cpu")
        kinds = [plain, torch.empty(1, dtype=torch.complex64, device="cpu").conj(), torch.empty(1, device="meta")]
        known = [int(torch._C._dispatch_keys(tensor).raw_repr()) for tensor in kinds]
        words = [(ctypes.c_uint64 * IMPL_WORDS).from_address(tensor._cdata)[:] for tensor in kinds]
    places = [place for place in range(IMPL_WORDS) if [found[place] for found in words] == known]
    return (places[0], known[0]) if len(places) == 1 else (0, 0)


def _key(name: str) -> int:
    keys: Any = torch._C.DispatchKey
    return int(getattr(keys, name))


def _implement(name: str, key: str, entry: int) -> None:
    library = ctypes.c_void_p()
    functions = libtorch()
    init: Callable = functions.aoti_torch_library_init_impl
    strings = b"matmul_grad", key.encode(), b"matmul_grad", name.encode()
    _kept.extend(strings)
    failed = init(strings[0], strings[1], strings[2], 0, ctypes.byref(library))
    version = ctypes.c_uint64(state[ABI_VERSION])
    failed = failed or functions.torch_library_impl(library, strings[3], ctypes.c_void_p(entry), version)
    if failed:
        raise Unavailable(f"torch {torch.__version__} did not take the {key} kernel of {name}")
    _kept.append(library)


def _forked() -> None:
    workspace[0] = 1


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


def multiply(
    block: BlockConfig,
    a: torch.Tensor,
    b: torch.Tensor,
    out: torch.Tensor,
    threads: int = 1,
    source: torch.Tensor | None = None,
    beta: float = 1.0,
    alpha: float = 1.0,
) -> torch.Tensor:
    """out = alpha · (a · b) + beta · source by the driver for ``block``, called from Python: for tests, for results
    that the caller has, and where the C ABI is not to be had.

    Dense (m, k) and (k, n) of ``block.dtype``, or a batch of each, and any strides, k > 0 in a batch or where something
    is added; out (m, n) with its elements apart. A source expands to out; where beta is 0 it is not read.
    """
    m, k, n = a.shape[-2], a.shape[-1], b.shape[-1]
    driver = ctypes.CFUNCTYPE(ctypes.c_int64, *[ctypes.c_int64] * 3)(gemm_address(block))
    operands = (x for tensor in (a, b, out) for x in (tensor.data_ptr(), *tensor.stride()[-2:]))
    words = (ctypes.c_int64 * PRODUCT)(m, n, k, *operands)
    words[BATCH], words[ALPHA], words[BETA] = 1, _bits(alpha), _bits(beta)
    if a.dim() == 3:
        words[BATCH], words[A_BS], words[B_BS], words[C_BS] = a.shape[0], a.stride(0), b.stride(0), out.stride(0)
    if source is not None and beta != 0:
        expanded = source.expand(out.shape)
        words[INPUT], (words[I_RS], words[I_CS]) = expanded.data_ptr(), expanded.stride()[-2:]
        words[I_BS] = expanded.stride(0)
    if driver(ctypes.addressof(words), 1, threads):
        raise MemoryError("matmul_grad: the packing buffers cannot be allocated")
    return out


def _bits(number: float) -> int:
    return int.from_bytes(struct.pack("<d", number), "little", signed=True)


def product(
    a: torch.Tensor,
    b: torch.Tensor,
    source: torch.Tensor | None = None,
    beta: float = 1.0,
    alpha: float = 1.0,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """``multiply`` with the configuration of a dtype, into new memory; threads where torch lends its pool."""
    block = config(str(a.dtype).removeprefix("torch."))
    threads = torch.get_num_threads() if _address("torch_parallel_for") else 1
    result = a.new_empty((*a.shape[:-1], b.shape[-1])) if out is None else out
    return multiply(block, a, b, result, threads, source, beta, alpha)
