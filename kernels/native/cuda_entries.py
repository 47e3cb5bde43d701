"""The boxed entry of ``matmul_grad::mm`` for CUDA tensors: from torch's dispatcher to the driver, no Python between.

It knows no Triton and no tile. The launches of a product of these shapes, strides, dtype and alignment are described
by a record, words that ``matmul_grad/cuda.py`` makes from a ``LaunchRecord`` of kernels/gpu and puts into the table. It
finds the record, allocates, fills in addresses, and has the driver launch what Triton compiled. Where there is no
record, and wherever anything is not as expected, it calls the operator in Python, which launches the longer way.

The table, behind the symbol ``matmul_grad_cuda_table``:

    DEVICE_TYPE   torch's code of CUDA
    MODE          a number for the settings under which records hold
    PLAIN_KEYS    the dispatch keys of an ordinary CUDA tensor
    SLOT + i      address of a record, or 0; a key's place is its hash, or the next free one

A record:

    KEY           dtype, device, mode, m, n, k, strides of a and b, alignments of a and b
    WORK …        elements of the workspace, torch's code of their dtype; how many launches; then each of them:
    FUNCTION …    the driver's handle, programs, threads, shared bytes; how many parameters; then each of them
    KIND …        CONSTANT: its 8 bytes. POINTER: of which tensor. DESCRIPTOR: of which, and what the driver encodes
"""

from __future__ import annotations

from collections.abc import Callable

from numba.core import types

from ..cpu.memory import INT64, get, jit, put, stack_words, symbol, text
from .launch_table import (
    ALIGNMENT,
    BOX,
    CONSTANT,
    DESCRIPTORS,
    DEVICE_TYPE,
    DIMENSIONS,
    ELEMENT,
    FIRST,
    FUNCTION,
    HEADER,
    KEYS,
    KIND,
    L2_PROMOTION,
    LAUNCHES,
    MAP_BYTES,
    MODE,
    MOST_PARAMETERS,
    PARAMETER,
    PARAMETERS,
    PLAIN_KEYS,
    POINTER,
    PROGRAMS,
    RANK,
    SHARED,
    SLOT,
    SLOTS,
    STEPS,
    STRIDES,
    SWIZZLE,
    THREADS,
    VALUE,
    WORK,
    WORK_DTYPE,
    A,
    B,
    C,
    W,
)
from .launch_table import mixed as mix
from .own_entries import ENTRY_SIGNATURE, is_direct
from .torch_c_api import (
    DATA,
    DIM,
    delete_tensor,
    describe,
    dtype_of,
    empty_strided,
    forward_to,
    get_mutable_data,
    locate,
    out_param,
    size,
    stride,
    tensor_info,
    word,
)

INT32, UINT32 = types.int32, types.uint32

get_device_index = types.ExternalFunction("aoti_torch_get_device_index", INT32(INT64, INT64))
get_stream = types.ExternalFunction("matmul_grad_cuda_stream", INT32(INT32, INT64))
get_current_device = types.ExternalFunction("matmul_grad_cuda_device", INT32(INT64))
encode = types.ExternalFunction(
    "matmul_grad_cuda_encode",
    INT32(INT64, INT32, UINT32, INT64, INT64, INT64, INT64, INT64, INT32, INT32, INT32, INT32),
)
linked_mm_cuda = types.ExternalFunction("matmul_grad_mm_cuda", ENTRY_SIGNATURE)
launch_kernel = types.ExternalFunction("matmul_grad_cuda_launch", INT32(INT64, *[UINT32] * 7, INT64, INT64, INT64))

