"""One product, as every entry computes it: whether these kernels support it, its operands, and where the result goes.

An argument is an address whose first word is the tensor's TensorImpl: a handle of the stable C ABI, or a slot of a
boxed kernel's stack. Nothing is written, resized or copied before the outcome is known, and no address of an element is
read before the last operation that can move it.
"""

from __future__ import annotations

from numba.core import types

from ..cpu.gemm_args import (
    A_BS,
    A_CS,
    A_RS,
    ALPHA,
    B_BS,
    B_CS,
    B_RS,
    BATCH,
    BETA,
    C_BS,
    C_CS,
    C_RS,
    ONE,
    S_BS,
    S_CS,
    S_RS,
    SOURCE,
    A,
    B,
    C,
    K,
    M,
    N,
)
from ..cpu.memory import INT64, call_address, get, jit, number_of, put, stack_words
from ..cpu.schedule import set_plain_store
from .op_table import BATCHES, MATRICES, MATVEC
from .state import DTYPE_CODES, INTERRUPTED, NOT_ACCELERATED
from .torch_c_api import (
    DATA,
    DIM,
    INFO,
    STORAGE_BYTES,
    delete_tensor,
    describe,
    driver_of,
    dtype_of,
    empty_strided,
    get_mutable_data,
    is_within_storage,
    locate,
    out_param,
    size,
    stride,
    threads,
)

# The outcome of a call. RUN: these kernels compute it. FALLBACK: PyTorch's kernel does, since there is nothing to
# multiply or an argument is wrong. UNSUPPORTED: likewise, an error under strict(). FREED, OUT_OF_BOUNDS: a
# storage does not hold its tensor. PENDING: a Python exception is pending.
RUN, FALLBACK, UNSUPPORTED, FREED, OUT_OF_BOUNDS, PENDING = range(6)

NEW, OUT, IN_PLACE = range(3)  # where the result goes

FLOAT16, BFLOAT16, FLOAT32, FLOAT64 = (DTYPE_CODES[f] for f in ("float16", "bfloat16", "float32", "float64"))
LARGEST_FP16, LARGEST_BF16, LARGEST_FP32 = 65504.0, 3.3895313892515355e38, 3.4028234663852886e38

A_TENSOR, B_TENSOR, SOURCE_TENSOR, OUT_TENSOR = range(4)  # addresses; 0 where there is no addend or no ``out``
TENSORS = 4
HANDLE, DTYPE = range(2)  # of the result: the handle of a NEW one, torch's code of the dtype

COMPUTE_SIGNATURE = INT64(*[INT64] * 5)
linked_compute = types.ExternalFunction("matmul_grad_compute", COMPUTE_SIGNATURE)
call_gemm = call_address(3)
shape_words = stack_words(6)
tensor_words = stack_words(TENSORS)
infos_words = stack_words(4 * INFO)
INFO_A, INFO_B, INFO_SOURCE, INFO_OUT = (8 * INFO * index for index in range(4))


@jit
def item_size(dtype):
    return 8 if dtype == FLOAT64 else 4 if dtype == FLOAT32 else 2


@jit
def shapes_match(info_a, info_b, kind):
    """Whether ranks, dtypes and sizes agree: torch raises its own error for any others."""
    rank_a, rank_b = kind + (kind < MATRICES), max(kind, 1)
    if get(info_a, DIM) != rank_a or get(info_b, DIM) != rank_b or dtype_of(info_a) != dtype_of(info_b):
        return False
    if kind == BATCHES and size(info_a, 0) != size(info_b, 0):
        return False
    return size(info_a, rank_a - 1) == size(info_b, 1 if kind == BATCHES else 0)


@jit
def set_sizes(args, info_a, info_b, kind):
    put(args, BATCH, size(info_a, 0) if kind == BATCHES else 1)
    rank_a = get(info_a, DIM)
    put(args, M, size(info_a, rank_a - 2) if rank_a > 1 else 1)
    put(args, K, size(info_a, rank_a - 1))
    put(args, N, size(info_b, kind - 1) if kind >= MATRICES else 1)


