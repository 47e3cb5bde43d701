"""torch from compiled code: the functions of its C ABI, and accessors of tensors and errors for the entries.

Source: the headers torch/csrc/stable/c/shim.h and torch/csrc/inductor/aoti_torch/c/shim.h of torch ≥ 2.11. The names
that are needed, those that torch does not promise too, are in ``torch_layout.py``.
"""

from __future__ import annotations

from numba.core import types

from ..cpu.memory import INT64, get, jit, put, stack_words, symbol, text
from .op_table import REFUSAL
from .state import ABI_VERSION, CODES, GEMMS, INTERRUPTED, NOT_ACCELERATED, NOT_LOADED, RAISE


def _c(name: str, result: types.Type, *arguments: types.Type) -> types.ExternalFunction:
    return types.ExternalFunction(name, result(*arguments))


INT32, UINT32 = types.int32, types.uint32
get_dim = _c("aoti_torch_get_dim", INT32, INT64, INT64)
get_sizes = _c("aoti_torch_get_sizes", INT32, INT64, INT64)
get_strides = _c("aoti_torch_get_strides", INT32, INT64, INT64)
get_dtype = _c("aoti_torch_get_dtype", INT32, INT64, INT64)
get_storage_bytes = _c("aoti_torch_get_storage_size", INT32, INT64, INT64)
get_storage_offset = _c("aoti_torch_get_storage_offset", INT32, INT64, INT64)
get_const_data = _c("torch_get_const_data_ptr", INT32, INT64, INT64)
get_mutable_data = _c("torch_get_mutable_data_ptr", INT32, INT64, INT64)
empty_strided = _c("aoti_torch_empty_strided", INT32, INT64, INT64, INT64, INT32, INT32, INT32, INT64)
copy_ = _c("aoti_torch_copy_", INT32, INT64, INT64, INT32)
delete_tensor = _c("aoti_torch_delete_tensor_object", INT32, INT64)
new_undefined = _c("aoti_torch_new_uninitialized_tensor", INT32, INT64)
is_defined = _c("aoti_torch_is_defined", INT32, INT64, INT64)
grad_mode = _c("aoti_torch_grad_mode_is_enabled", types.uint8)
get_threads = _c("torch_get_num_threads", INT32, INT64)
call_dispatcher = _c("torch_call_dispatcher", INT32, INT64, INT64, INT64, INT64)
list_item = _c("torch_list_get_item", INT32, INT64, INT64, INT64)
delete_list = _c("torch_delete_list", INT32, INT64)
delete_library = _c("aoti_torch_delete_library_object", INT32, INT64)
init_impl = _c("aoti_torch_library_init_impl", INT32, INT64, INT64, INT64, UINT32, INT64)

# By mangled names, see torch_layout.py. Where one is missing the Python kernels stay.
check_fail = _c("matmul_grad_check_fail", types.void, INT64, INT64, UINT32, INT64)
call_operator = _c("matmul_grad_call_operator", types.void, INT64, INT64)
autograd_meta = _c("matmul_grad_autograd_meta", INT64, INT64)
requires_grad = _c("matmul_grad_requires_grad", types.uint8, INT64)
forward_grad = _c("matmul_grad_forward_grad", INT64, INT64, INT64, INT64)
key_included = _c("matmul_grad_key_included", types.uint8, types.uint16)
new = _c("matmul_grad_new", INT64, INT64)
delete = _c("matmul_grad_delete", types.void, INT64)
library_impl = _c("matmul_grad_library_impl", INT64, INT64, INT64, INT64, INT32)
resize_output = _c("matmul_grad_resize_output", types.uint8, INT64, INT64, INT64)

load_gemm = _c("matmul_grad_load_gemm", INT64, INT64)

state = symbol("matmul_grad_state")

# What `describe` reads of a tensor; sizes and strides are addresses, and live until the tensor is resized.
DIM, SIZES, STRIDES, DTYPE, DATA, STORAGE_BYTES, STORAGE_OFFSET = range(7)
INFO = 7

tensor_info = stack_words(INFO)
out_param = stack_words(3)
empty_vector = stack_words(3)  # of C++: begin, end, end of capacity
unknown_error = text("matmul_grad: torch's kernel failed")
strict_message = text(REFUSAL)
# The first sentence is torch's, for what has no storage; torch does not look at one that is too small.
no_storage_message = text("The tensor has a non-zero number of elements, but its data is not allocated yet.")
small_storage_message = text(
    "The sizes, strides and storage offset of a tensor are out of bounds for its storage, which was resized."
)
no_overload = text("")


@jit
def word(address):
    """A 32-bit result in a word that was 0 before."""
    return get(address, 0) & 0xFFFFFFFF


