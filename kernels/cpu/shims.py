"""torch from compiled code: the functions of its stable C ABI, and what is made of them by every entry point.

Source: the headers torch/csrc/stable/c/shim.h and torch/csrc/inductor/aoti_torch/c/shim.h of torch ≥ 2.10.
"""

from __future__ import annotations

from numba.core import types

from .memory import INT64, get, jit, put, stack_words, symbol, text
from .state import ABI_VERSION, CODES, GEMMS, NOT_ACCELERATED, NOT_LOADED


def _c(name: str, result: types.Type, *arguments: types.Type) -> types.ExternalFunction:
    return types.ExternalFunction(name, result(*arguments))


INT32, UINT32 = types.int32, types.uint32
get_dim = _c("aoti_torch_get_dim", INT32, INT64, INT64)
get_sizes = _c("aoti_torch_get_sizes", INT32, INT64, INT64)
get_strides = _c("aoti_torch_get_strides", INT32, INT64, INT64)
get_dtype = _c("aoti_torch_get_dtype", INT32, INT64, INT64)
get_data = _c("aoti_torch_get_data_ptr", INT32, INT64, INT64)
empty_strided = _c("aoti_torch_empty_strided", INT32, INT64, INT64, INT64, INT32, INT32, INT32, INT64)
get_layout = _c("aoti_torch_get_layout", INT32, INT64, INT64)
delete_tensor = _c("aoti_torch_delete_tensor_object", INT32, INT64)
is_defined = _c("aoti_torch_is_defined", INT32, INT64, INT64)
grad_mode = _c("aoti_torch_grad_mode_is_enabled", types.uint8)
get_threads = _c("torch_get_num_threads", INT32, INT64)
call_dispatcher = _c("torch_call_dispatcher", INT32, INT64, INT64, INT64, INT64)
list_item = _c("torch_list_get_item", INT32, INT64, INT64, INT64)
delete_list = _c("torch_delete_list", INT32, INT64)

# Functions of c10 and of the C++ runtime that the stable ABI does not offer. `native.py` looks each up; where one is
# missing the Python kernels stay.
check_fail = _c("matmul_grad_check_fail", types.void, INT64, INT64, UINT32, INT64)
autograd_meta = _c("matmul_grad_autograd_meta", INT64, INT64)
requires_grad = _c("matmul_grad_requires_grad", types.uint8, INT64)
forward_grad = _c("matmul_grad_forward_grad", INT64, INT64, INT64, INT64)
exclude_key = _c("matmul_grad_exclude_key", types.void, types.uint16, types.uint8)
key_included = _c("matmul_grad_key_included", types.uint8, types.uint16)
new = _c("matmul_grad_new", INT64, INT64)
delete_library = _c("aoti_torch_delete_library_object", INT32, INT64)
init_impl = _c("aoti_torch_library_init_impl", INT32, INT64, INT64, INT64, UINT32, INT64)
library_impl = _c("matmul_grad_library_impl", INT64, INT64, INT64, INT64, INT32)
resize_output = _c("matmul_grad_resize_output", types.uint8, INT64, INT64, INT64)

last_error = _c("matmul_grad_last_error", INT64, INT64)
gil_ensure = _c("PyGILState_Ensure", INT32)
gil_release = _c("PyGILState_Release", types.void, INT32)
fetch_exception = _c("PyErr_Fetch", types.void, INT64, INT64, INT64)
load_gemm = _c("matmul_grad_load_gemm", INT64, INT64)

state = symbol("matmul_grad_state")

# What `describe` reads of a tensor; sizes and strides are addresses, and live as long as the tensor.
DIM, SIZES, STRIDES, DTYPE, DATA = range(5)
FACTS = 5
STRIDED = 0  # torch's code of the layout

facts = stack_words(FACTS)
answer = stack_words(3)
shape = stack_words(4)
unknown_error = text("matmul_grad: torch's kernel failed")
strict_message = text(
    "matmul_grad.strict(): this product goes to torch's own kernel; these kernels take two dense matrices of one "
    "dtype on one device: float16, bfloat16, float32 or float64, on CPU or CUDA"
)
no_overload = text("")


@jit
def word(address):
    """A word whose upper half a 32-bit answer left as it was: 0."""
    return get(address, 0) & 0xFFFFFFFF


@jit
def describe(tensor, about):
    """Read DIM … DATA of a tensor into ``about``; False where torch cannot tell (symbols)."""
    put(about, DTYPE, 0)
    failed = get_dim(tensor, about + 8 * DIM) | get_dtype(tensor, about + 8 * DTYPE)
    failed |= get_sizes(tensor, about + 8 * SIZES) | get_strides(tensor, about + 8 * STRIDES)
    failed |= get_data(tensor, about + 8 * DATA)
    return failed == 0


@jit
def size(about, dim):
    return get(get(about, SIZES), dim)


@jit
def stride(about, dim):
    return get(get(about, STRIDES), dim)


@jit
def driver_of(dtype):
    """Address of the GEMM for torch's code of a dtype, or NOT_ACCELERATED."""
    if dtype >= CODES:
        return NOT_ACCELERATED
    driver = get(state(), GEMMS + dtype)
    return load_gemm(dtype) if driver == NOT_LOADED else driver


@jit
def empty(rows, columns, dtype):
    """A new row-major matrix; 0 where torch has no memory for it, whose error then waits for ``fail``."""
    at, handle = shape(), answer()
    put(at, 0, rows)
    put(at, 1, columns)
    put(at, 2, max(columns, 1))
    put(at, 3, 1)
    return 0 if empty_strided(2, at, at + 16, dtype, 0, 0, handle) != 0 else get(handle, 0)


@jit
def data_of(tensor):
    at = answer()
    get_data(tensor, at)
    return get(at, 0)


@jit
def threads():
    at = answer()
    put(at, 0, 0)
    get_threads(at)
    return word(at)


@jit
def fail():
    """Raise what torch's C ABI has just swallowed. A Python exception is still set then: it is taken off first."""
    at = answer()
    put(at, 1, 0)
    gil = gil_ensure()
    fetch_exception(at, at + 8, at + 16)
    gil_release(gil)
    check_fail(unknown_error(), unknown_error(), 0, last_error(get(at, 1)))


@jit
def forward_to(stack, name):
    """Call another operator of the dispatcher on the same stack; its error, if any, is raised here."""
    if call_dispatcher(name, no_overload(), stack, get(state(), ABI_VERSION)) != 0:
        fail()


@jit
def has_tangent(tensor):
    """Whether forward-mode AD has given this tensor a tangent."""
    if autograd_meta(get(tensor, 0)) == 0:
        return False
    at = answer()
    put(at, 0, 0)
    is_defined(forward_grad(get(tensor, 0), 0, tensor), at)
    return (get(at, 0) & 0xFF) != 0


@jit
def is_strided(tensor):
    """Sparse, nested and other layouts are torch's own affair, from autograd on."""
    at = answer()
    put(at, 0, 0)
    get_layout(tensor, at)
    return word(at) == STRIDED


@jit
def needs_gradient(tensor):
    """Whether autograd or forward mode follows it. A handle points at a tensor, whose first word is its TensorImpl."""
    if autograd_meta(get(tensor, 0)) == 0:
        return False
    return (grad_mode() != 0 and requires_grad(get(tensor, 0)) != 0) or has_tangent(tensor)