@jit
def set_operands(args, info_a, info_b, kind):
    rank_a = get(info_a, DIM)
    put(args, A, get(info_a, DATA))
    put(args, A_BS, stride(info_a, 0) if kind == BATCHES else 0)
    put(args, A_RS, stride(info_a, rank_a - 2) if rank_a > 1 else 0)
    put(args, A_CS, stride(info_a, rank_a - 1))
    put(args, B, get(info_b, DATA))
    put(args, B_BS, stride(info_b, 0) if kind == BATCHES else 0)
    put(args, B_RS, stride(info_b, 1 if kind == BATCHES else 0))
    put(args, B_CS, stride(info_b, kind - 1) if kind >= MATRICES else 1)


@jit
def is_empty(args):
    """Whether there is nothing to multiply."""
    return get(args, M) == 0 or get(args, N) == 0 or get(args, K) == 0 or get(args, BATCH) == 0


@jit
def is_too_large(bits, dtype, kind):
    """Whether torch refuses an alpha or beta: what float32 cannot hold, or for a vector the dtype."""
    largest = LARGEST_FP32
    if dtype == FLOAT64:
        return False
    if kind == MATVEC and dtype == FLOAT16:
        largest = LARGEST_FP16
    elif kind == MATVEC and dtype == BFLOAT16:
        largest = LARGEST_BF16
    return largest < abs(number_of(bits)) < float("inf")


@jit
def expanded_stride(info, from_end, target):
    """Stride of a dimension expanded to size ``target``; -1 where it cannot be."""
    index = get(info, DIM) - 1 - from_end
    if index < 0:
        return 0
    if size(info, index) == target:
        return stride(info, index)
    return 0 if size(info, index) == 1 else -1


@jit
def set_source(args, info, kind):
    """Strides of the addend; False where it cannot be expanded to the result."""
    columns = kind > MATVEC
    put(args, S_CS, expanded_stride(info, 0, get(args, N)) if columns else 1)  # as set_result has it
    put(args, S_RS, expanded_stride(info, 1 if columns else 0, get(args, M)))
    put(args, S_BS, expanded_stride(info, 2, get(args, BATCH)) if kind == BATCHES else 0)
    return get(info, DIM) <= kind and min(get(args, S_CS), get(args, S_RS), get(args, S_BS)) >= 0


@jit
def write_result_shape(args, target, kind):
    """Write the sizes of the result; three words on, its strides if it is contiguous."""
    m, n, at = get(args, M), get(args, N), target
    if kind == BATCHES:
        put(target, 0, get(args, BATCH))
        put(target, 3, m * n)
        at = target + 8
    put(at, 0, m)
    put(at, 1, n)
    put(at, 3, n)
    put(at, 4, 1)


@jit
def allocate(args, dtype, kind):
    """A handle of a new contiguous result; 0 where torch has no memory for it."""
    sizes, handle, at = shape_words(), out_param(), out_param()
    write_result_shape(args, sizes, kind)
    if empty_strided(kind, sizes, sizes + 8 * 3, dtype, 0, 0, handle) != 0:
        return 0
    get_mutable_data(get(handle, 0), at)
    put(args, C, get(at, 0))
    put(args, C_BS, get(args, M) * get(args, N))
    put(args, C_RS, get(args, N))
    put(args, C_CS, 1)
    return get(handle, 0)


@jit
def scales_outcome(args, dtype, kind):
    """The outcome for these beta and alpha."""
    beta, alpha = get(args, BETA), get(args, ALPHA)
    if is_too_large(beta, dtype, kind) or is_too_large(alpha, dtype, kind) or number_of(alpha) == 0.0:
        return FALLBACK  # alpha = 0 leaves the product out, even where it is NaN
    return RUN


@jit
def bounds_outcome(info, item):
    if is_within_storage(info, item):
        return RUN
    return OUT_OF_BOUNDS if get(info, STORAGE_BYTES) > 0 else FREED


