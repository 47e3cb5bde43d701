"""Every fact of torch that torch does not promise, with what needs it; ``override_probe.py`` tests the last part.

Three kinds. Names of C++ functions, mangled: a missing one is seen when it is looked up. Where a tensor keeps its
dispatch keys: found by comparing tensors. Layouts of C++ objects that only the override of aten's operators needs:
nothing shows that they are wrong but their use, so they are tried in a process of their own before they are trusted.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

# torch's stable C ABI: promised, but not by every version.
STABLE = (
    "aoti_torch_get_dim", "aoti_torch_get_sizes", "aoti_torch_get_strides", "aoti_torch_get_dtype",
    "aoti_torch_get_storage_size", "aoti_torch_get_storage_offset", "torch_get_const_data_ptr",
    "torch_get_mutable_data_ptr", "aoti_torch_empty_strided", "aoti_torch_copy_", "aoti_torch_delete_tensor_object",
    "aoti_torch_is_defined", "aoti_torch_grad_mode_is_enabled", "torch_get_num_threads", "torch_call_dispatcher",
    "torch_library_impl", "aoti_torch_library_init_impl", "aoti_torch_delete_library_object", "torch_parallel_for",
    "torch_list_get_item", "torch_delete_list", "aoti_torch_get_device_index", "aoti_torch_new_uninitialized_tensor",
)  # fmt: skip

# Functions of c10, ATen and the C++ runtime. Every compiled entry needs these:
MANGLED = {
    # raise torch's RuntimeError
    "matmul_grad_check_fail": "_ZN3c106detail14torchCheckFailEPKcS2_jS2_",
    # raise the Python exception that is pending: it calls an operator of ours, through which exceptions pass
    "matmul_grad_call_operator": (
        "_ZN2at17functionalization23functionalize_op_helperERKN3c1014OperatorHandleEPSt6vectorINS1_6IValueESaIS6_EE"
    ),
    # whether a tensor is followed by autograd or forward mode
    "matmul_grad_autograd_meta": "_ZNK3c1010TensorImpl13autograd_metaEv",
    "matmul_grad_requires_grad": "_ZNK3c1010TensorImpl13requires_gradEv",
    "matmul_grad_forward_grad": "_ZNK3c1010TensorImpl8_fw_gradEmRKN2at10TensorBaseE",
    # whether a Python mode or a transform is active
    "matmul_grad_key_included": "_ZN3c104impl28tls_is_dispatch_key_includedENS_11DispatchKeyE",
    # resize an ``out`` with torch's warning
    "matmul_grad_resize_output": "_ZN2at6native13resize_outputERKNS_6TensorEN3c108ArrayRefIlEE",
    # values that torch deletes, and those that it gives
    "matmul_grad_new": "_Znwm",
    "matmul_grad_delete": "_ZdlPv",
}
# The override of aten's operators needs these too:
OVERRIDE_MANGLED = {
    # register a kernel that gets Scalars, which the stable C ABI does not carry
    "matmul_grad_library_impl": "_ZNR5torch7Library5_implEPKcONS_11CppFunctionENS_17_RegisterOrVerifyE",
}
# The functions of CPython in python_functions.py need these too:
PYTHON_MANGLED = {
    # a Python object for a tensor
    "matmul_grad_wrap": "_Z16THPVariable_WrapRKN2at10TensorBaseE",
    # whether a mode of torch functions, a profiler or autocast is active
    "matmul_grad_function_mode_enabled": "_ZN2at4impl27torch_function_mode_enabledEv",
    "matmul_grad_has_callbacks": "_ZN2at12hasCallbacksEv",
    "matmul_grad_key_excluded": "_ZN3c104impl28tls_is_dispatch_key_excludedENS_11DispatchKeyE",
    # of the stable C ABI
    "matmul_grad_numel": "aoti_torch_get_numel",
}

# Recording by a C++ node of torch (graph.py) needs these, of which one that is missing leaves the Functions in Python:
GRAPH_MANGLED = {
    # operators of aten with other dispatch keys than those of their tensors
    "matmul": "_ZN2at4_ops6matmul10redispatchEN3c1014DispatchKeySetERKNS_6TensorES6_",
    "linear": "_ZN2at4_ops6linear10redispatchEN3c1014DispatchKeySetERKNS_6TensorES6_RKSt8optionalIS4_E",
    "addmm": "_ZN2at4_ops13mkldnn_linear10redispatchEN3c1014DispatchKeySetERKNS_6TensorES6_RKSt8optionalIS4_E",
    # the hooks of saved tensors, which are Python and may raise
    "hooks": "_ZN2at23SavedTensorDefaultHooks13get_tls_stateEv",
    # the addition, and the number of a tensor, as an object for it
    "add": "_ZN2at4_ops10add_Tensor4callERKNS_6TensorES4_RKN3c106ScalarE",
    "item": "_ZN2at4_ops19_local_scalar_dense4callERKNS_6TensorE",
    # whether autocast is on
    "key_excluded": "_ZN3c104impl28tls_is_dispatch_key_excludedENS_11DispatchKeyE",
    # the dtype in which a gradient is kept
    "grad_dtype": "_ZNK2at10TensorBase10grad_dtypeEv",
}
# Words of that result, a std::stack in a std::deque: where its first element is, and where the next one goes.
FIRST_HOOK, NEXT_HOOK = 2, 6
HAS_DTYPE = 1 << 8  # of a std::optional<c10::ScalarType> in a register: behind the byte of the dtype
SCALAR_BYTES = 256  # more than a c10::Scalar of any torch

IMPL_WORDS = 24  # of a TensorImpl that may be read: no torch known has a smaller one
PYBIND_VALUE = 2  # which word of an object of pybind11's is the address of the C++ object

# c10::IValue, an argument on the stack of a boxed kernel: a payload, then a tag.
SLOT = 16
NONE, DOUBLE, INT = 0, 3, 5


class KernelFunction(ctypes.Structure):
    """c10::KernelFunction: a functor, the boxed function, two unboxed ones, and tokens."""

    _fields_ = [(name, ctypes.c_int64) for name in ("functor", "boxed", "unboxed", "symbolic", "tokens")]


class CppFunction(ctypes.Structure):
    """torch::CppFunction: a dispatch key (none: the library's), a kernel, a signature, a schema, a short string."""

    _fields_ = [
        ("key", ctypes.c_int64),
        ("kernel", KernelFunction),
        ("signature", ctypes.c_int64 * 2),
        ("schema", ctypes.c_int64),
        ("text", ctypes.c_int64),
        ("length", ctypes.c_int64),
        ("characters", ctypes.c_char * 16),
    ]


def private_backend() -> tuple[str, int]:
    """The dispatch key of a device that nobody has, and the keys of its tensors under autograd; 0: there is none."""
    keys: Any = torch._C.DispatchKey
    if not hasattr(keys, "PrivateUse3") or not hasattr(keys, "AutogradPrivateUse3"):
        return "PrivateUse3", 0
    both = torch._C.DispatchKeySet(keys.PrivateUse3) | torch._C.DispatchKeySet(keys.AutogradPrivateUse3)
    return "PrivateUse3", int(both.raw_repr())


@functools.cache
def one() -> int:
    """Address of a 1 as a C++ function takes a number, which lives as long as the process."""
    with without_modes():
        tensor = torch.ones((), dtype=torch.float64, device="cpu")
        number, handle = ctypes.create_string_buffer(SCALAR_BYTES), ctypes.c_int64(tensor._cdata)
        item = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)(address(GRAPH_MANGLED["item"]))
        item(ctypes.addressof(number), ctypes.addressof(handle))
    _kept.append(number)
    return ctypes.addressof(number)


