"""``matmul`` and ``linear`` of any ranks, for compiled code: which products of the driver they are. Nothing is copied.

    C[i, j, l, m, n] = Σ_k A[i, j, 1, m, k] · B[i, 1, l, k, n]

The dimensions of the batch are records of a size and three strides, 0 in the operand that lacks it. A dimension that
follows another in all three is one with it. One that B lacks joins m where the rows of A and of C go on in it, one that
A lacks joins n likewise. The longest of the rest is the batch of the driver, which is called once for each item of the
others.
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
    GEMM_ARGS,
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
from ..cpu.memory import INT64, call_address, get, jit, put, stack_words
from ..cpu.schedule import set_plain_store
from .call import FALLBACK, RUN, UNSUPPORTED, bounds_outcome, is_empty, item_size
from .torch_c_api import (
    DATA,
    DIM,
    INFO,
    delete_tensor,
    describe,
    driver_of,
    dtype_of,
    empty_strided,
    get_mutable_data,
    locate,
    out_param,
    size,
    stride,
    threads,
)

MOST = 16  # dimensions of an operand; more fall back
SIZE, IN_A, IN_B, IN_C, INDEX = range(5)  # a record: a size, three strides in elements, the item at hand
RECORD = 5

MATMUL_SIGNATURE = INT64(*[INT64] * 5)
linked_matmul = types.ExternalFunction("matmul_grad_multiply_batches", MATMUL_SIGNATURE)
call_gemm = call_address(3)
args_words = stack_words(GEMM_ARGS)
batch_words = stack_words(MOST * RECORD)
result_words = stack_words(2 * MOST)
infos_words = stack_words(3 * INFO)


@jit
def record(batch, index):
    return batch + 8 * RECORD * index


@jit
def set_matrices(args, info_a, info_b, is_transposed):
    """M, N, K and the strides of the last dimensions; False where the operands differ in k."""
    rank_a, rank_b = get(info_a, DIM), get(info_b, DIM)
    row, column = (rank_b - 1, rank_b - 2) if is_transposed else (max(rank_b - 2, 0), rank_b - 1)
    put(args, M, size(info_a, rank_a - 2) if rank_a > 1 else 1)
    put(args, A_RS, stride(info_a, rank_a - 2) if rank_a > 1 else 0)
    put(args, K, size(info_a, rank_a - 1))
    put(args, A_CS, stride(info_a, rank_a - 1))
    put(args, N, size(info_b, column) if rank_b > 1 else 1)
    put(args, B_CS, stride(info_b, column) if rank_b > 1 else 1)
    put(args, B_RS, stride(info_b, row))
    return get(args, K) == size(info_b, row)


@jit
def set_bias(args, info):
    """A bias is one row, added to every row of C; False where it does not have the size of one."""
    if get(info, DIM) != 1 or (size(info, 0) != get(args, N) and size(info, 0) != 1):
        return False
    put(args, S_CS, stride(info, 0) if size(info, 0) == get(args, N) else 0)
    return True


@jit
def batch_size(info, from_end):
    """Of a dimension of the batch, counted from the last; 1 where the operand has no such dimension."""
    index = get(info, DIM) - 3 - from_end
    return size(info, index) if index >= 0 else 1


@jit
def batch_stride(info, from_end):
    """0 where the dimension is to be broadcast."""
    index = get(info, DIM) - 3 - from_end
    return stride(info, index) if index >= 0 and size(info, index) > 1 else 0


@jit
def batch_rank(info_a, info_b):
    return max(get(info_a, DIM), get(info_b, DIM), 2) - 2


@jit
def set_result_shape(args, info_a, info_b, shape):
    """Sizes of the result, and MOST words on its strides, contiguous; returns its rank, or -1 where none fits."""
    batch, items = batch_rank(info_a, info_b), 1
    rows, columns = get(info_a, DIM) > 1, get(info_b, DIM) > 1
    rank = batch + rows + columns
    if columns:
        put(shape, rank - 1, get(args, N))
    if rows:
        put(shape, batch, get(args, M))
    for index in range(batch):
        one, other = batch_size(info_a, batch - 1 - index), batch_size(info_b, batch - 1 - index)
        if one != other and one != 1 and other != 1:
            return -1
        put(shape, index, other if one == 1 else one)
        items *= get(shape, index)
    put(args, BATCH, items)
    step = 1
    for from_end in range(rank):
        put(shape, MOST + rank - 1 - from_end, step)
        step *= max(get(shape, rank - 1 - from_end), 1)
    return rank


@jit
def set_batch(args, info_a, info_b, batch):
    """Records of the batch, the innermost first, of sizes over 1; what follows another is one with it."""
    count, step = 0, get(args, M) * get(args, N)
    for from_end in range(batch_rank(info_a, info_b)):
        length = max(batch_size(info_a, from_end), batch_size(info_b, from_end))
        if length == 1:
            continue
        in_a, in_b = batch_stride(info_a, from_end), batch_stride(info_b, from_end)
        last = record(batch, count - 1)
        inner = get(last, SIZE) if count > 0 else 0
        if count > 0 and in_a == inner * get(last, IN_A) and in_b == inner * get(last, IN_B):
            put(last, SIZE, inner * length)
        else:
            at = record(batch, count)
            put(at, SIZE, length)
            put(at, IN_A, in_a)
            put(at, IN_B, in_b)
            put(at, IN_C, step)
            count += 1
        step *= length
    return count


@jit
def joins(args, at, other, own, extent, row_stride, c_stride):
    """Make a record that ``other`` operand lacks part of m or n, if its elements go on there; False if not."""
    if get(at, other) != 0:
        return False
    length = get(args, extent)
    if length == 1:
        put(args, row_stride, get(at, own))
        put(args, c_stride, get(at, IN_C))
    elif get(at, own) != length * get(args, row_stride) or get(at, IN_C) != length * get(args, c_stride):
        return False
    put(args, extent, length * get(at, SIZE))
    return True


@jit
def remove(batch, index, count):
    for word in range(RECORD * index, RECORD * (count - 1)):
        put(batch, word, get(batch, word + RECORD))


@jit
def fold(args, batch, count, has_bias):
    """Join what can be joined to m and n, the innermost first; returns how many records are left.

    With a bias nothing joins n, along which that is read.
    """
    index = 0
    while index < count:
        at = record(batch, index)
        if joins(args, at, IN_B, IN_A, M, A_RS, C_RS) or (not has_bias and joins(args, at, IN_A, IN_B, N, B_CS, C_CS)):
            remove(batch, index, count)
            count, index = count - 1, 0
        else:
            index += 1
    return count


@jit
def take_longest(args, batch, count):
    """The longest record becomes the batch of the driver; returns how many are left."""
    put(args, BATCH, 1)
    put(args, A_BS, 0)
    put(args, B_BS, 0)
    put(args, C_BS, 0)
    if count == 0:
        return 0
    longest = 0
    for index in range(1, count):
        if get(record(batch, index), SIZE) > get(record(batch, longest), SIZE):
            longest = index
    at = record(batch, longest)
    put(args, BATCH, get(at, SIZE))
    put(args, A_BS, get(at, IN_A))
    put(args, B_BS, get(at, IN_B))
    put(args, C_BS, get(at, IN_C))
    remove(batch, longest, count)
    return count - 1


@jit
def move(args, at, items, item):
    """From one item of a record to another, ``items`` further or back."""
    put(args, A, get(args, A) + items * get(at, IN_A) * item)
    put(args, B, get(args, B) + items * get(at, IN_B) * item)
    put(args, C, get(args, C) + items * get(at, IN_C) * item)


@jit
def multiply_all(driver, args, batch, count, item):
    """Call the driver for every item of the records; False when it ran out of memory."""
    for index in range(count):
        put(record(batch, index), INDEX, 0)
    used = threads()
    while True:
        if call_gemm(driver, args, 1, used) != 0:
            return False
        index = 0
        while index < count:
            at = record(batch, index)
            done = get(at, INDEX) + 1
            if done < get(at, SIZE):
                put(at, INDEX, done)
                move(args, at, 1, item)
                break
            put(at, INDEX, 0)
            move(args, at, 1 - done, item)
            index += 1
        if index == count:
            return True


@jit
def check(a, b, bias, infos, args, is_linear):
    """The outcome, as far as the operands determine it; M, N, K and the strides of matrices and bias."""
    info_a, info_b, info_bias = infos, infos + 8 * INFO, infos + 16 * INFO
    if not describe(a, info_a) or not describe(b, info_b):
        return FALLBACK
    rank_a, rank_b = get(info_a, DIM), get(info_b, DIM)
    if min(rank_a, rank_b) == 0 or max(rank_a, rank_b) > MOST or (is_linear and rank_b != 2):
        return FALLBACK
    dtype = dtype_of(info_a)
    if dtype != dtype_of(info_b) or not set_matrices(args, info_a, info_b, is_linear):
        return FALLBACK
    item = item_size(dtype)
    outcome = max(bounds_outcome(info_a, item), bounds_outcome(info_b, item))
    if bias != 0:
        if not describe(bias, info_bias) or dtype_of(info_bias) != dtype or not set_bias(args, info_bias):
            return FALLBACK
        outcome = max(outcome, bounds_outcome(info_bias, item))
    return outcome


@jit
def locate_all(a, b, bias, infos, args):
    info_a, info_b, info_bias = infos, infos + 8 * INFO, infos + 16 * INFO
    if not locate(a, info_a) or not locate(b, info_b):
        return False
    put(args, A, get(info_a, DATA))
    put(args, B, get(info_b, DATA))
    put(args, ALPHA, ONE)
    set_plain_store(args)
    put(args, SOURCE, 0)
    if bias != 0:
        if not locate(bias, info_bias):
            return False
        put(args, SOURCE, get(info_bias, DATA))
        put(args, BETA, ONE)
        put(args, S_RS, 0)
        put(args, S_BS, 0)
    return True


def matmul(a, b, bias, is_linear, returned):
    """Compute A · B of any ranks, or A · Bᵀ + bias where ``is_linear``, if these kernels support it.

    shapes      a (…, m, k) or (k), b (…, k, n) or (k) → (…, m, n); linear: b (n, k), bias (n), (1) or none, 0
    strides     any; the result is contiguous
    dtypes      one for all, with a kernel that is loaded
    aliasing    the result is new memory; operands are only read
    returns     the outcome, as ``compute``; the handle of the result is in ``returned``
    """
    args, infos, shape, batch = args_words(), infos_words(), result_words(), batch_words()
    outcome = check(a, b, bias, infos, args, is_linear)
    if outcome != RUN:
        return outcome
    info_a, info_b, dtype = infos, infos + 8 * INFO, dtype_of(infos)
    driver = driver_of(dtype)
    rank = set_result_shape(args, info_a, info_b, shape)
    if rank < 0 or is_empty(args) or not locate_all(a, b, bias, infos, args):
        return FALLBACK
    at = out_param()
    if empty_strided(rank, shape, shape + 8 * MOST, dtype, 0, 0, returned) != 0:
        return UNSUPPORTED
    get_mutable_data(get(returned, 0), at)
    put(args, C, get(at, 0))
    put(args, C_RS, get(args, N))
    put(args, C_CS, 1)
    count = fold(args, batch, set_batch(args, info_a, info_b, batch), bias != 0)
    count = take_longest(args, batch, count)
    if multiply_all(driver, args, batch, count, item_size(dtype)):
        return RUN
    delete_tensor(get(returned, 0))
    return UNSUPPORTED


KERNELS = {"matmul_grad_multiply_batches": (matmul, MATMUL_SIGNATURE)}