@jit
def check(a, b, source, infos, args, kind, has_scales):
    """The outcome, as far as operands and addend determine it."""
    info_a, info_b, info_source = infos + INFO_A, infos + INFO_B, infos + INFO_SOURCE
    if not describe(a, info_a) or not describe(b, info_b) or not shapes_match(info_a, info_b, kind):
        return FALLBACK
    dtype = dtype_of(info_a)
    driver = driver_of(dtype)
    if driver == INTERRUPTED:
        return PENDING
    if driver == NOT_ACCELERATED:
        return UNSUPPORTED
    set_sizes(args, info_a, info_b, kind)
    if source != 0:
        known = describe(source, info_source) and dtype_of(info_source) == dtype
        if not known or not set_source(args, info_source, kind):
            return FALLBACK
    outcome = max(bounds_outcome(info_a, item_size(dtype)), bounds_outcome(info_b, item_size(dtype)))
    if source != 0:
        outcome = max(outcome, bounds_outcome(info_source, item_size(dtype)))
    if outcome != RUN:
        return outcome
    if not has_scales:
        return UNSUPPORTED
    if source != 0 and scales_outcome(args, dtype, kind) != RUN:
        return FALLBACK
    return FALLBACK if is_empty(args) else RUN


@jit
def locate_operands(a, b, source, infos, args, kind):
    """Set the addresses of operands and addend. They are read last, as preparing ``out`` may have moved them.

    False where torch has an error for one of them.
    """
    if not locate(a, infos + INFO_A) or not locate(b, infos + INFO_B):
        return False
    set_operands(args, infos + INFO_A, infos + INFO_B, kind)
    put(args, SOURCE, 0)
    set_plain_store(args)
    if source == 0:
        put(args, ALPHA, ONE)
    elif number_of(get(args, BETA)) != 0.0:
        if not locate(source, infos + INFO_SOURCE):
            return False
        put(args, SOURCE, get(infos + INFO_SOURCE, DATA))
    return True


@jit
def set_tensors(tensors, a, b, source, out):
    put(tensors, A_TENSOR, a)
    put(tensors, B_TENSOR, b)
    put(tensors, SOURCE_TENSOR, source)
    put(tensors, OUT_TENSOR, out)


@jit
def begin(tensors, infos, args, kind, has_scales, returned):
    """``check``; whatever the outcome, DTYPE is known, and M and N are -1 where the operands do not fit."""
    put(returned, DTYPE, 0)
    put(args, M, -1)
    put(args, N, -1)
    a, b, source = get(tensors, A_TENSOR), get(tensors, B_TENSOR), get(tensors, SOURCE_TENSOR)
    outcome = check(a, b, source, infos, args, kind, has_scales)
    put(returned, DTYPE, dtype_of(infos + INFO_A))
    return outcome


@jit
def multiply_into_new(args, dtype, kind, returned):
    """The product in new memory; RUN, or UNSUPPORTED where there is none."""
    handle = allocate(args, dtype, kind)
    if handle == 0:
        return UNSUPPORTED
    put(returned, HANDLE, handle)
    if call_gemm(driver_of(dtype), args, 1, threads()) == 0:
        return RUN
    delete_tensor(handle)
    return UNSUPPORTED


def compute(tensors, args, kind, has_scales, returned):
    """Compute a product in new memory if these kernels support it.

    tensors   A_TENSOR … SOURCE_TENSOR
    args      BETA and ALPHA where there is a source
    returned  receives HANDLE and DTYPE
    returns   the outcome
    """
    infos = infos_words()
    outcome = begin(tensors, infos, args, kind, has_scales, returned)
    if outcome != RUN:
        return outcome
    a, b, source = get(tensors, A_TENSOR), get(tensors, B_TENSOR), get(tensors, SOURCE_TENSOR)
    if not locate_operands(a, b, source, infos, args, kind):
        return FALLBACK
    return multiply_into_new(args, dtype_of(infos + INFO_A), kind, returned)


KERNELS = {"matmul_grad_compute": (compute, COMPUTE_SIGNATURE)}