_kept: list[object] = []  # what native code points at, for the life of the process


@functools.cache
def tags(count: int, rank: int) -> list[int]:
    """TensorImpls of tensors without elements, of rank ``rank`` and up, which live as long as the process."""
    with without_modes():
        tensors = [torch.empty((0,) * (rank + index), dtype=torch.float32, device="cpu") for index in range(count)]
    _kept.extend(tensors)
    return [tensor._cdata for tensor in tensors]


def is_autograd_compiled() -> bool:
    """Whether compiled autograd traces every backward of the process."""
    module = sys.modules.get("torch._dynamo.compiled_autograd")
    return bool(getattr(module, "compiled_autograd_enabled", False))


def has_saved_tensor_hooks() -> bool:
    """Whether tensors that this thread saves for backward are passed to hooks."""
    kept = ctypes.CFUNCTYPE(ctypes.c_void_p)(address(GRAPH_MANGLED["hooks"]))()
    words = (ctypes.c_int64 * (NEXT_HOOK + 1)).from_address(kept)
    return words[FIRST_HOOK] != words[NEXT_HOOK]


def kept_dtype(tensor: torch.Tensor) -> int:
    """torch's code of the dtype in which the gradient of a tensor is kept, with HAS_DTYPE; without it, in any."""
    handle = ctypes.c_int64(tensor._cdata)
    found = ctypes.CFUNCTYPE(ctypes.c_uint16, ctypes.c_void_p)(address(GRAPH_MANGLED["grad_dtype"]))
    return int(found(ctypes.addressof(handle)))