@jit
def describe(tensor, info):
    """Read all but DATA of a tensor into ``info``; False where torch has no numbers (symbols)."""
    put(info, DTYPE, 0)
    failed = get_dim(tensor, info + 8 * DIM) | get_dtype(tensor, info + 8 * DTYPE)
    failed |= get_sizes(tensor, info + 8 * SIZES) | get_strides(tensor, info + 8 * STRIDES)
    failed |= get_storage_bytes(tensor, info + 8 * STORAGE_BYTES)
    failed |= get_storage_offset(tensor, info + 8 * STORAGE_OFFSET)
    return failed == 0


@jit
def locate(tensor, info):
    """Read DATA of a tensor that is only read: a copy-on-write storage stays shared. False where torch has an error."""
    return get_const_data(tensor, info + 8 * DATA) == 0


@jit
def locate_to_write(tensor, info):
    """Read DATA of a tensor that is written: a copy-on-write storage gets memory of its own.

    False where torch has an error, as of such a storage that was resized.
    """
    return get_mutable_data(tensor, info + 8 * DATA) == 0


@jit
def size(info, dim):
    return get(get(info, SIZES), dim)


@jit
def stride(info, dim):
    return get(get(info, STRIDES), dim)


@jit
def dtype_of(info):
    return get(info, DTYPE) & 0xFFFFFFFF


@jit
def reach(info):
    """How many elements lie between the first and the last of a tensor; -1 where it has none."""
    distance = 0
    for dim in range(get(info, DIM)):
        if size(info, dim) == 0:
            return -1
        distance += (size(info, dim) - 1) * stride(info, dim)
    return distance


@jit
def is_within_storage(info, item):
    """Whether the storage holds every element: it may have been freed or shrunk under the tensor."""
    last = reach(info)
    return last < 0 or (get(info, STORAGE_OFFSET) + last + 1) * item <= get(info, STORAGE_BYTES)


@jit
def driver_of(dtype):
    """Address of the GEMM for torch's code of a dtype; or NOT_ACCELERATED, or INTERRUPTED."""
    if dtype >= CODES:
        return NOT_ACCELERATED
    driver = get(state(), GEMMS + dtype)
    if driver == NOT_LOADED:
        load_gemm(dtype)  # what it returns is undefined where Python raises before its first line
        driver = get(state(), GEMMS + dtype)
    return INTERRUPTED if driver == NOT_LOADED else driver


@jit
def has_driver(dtype):
    """Whether the kernels of a dtype are loaded, so that a call of them raises nothing."""
    return dtype < CODES and get(state(), GEMMS + dtype) > INTERRUPTED


@jit
def threads():
    at = out_param()
    put(at, 0, 0)
    get_threads(at)
    return word(at)


@jit
def fail(message):
    """Raise torch's RuntimeError. It unwinds through the caller's frame: what is owned has to be deleted before."""
    check_fail(unknown_error(), unknown_error(), 0, message)


@jit
def raise_pending():
    """Raise the Python exception that is pending in this thread, whatever its type; see ``pending.py``."""
    stack = empty_vector()
    put(stack, 0, 0)
    put(stack, 1, 0)
    put(stack, 2, 0)
    call_operator(get(state(), RAISE), stack)


@jit
def forward_to(stack, name):
    """Call an operator with a Python kernel on the same stack; its result is ``Tensor?``, None where it raised."""
    if call_dispatcher(name, no_overload(), stack, get(state(), ABI_VERSION)) != 0:
        fail(unknown_error())
    result = get(stack, 0)
    if result == 0:
        raise_pending()
    put(stack, 0, get(result, 0))
    delete(result)


@jit
def forward_results_to(stack, name, count):
    """``forward_to`` for an operator with results ``Tensor?``; one more, any tensor, is None where it raised."""
    if call_dispatcher(name, no_overload(), stack, get(state(), ABI_VERSION)) != 0:
        fail(unknown_error())
    mark = get(stack, count)
    if mark == 0:
        raise_pending()
    delete_tensor(get(mark, 0))
    delete(mark)


@jit
def has_tangent(tensor):
    """Whether forward-mode AD has given this tensor a tangent."""
    if autograd_meta(get(tensor, 0)) == 0:
        return False
    return is_tensor(forward_grad(get(tensor, 0), 0, tensor))


@jit
def is_tensor(handle):
    """Whether a handle holds a tensor, and not an undefined one."""
    at = out_param()
    put(at, 0, 0)
    is_defined(handle, at)
    return (get(at, 0) & 0xFF) != 0


@jit
def needs_gradient(tensor):
    """Whether autograd or forward mode follows it. A handle points at a tensor, whose first word is its TensorImpl."""
    if autograd_meta(get(tensor, 0)) == 0:
        return False
    return (grad_mode() != 0 and requires_grad(get(tensor, 0)) != 0) or has_tangent(tensor)


@jit
def undefined():
    """A handle of an undefined tensor."""
    at = out_param()
    new_undefined(at)
    return get(at, 0)


@jit
def rank_of(tensor):
    at = out_param()
    get_dim(tensor, at)
    return get(at, 0)


@jit
def read_dtype(tensor):
    """torch's code of the dtype of a tensor."""
    at = out_param()
    put(at, 0, 0)
    get_dtype(tensor, at)
    return word(at)
