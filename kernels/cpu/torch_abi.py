"""The boxed entry points that torch's dispatcher calls: no Python between the caller and the microkernel.

Signature, from torch's stable C ABI: ``void entry(uint64* stack, uint64 inputs, uint64 outputs)``. The inputs
are tensor handles that the entry owns and must delete; the outputs take their place on the stack. A function
that fails returns non-zero and keeps its message for the thread.

Source: the headers torch/csrc/stable/c/shim.h and torch/csrc/inductor/aoti_torch/c/shim.h of torch ≥ 2.10.
"""

from __future__ import annotations

from numba.core import types

from .job import PRODUCT
from .memory import INT64, call_address, get, jit, print_four, put, stack_words, symbol, text
from .state import ABI_VERSION, AUTOGRAD_KEY, CODES, GEMMS, NOT_ACCELERATED, NOT_LOADED, PYTHON_KEY, STRICT

ENTRY_SIGNATURE = types.void(INT64, INT64, INT64)


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
num_threads = _c("torch_get_num_threads", INT32, INT64)
call_dispatcher = _c("torch_call_dispatcher", INT32, INT64, INT64, INT64, INT64)

# Six functions of c10 that the stable ABI does not offer. `native.py` looks each up; where one is missing the
# Python kernels stay.
check_fail = _c("matmul_grad_check_fail", types.void, INT64, INT64, UINT32, INT64)
autograd_meta = _c("matmul_grad_autograd_meta", INT64, INT64)
requires_grad = _c("matmul_grad_requires_grad", types.uint8, INT64)
forward_grad = _c("matmul_grad_forward_grad", INT64, INT64, INT64, INT64)
exclude_key = _c("matmul_grad_exclude_key", types.void, types.uint16, types.uint8)
key_included = _c("matmul_grad_key_included", types.uint8, types.uint16)

last_error = _c("matmul_grad_last_error", INT64, INT64)
gil_ensure = _c("PyGILState_Ensure", INT32)
gil_release = _c("PyGILState_Release", types.void, INT32)
fetch_exception = _c("PyErr_Fetch", types.void, INT64, INT64, INT64)
load_gemm = _c("matmul_grad_load_gemm", INT64, INT64)

state = symbol("matmul_grad_state")

DIM_A, DIM_B, SIZES_A, SIZES_B, DTYPE_A, DTYPE_B, STRIDES, DATA, HANDLE, THREADS, SHAPE = range(11)
STRIDED = 0  # torch's code of the layout
WORDS = 14  # SHAPE takes two, and two more for the strides of the result
scratch = stack_words(WORDS)
buffer = stack_words(32)

self_not_matrix = text("self must be a matrix")
mat2_not_matrix = text("mat2 must be a matrix")
shapes_format = text("mat1 and mat2 shapes cannot be multiplied (%lldx%lld and %lldx%lld)")
out_of_memory = text("matmul_grad: the packing buffers cannot be allocated")
strict_message = text(
    "matmul_grad.strict(): this product goes to torch's own kernel; these kernels take two dense matrices of one "
    "dtype on one device: float16, bfloat16, float32 or float64, on CPU or CUDA"
)
unknown_error = text("matmul_grad: torch's kernel failed")
aten_mm, mm_name, python_name, no_overload = (
    text(name) for name in ("aten::mm", "matmul_grad::mm", "matmul_grad::_mm_in_python", "")
)

call_gemm = call_address(3)
product = stack_words(PRODUCT)


@jit
def word(address, index):
    """A word whose upper half a 32-bit answer left as it was: 0."""
    return get(address, index) & 0xFFFFFFFF


@jit
def reject(a, b, message):
    """Leave with torch's RuntimeError. It unwinds through this frame: what is owned is deleted before."""
    delete_tensor(a)
    delete_tensor(b)
    check_fail(unknown_error(), unknown_error(), 0, message)


@jit
def describe(a, b, at):
    """Read dimensions, sizes and dtypes of both operands into ``at``; False where torch cannot tell (symbols)."""
    put(at, DTYPE_A, 0)
    put(at, DTYPE_B, 0)
    failed = get_dim(a, at + 8 * DIM_A) | get_dim(b, at + 8 * DIM_B)
    failed |= get_dtype(a, at + 8 * DTYPE_A) | get_dtype(b, at + 8 * DTYPE_B)
    failed |= get_sizes(a, at + 8 * SIZES_A) | get_sizes(b, at + 8 * SIZES_B)
    return failed == 0


@jit
def validate(a, b, at):
    """torch.mm's own errors, in its own order."""
    if get(at, DIM_A) != 2:
        reject(a, b, self_not_matrix())
    if get(at, DIM_B) != 2:
        reject(a, b, mat2_not_matrix())
    sizes_a, sizes_b = get(at, SIZES_A), get(at, SIZES_B)
    if get(sizes_a, 1) != get(sizes_b, 0):
        message = buffer()
        m, k, k2, n = get(sizes_a, 0), get(sizes_a, 1), get(sizes_b, 0), get(sizes_b, 1)
        print_four(message, 256, shapes_format(), m, k, k2, n)
        reject(a, b, message)