def const_data_ptr(tensor: torch.Tensor) -> int:
    """``Tensor.const_data_ptr``, which torch has since 2.13: a copy-on-write storage is not copied."""
    if hasattr(tensor, "const_data_ptr"):
        return tensor.const_data_ptr()
    start: int = torch._C._data_address(tensor)  # type: ignore[attr-defined]  # torch's stubs leave it out
    return start + int(tensor.storage_offset()) * tensor.element_size()


def eager(operator: Any) -> Callable[..., Any]:
    """What ``OpOverload.__call__`` calls, without the Python in between. Compilers know the OpOverload alone."""
    return getattr(operator, "_op", operator)


@functools.cache
def libtorch() -> ctypes.CDLL:
    return ctypes.CDLL(torch._C.__file__)


@functools.cache
def address(name: str) -> int:
    """Of a function that torch's libraries export; 0 where there is none of the name."""
    try:
        return ctypes.cast(getattr(libtorch(), name), ctypes.c_void_p).value or 0
    except AttributeError:
        return 0


def has_thread_pool() -> bool:
    """Whether torch lends its threads: torch_parallel_for."""
    return address("torch_parallel_for") != 0


def version() -> tuple[int, int, int]:
    """Major, minor, patch."""
    major, minor, patch = (int("".join(filter(str.isdigit, part)) or 0) for part in _release().split(".")[:3])
    return major, minor, patch


def _release() -> str:
    return torch.__version__.split("+")[0].split("a")[0].split("b")[0].split("rc")[0]


def dispatch_key(name: str) -> int:
    keys: Any = torch._C.DispatchKey
    return int(getattr(keys, name))


def parsed_dispatch_key(name: str) -> int:
    """``dispatch_key``, of those too that Python's enumeration leaves out; 0 where torch has none of the name."""
    try:
        key: Any = torch._C._dispatch_key_parse(name)
        return int(key)
    except (AttributeError, RuntimeError):
        return 0


def cpp_object(wrapped: object) -> int:
    """Address of the C++ object in an object of pybind11's."""
    return ctypes.c_int64.from_address(id(wrapped) + PYBIND_VALUE * ctypes.sizeof(ctypes.c_void_p)).value


@contextlib.contextmanager
def without_modes() -> Iterator[None]:
    """A block whose tensors are ordinary ones, whatever modes and transforms the caller is under."""
    functionalize = torch._C.DispatchKeySet(torch._C.DispatchKey.Functionalize)
    with (
        _disable_current_modes(), torch._C.DisableTorchFunction(), torch._C._DisableFuncTorch(),
        torch._C._ExcludeDispatchKeyGuard(functionalize), torch.inference_mode(False),
    ):  # fmt: skip
        yield


def plain_keys() -> tuple[int, int]:
    """Which word of a TensorImpl holds its dispatch keys, and what an ordinary tensor has there; (0, 0) if unknown.

    Found by search: the one word that in tensors of several kinds equals the keys that torch reports. (0, 0) fits no
    tensor, since a TensorImpl begins with the address of its methods.
    """
    with without_modes():
        plain = torch.empty(1, device="cpu")
        kinds = [plain, torch.empty(1, dtype=torch.complex64, device="cpu").conj(), torch.empty(1, device="meta")]
        known = [int(torch._C._dispatch_keys(tensor).raw_repr()) for tensor in kinds]
        words = [(ctypes.c_uint64 * IMPL_WORDS).from_address(tensor._cdata)[:] for tensor in kinds]
    places = [place for place in range(IMPL_WORDS) if [found[place] for found in words] == known]
    return (places[0], known[0]) if len(places) == 1 else (0, 0)


def inference_keys() -> int:
    """The dispatch keys of an ordinary tensor that was made in inference mode."""
    with without_modes(), torch.inference_mode():
        return int(torch._C._dispatch_keys(torch.empty(1, device="cpu")).raw_repr())


def tensor_offset() -> int:
    """Bytes from the start of a Python object to the C++ tensor in it; 0 if unknown.

    A tensor is one word, the address of its TensorImpl. Found by search in objects of both types that are ordinary.
    """
    with without_modes():
        plain = torch.empty(1, device="cpu")
        objects = [plain, torch.empty(1, device="cpu"), torch.nn.Parameter(plain)]
    size = ctypes.sizeof(ctypes.c_void_p)
    count = torch.Tensor.__basicsize__ // size
    words = [(ctypes.c_uint64 * count).from_address(id(x))[:] for x in objects]
    places = [at for at in range(count) if [found[at] for found in words] == [x._cdata for x in objects]]
    return places[0] * size if len(places) == 1 else 0