table = symbol("matmul_grad_cuda_table")
mm_in_python = text("matmul_grad::_mm_cuda_in_python")
mm_with_graph = text("matmul_grad::_mm_in_python")
key_words = stack_words(KEYS)
stream_word = stack_words(1)
tensor_words = stack_words(4)
value_words = stack_words(MOST_PARAMETERS)
argument_words = stack_words(MOST_PARAMETERS)
map_bytes = stack_words((DESCRIPTORS * MAP_BYTES + MAP_BYTES) // 8)
mixed = jit(mix)
matrix_shape = stack_words(4)


@jit
def device_of(tensor):
    at = out_param()
    put(at, 0, 0)
    get_device_index(tensor, at)
    return word(at)


@jit
def data_of(tensor):
    at = out_param()
    get_mutable_data(tensor, at)
    return get(at, 0)


@jit
def current_device():
    """The driver's; no tensor is on the number that stands for none."""
    at = out_param()
    put(at, 0, 0)
    return word(at) if get_current_device(at) == 0 else -1


@jit
def put_key(key, info_a, info_b, device):
    put(key, 0, dtype_of(info_a))
    put(key, 1, device)
    put(key, 2, get(table(), MODE))
    put(key, 3, size(info_a, 0))
    put(key, 4, size(info_b, 1))
    put(key, 5, size(info_a, 1))
    put(key, 6, stride(info_a, 0))
    put(key, 7, stride(info_a, 1))
    put(key, 8, stride(info_b, 0))
    put(key, 9, stride(info_b, 1))
    put(key, 10, get(info_a, DATA) % ALIGNMENT)
    put(key, 11, get(info_b, DATA) % ALIGNMENT)


@jit
def is_for(record, key):
    for index in range(KEYS):  # noqa: SIM110 (Numba takes no generator)
        if get(record, index) != get(key, index):
            return False
    return True


@jit
def look_up(key):
    """The record for a key, or 0. Half of the table is free, so the search ends."""
    place = 0
    for index in range(KEYS):
        place = mixed(place, get(key, index))
    record = get(table(), SLOT + place % SLOTS)
    while record != 0 and not is_for(record, key):
        place += 1
        record = get(table(), SLOT + place % SLOTS)
    return record


@jit
def find(a, b, info_a, info_b, device):
    """The record for two matrices that fit, on the current device; 0 where there is none."""
    if not describe(a, info_a) or not describe(b, info_b) or get(info_a, DIM) != 2 or get(info_b, DIM) != 2:
        return 0
    if size(info_a, 1) != size(info_b, 0) or dtype_of(info_a) != dtype_of(info_b):
        return 0
    if device != device_of(b) or device != current_device():
        return 0
    if not locate(a, info_a) or not locate(b, info_b):
        return 0
    key = key_words()
    put_key(key, info_a, info_b, device)
    return look_up(key)


@jit
def allocate(rows, columns, dtype, device):
    """A handle of a new row-major matrix on the device; 0 where torch has no memory."""
    at, handle = matrix_shape(), out_param()
    put(at, 0, rows)
    put(at, 1, columns)
    put(at, 2, columns)
    put(at, 3, 1)
    failed = empty_strided(2, at, at + 16, dtype, get(table(), DEVICE_TYPE), device, handle)
    return 0 if failed != 0 else get(handle, 0)


@jit
def describe_to_driver(parameter, target, address):
    """Encode a TMA descriptor; True where the driver took it."""
    sizes, strides = parameter + 8 * DIMENSIONS, parameter + 8 * STRIDES
    return encode(
        target, get(parameter, ELEMENT), get(parameter, RANK), address, sizes, strides, parameter + 8 * BOX,
        parameter + 8 * STEPS, 0, get(parameter, SWIZZLE), L2_PROMOTION, 0,
    ) == 0  # fmt: skip


@jit
def launch(at, tensors, stream):
    """One launch on the addresses of ``tensors``; True where the driver took it."""
    values, arguments, maps = value_words(), argument_words(), map_bytes()
    target = (maps + MAP_BYTES - 1) // MAP_BYTES * MAP_BYTES
    for index in range(get(at, PARAMETERS)):
        parameter = at + 8 * (HEADER + index * PARAMETER)
        kind = get(parameter, KIND)
        if kind == CONSTANT:
            put(arguments, index, parameter + 8 * VALUE)
        elif kind == POINTER:
            put(values, index, get(tensors, get(parameter, VALUE)))
            put(arguments, index, values + 8 * index)
        else:
            if not describe_to_driver(parameter, target, get(tensors, get(parameter, VALUE))):
                return False
            put(arguments, index, target)
            target += MAP_BYTES
    return launch_kernel(
        get(at, FUNCTION), get(at, PROGRAMS), 1, 1, get(at, THREADS), 1, 1, get(at, SHARED),
        stream, arguments, 0,
    ) == 0  # fmt: skip


@jit
def run(record, info_a, info_b, device):
    """A handle of the product, its launches under way; 0 where anything failed."""
    stream = stream_word()
    put(stream, 0, 0)
    if get(record, LAUNCHES) == 0 or get_stream(device, stream) != 0:
        return 0
    out = allocate(size(info_a, 0), size(info_b, 1), dtype_of(info_a), device)
    if out == 0:
        return 0
    tensors, work = tensor_words(), 0
    put(tensors, A, get(info_a, DATA))
    put(tensors, B, get(info_b, DATA))
    put(tensors, C, data_of(out))
    put(tensors, W, 0)
    done = True
    if get(record, WORK) > 0:
        work = allocate(1, get(record, WORK), get(record, WORK_DTYPE), device)
        done = work != 0
        if done:
            put(tensors, W, data_of(work))
    at = record + 8 * FIRST
    for _ in range(get(record, LAUNCHES)):
        done = done and launch(at, tensors, get(stream, 0))
        at += 8 * (HEADER + get(at, PARAMETERS) * PARAMETER)
    if work != 0:
        delete_tensor(work)  # torch gives this memory to nobody before the stream has passed the launches
    if not done:
        delete_tensor(out)
        return 0
    return out


def mm_cuda(stack, inputs, outputs):
    """``matmul_grad::mm`` of CUDA tensors."""
    a, b, info_a, info_b = get(stack, 0), get(stack, 1), tensor_info(), tensor_info()
    device = device_of(a)
    record = find(a, b, info_a, info_b, device)
    out = run(record, info_a, info_b, device) if record != 0 else 0
    if out == 0:
        forward_to(stack, mm_in_python())
        return
    delete_tensor(a)
    delete_tensor(b)
    put(stack, 0, out)


def mm_cuda_autograd(stack, inputs, outputs):
    """The key AutogradCUDA of ``mm``, as ``own_entries.make_autograd_entry``."""
    if is_direct(stack, 2, get(table(), PLAIN_KEYS)):
        linked_mm_cuda(stack, inputs, outputs)
    else:
        forward_to(stack, mm_with_graph())


KERNELS: dict[str, tuple[Callable, object]] = {
    f"matmul_grad_{entry.__name__}": (entry, ENTRY_SIGNATURE) for entry in (mm_cuda, mm_cuda_autograd)
}