@jit
def fail():
    """Raise what torch's C ABI has just swallowed. A Python exception is still set then: it is taken off first."""
    at = scratch()
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


def mm(stack, inputs, outputs):
    """``matmul_grad::mm(Tensor self, Tensor mat2) -> Tensor`` for dense CPU tensors."""
    a, b, at = get(stack, 0), get(stack, 1), scratch()
    described = describe(a, b, at)
    if described:
        validate(a, b, at)
    dtype = word(at, DTYPE_A)
    driver = NOT_ACCELERATED
    if described and dtype == word(at, DTYPE_B) and dtype < CODES:
        driver = get(state(), GEMMS + dtype)
        if driver == NOT_LOADED:
            driver = load_gemm(dtype)
    if driver == NOT_ACCELERATED:
        if get(state(), STRICT) != 0:
            reject(a, b, strict_message())
        forward_to(stack, aten_mm())
        return
    sizes_a, sizes_b = get(at, SIZES_A), get(at, SIZES_B)
    m, k, n = get(sizes_a, 0), get(sizes_a, 1), get(sizes_b, 1)
    shape = at + 8 * SHAPE
    put(shape, 0, m)
    put(shape, 1, n)
    put(shape, 2, max(n, 1))
    put(shape, 3, 1)
    if empty_strided(2, shape, shape + 16, dtype, 0, 0, at + 8 * HANDLE) != 0:
        delete_tensor(a)
        delete_tensor(b)
        fail()
    out = get(at, HANDLE)
    if run_gemm(driver, a, b, out, at, m, n, k) != 0:
        delete_tensor(out)
        reject(a, b, out_of_memory())
    delete_tensor(a)
    delete_tensor(b)
    put(stack, 0, out)


@jit
def run_gemm(driver, a, b, out, at, m, n, k):
    data, strides = at + 8 * DATA, at + 8 * STRIDES
    get_data(a, data)
    get_strides(a, strides)
    a_data, a_rs, a_cs = get(data, 0), get(get(strides, 0), 0), get(get(strides, 0), 1)
    get_data(b, data)
    get_strides(b, strides)
    b_data, b_rs, b_cs = get(data, 0), get(get(strides, 0), 0), get(get(strides, 0), 1)
    get_data(out, data)
    put(at, THREADS, 0)
    num_threads(at + 8 * THREADS)
    threads = word(at, THREADS)
    words = product()
    for index, value in enumerate((m, n, k, a_data, a_rs, a_cs, b_data, b_rs, b_cs, get(data, 0), n)):
        put(words, index, value)
    return call_gemm(driver, words, 1, threads)


@jit
def has_tangent(tensor, at):
    """Whether forward-mode AD has given this tensor a tangent."""
    if autograd_meta(get(tensor, 0)) == 0:
        return False
    put(at, DATA, 0)
    is_defined(forward_grad(get(tensor, 0), 0, tensor), at + 8 * DATA)
    return (get(at, DATA) & 0xFF) != 0


@jit
def is_strided(tensor, at):
    """Sparse, nested and other layouts are torch's own affair, from autograd on."""
    put(at, DATA, 0)
    get_layout(tensor, at + 8 * DATA)
    return word(at, DATA) == STRIDED


@jit
def needs_gradient(a, b, at):
    """A tensor handle points at the tensor, whose first word is its TensorImpl."""
    if autograd_meta(get(a, 0)) == 0 and autograd_meta(get(b, 0)) == 0:
        return False
    if grad_mode() != 0 and (requires_grad(get(a, 0)) | requires_grad(get(b, 0))) != 0:
        return True
    return has_tangent(a, at) or has_tangent(b, at)


def mm_autograd(stack, inputs, outputs):
    """The Autograd key: graphs, Python modes and layouts other than strided go to autograd.py, the rest below it.

    It dispatches again rather than computing, because keys below autograd (tensor subclasses, functionalisation,
    negation) must have their turn. Nor does it look at sizes, which would make a tracer
    take symbolic ones for constants.
    """
    a, b, at = get(stack, 0), get(stack, 1), scratch()
    in_python = key_included(get(state(), PYTHON_KEY)) != 0 or not (is_strided(a, at) and is_strided(b, at))
    if in_python or needs_gradient(a, b, at):
        forward_to(stack, python_name())
        return
    key = get(state(), AUTOGRAD_KEY)
    exclude_key(key, 1)
    failed = call_dispatcher(mm_name(), no_overload(), stack, get(state(), ABI_VERSION))
    exclude_key(key, 0)
    if failed != 0:
        fail()


KERNELS = {"matmul_grad_mm": (mm, ENTRY_SIGNATURE), "matmul_grad_mm_autograd": (mm_autograd, ENTRY_SIGNATURE)}
