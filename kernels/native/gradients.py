"""The gradients of a product, for compiled code: one call of the driver for all.

    C = A · B + bias        dA = dC · Bᵀ        dB = Aᵀ · dC        dbias = 1ᵀ · dC

A has rank 2 or more. B is a matrix, a vector, the weight of a linear layer, which is Bᵀ, or has the batch of A. A batch
that B lacks joins m; one that both have is the batch of the driver. Where it does not lie in memory as one dimension,
Python computes the gradients.
"""

from __future__ import annotations

from numba.core import types

from ..cpu.gemm_args import (
    A_BS,
    A_CS,
    A_RS,
    B_BS,
    B_CS,
    B_RS,
    BATCH,
    C_BS,
    C_CS,
    C_RS,
    GEMM_ARGS,
    ONE,
    A,
    B,
    C,
    K,
    M,
    N,
)
from ..cpu.memory import INT64, call_address, get, jit, put, stack_words
from ..cpu.schedule import MAX_PRODUCTS, set_dense_c
from .broadcast import MOST
from .call import BFLOAT16, FLOAT16, FLOAT32, item_size
from .state import INTERRUPTED, NOT_ACCELERATED
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
    is_within_storage,
    locate,
    out_param,
    size,
    stride,
    threads,
)

# What is asked for: which gradients, whether B is given as Bᵀ; what B is, and whether the memory order of the operand
# of a single gradient is column-major, where that operand is not at hand. NEEDS_SUMS: the gradient of a bias.
NEEDS_A, NEEDS_B, LINEAR, VECTOR, BATCHED, COLUMN, NEEDS_SUMS = (1 << bit for bit in range(7))
# An operand as a batch of matrices: sizes and strides in elements.
ITEMS, ITEM_STEP, ROWS, ROW_STEP, COLUMNS, COLUMN_STEP = range(6)
VIEW = 6
DONE, IN_PYTHON, RAISED = range(3)

GRADIENTS_SIGNATURE = INT64(*[INT64] * 5)
linked_gradients = types.ExternalFunction("matmul_grad_gradients", GRADIENTS_SIGNATURE)
call_gemm = call_address(3)
info_words = stack_words(3 * INFO)
view_words = stack_words(4 * VIEW)  # of dC, A, B, and a row of ones
products_words = stack_words(MAX_PRODUCTS * GEMM_ARGS)
one_word = stack_words(1)
shape_words = stack_words(2 * MOST)


@jit
def merge(info, count, view, at):
    """The first ``count`` dimensions as one, its size and stride in two words of a view; False where they are not."""
    length, step = 1, 0
    for from_end in range(count):
        index = count - 1 - from_end
        if size(info, index) == 1:
            continue
        if length == 1:
            step = stride(info, index)
        elif stride(info, index) != length * step:
            return False
        length *= size(info, index)
    put(view, at, length)
    put(view, at + 1, step)
    return True


@jit
def set_view(info, view, is_batched, has_columns):
    """A tensor (…, rows, columns), or without columns, as a view; its batch is in the rows unless ``is_batched``."""
    rank = get(info, DIM) - has_columns
    put(view, ITEMS, 1)
    put(view, ITEM_STEP, 0)
    put(view, COLUMNS, size(info, rank) if has_columns != 0 else 1)
    put(view, COLUMN_STEP, stride(info, rank) if has_columns != 0 else 1)
    if not is_batched:
        return merge(info, rank, view, ROWS)
    put(view, ROWS, size(info, rank - 1))
    put(view, ROW_STEP, stride(info, rank - 1))
    return merge(info, rank - 1, view, ITEMS)


@jit
def transpose(view):
    rows, step = get(view, ROWS), get(view, ROW_STEP)
    put(view, ROWS, get(view, COLUMNS))
    put(view, ROW_STEP, get(view, COLUMN_STEP))
    put(view, COLUMNS, rows)
    put(view, COLUMN_STEP, step)


@jit
def read(tensor, info):
    """Whether a tensor has numbers, all of them within its storage."""
    return describe(tensor, info) and is_within_storage(info, item_size(dtype_of(info)))


@jit
def begin_alike(info, other, count):
    """Whether the first dimensions of two tensors have the same sizes."""
    for index in range(count):  # noqa: SIM110  # compiled code has no generators
        if size(info, index) != size(other, index):
            return False
    return True


@jit
def set_views(infos, views, form, has_a, has_b):
    """Views of grad, A and B; False where one is not as compiled code needs it, or they do not fit."""
    info, info_a, info_b = infos, infos + 8 * INFO, infos + 16 * INFO
    view, view_a, view_b = views, views + 8 * VIEW, views + 16 * VIEW
    is_batched, has_columns = form & BATCHED != 0, 0 if form & VECTOR != 0 else 1
    rank = get(info, DIM)
    if not 1 + is_batched <= rank - has_columns < MOST - 1 or not set_view(info, view, is_batched, has_columns):
        return False
    items, m, n = get(view, ITEMS), get(view, ROWS), get(view, COLUMNS)
    if has_a:
        if get(info_a, DIM) != rank + 1 - has_columns or dtype_of(info_a) != dtype_of(info):
            return False
        if not begin_alike(info, info_a, rank - has_columns) or not set_view(info_a, view_a, is_batched, 1):
            return False
        if get(view_a, COLUMNS) == 0:
            return False
    if has_b:
        if get(info_b, DIM) != (rank if is_batched else 1 + has_columns) or dtype_of(info_b) != dtype_of(info):
            return False
        if is_batched and not begin_alike(info, info_b, rank - 2):
            return False
        if not set_view(info_b, view_b, is_batched, has_columns):
            return False
        if form & LINEAR != 0:
            transpose(view_b)
        if get(view_b, COLUMNS) != n or get(view_b, ROWS) == 0:
            return False
        if has_a and get(view_b, ROWS) != get(view_a, COLUMNS):
            return False
    return items * m * n != 0


@jit
def form_of(info_a, info_b):
    """VECTOR or BATCHED, as the ranks tell; -1 where compiled code has no gradients for them."""
    rank_a, rank_b = get(info_a, DIM), get(info_b, DIM)
    if rank_a < 2 or rank_b < 1 or rank_a >= MOST:
        return -1
    if rank_b <= 2:
        return VECTOR if rank_b == 1 else 0
    return BATCHED if rank_a == rank_b else -1


@jit
def is_column_major(info):
    """As in PyTorch's derivative formula: the gradient gets the memory order of its operand."""
    return get(info, DIM) == 2 and stride(info, 0) == 1 and stride(info, 1) == size(info, 0)


@jit
def is_column_weight(info):
    """``is_column_major`` of the gradient of a linear layer's weight, which is a product of the transposed weight."""
    return stride(info, 1) != 1 or stride(info, 0) != size(info, 1)


@jit
def allocate(shape, rank, is_column, dtype):
    """A new tensor of these sizes, the last dimension adjacent, or the first of two; 0 where torch has no memory."""
    handle, step = out_param(), 1
    for from_end in range(rank):
        put(shape, MOST + rank - 1 - from_end, step)
        step *= get(shape, rank - 1 - from_end)
    if is_column:
        put(shape, MOST, 1)
        put(shape, MOST + 1, get(shape, 0))
    return 0 if empty_strided(rank, shape, shape + 8 * MOST, dtype, 0, 0, handle) != 0 else get(handle, 0)


@jit
def allocate_a(infos, views, form, is_column, dtype):
    """Of the sizes of A: those of grad, k in the place of n."""
    shape, rank = shape_words(), get(infos, DIM) + (form & VECTOR != 0)
    for index in range(rank - 1):
        put(shape, index, size(infos, index))
    put(shape, rank - 1, get(views + 16 * VIEW, ROWS))
    return allocate(shape, rank, is_column, dtype)


@jit
def allocate_b(infos, views, form, is_column, dtype):
    """Of the sizes of B: k and n, in the order of the weight of a linear layer, behind the batch."""
    shape, rank = shape_words(), get(infos, DIM) if form & BATCHED != 0 else 1 if form & VECTOR != 0 else 2
    k, n = get(views + 8 * VIEW, COLUMNS), get(views, COLUMNS)
    for index in range(rank - 2):
        put(shape, index, size(infos, index))
    if form & VECTOR != 0:
        put(shape, 0, k)
    else:
        put(shape, rank - 2, n if form & LINEAR != 0 else k)
        put(shape, rank - 1, k if form & LINEAR != 0 else n)
    return allocate(shape, rank, is_column, dtype)


@jit
def set_product(args, view_a, data_a, swap_a, view_b, data_b, swap_b, out, is_column):
    """A product of two views, or of their transposes, into a new tensor."""
    at, a, b = out_param(), 2 * swap_a, 2 * swap_b
    get_mutable_data(out, at)
    m, k, n = get(view_a, ROWS + a), get(view_a, COLUMNS - a), get(view_b, COLUMNS - b)
    put(args, M, m)
    put(args, K, k)
    put(args, N, n)
    put(args, A, data_a)
    put(args, A_RS, get(view_a, ROW_STEP + a))
    put(args, A_CS, get(view_a, COLUMN_STEP - a))
    put(args, B, data_b)
    put(args, B_RS, get(view_b, ROW_STEP + b))
    put(args, B_CS, get(view_b, COLUMN_STEP - b))
    put(args, C, get(at, 0))
    set_dense_c(args, n)
    if is_column:
        put(args, C_RS, 1)
        put(args, C_CS, m)
    put(args, BATCH, get(view_a, ITEMS))
    put(args, A_BS, get(view_a, ITEM_STEP))
    put(args, B_BS, get(view_b, ITEM_STEP))
    put(args, C_BS, m * n)


@jit
def write_one(target, dtype):
    """Write the number 1 in a dtype."""
    one = 0x3F80 if dtype == BFLOAT16 else 0x3C00 if dtype == FLOAT16 else 0x3F800000 if dtype == FLOAT32 else ONE
    put(target, 0, one)


@jit
def set_ones(view, count):
    """A row of one element that is repeated, as a view."""
    put(view, ITEMS, 1)
    put(view, ITEM_STEP, 0)
    put(view, ROWS, 1)
    put(view, ROW_STEP, 0)
    put(view, COLUMNS, count)
    put(view, COLUMN_STEP, 0)


@jit
def delete_if(tensor):
    if tensor != 0:
        delete_tensor(tensor)


@jit
def compute(driver, infos, views, form, columns, returned):
    """The gradients that are needed, in one call of the driver; False where memory ran out."""
    view, view_a, view_b, ones = views, views + 8 * VIEW, views + 16 * VIEW, views + 24 * VIEW
    dtype, args, count = dtype_of(infos), products_words(), 0
    if form & NEEDS_A != 0:
        grad_a = allocate_a(infos, views, form, columns & 1 != 0, dtype)
        if grad_a == 0:
            return False
        put(returned, 0, grad_a)
        b = get(infos + 16 * INFO, DATA)
        set_product(args, view, get(infos, DATA), 0, view_b, b, 1, grad_a, columns & 1 != 0)
        count += 1
    if form & NEEDS_B != 0:
        grad_b = allocate_b(infos, views, form, columns & 2 != 0, dtype)
        if grad_b == 0:
            return False
        put(returned, 1, grad_b)
        a, is_column = get(infos + 8 * INFO, DATA), (columns & 2 != 0) != (form & LINEAR != 0)
        set_product(args + 8 * GEMM_ARGS * count, view_a, a, 1, view, get(infos, DATA), 0, grad_b, is_column)
        count += 1
    if form & NEEDS_SUMS != 0:
        shape, one = shape_words(), one_word()
        put(shape, 0, get(view, COLUMNS))
        sums = allocate(shape, 1, False, dtype)
        if sums == 0:
            return False
        put(returned, 2, sums)
        write_one(one, dtype)
        set_ones(ones, get(view, ROWS))
        set_product(args + 8 * GEMM_ARGS * count, ones, one, 0, view, get(infos, DATA), 0, sums, False)
        count += 1
    return call_gemm(driver, args, count, threads()) == 0


def gradients(grad, a, b, form, returned):
    """The gradients that ``form`` asks for, of dense CPU tensors.

    shapes      grad (…, m, n), a (…, m, k), b (k, n), (k), (…, k, n), or of a linear layer (n, k); LINEAR tells
    strides     any whose batch is one dimension
    dtypes      one for all, with a kernel
    aliasing    results are new memory, in the memory order of their operands, as in PyTorch
    rounding    as the driver's: the sums of a bias are the product of a row of ones and grad, k = m
    returns     DONE, with handles in ``returned``, 0 for what is not needed: of A, of B, and (n) of a bias; IN_PYTHON;
                RAISED: an error is pending

    ``a`` or ``b`` is 0 where only the other one is used. Then ``form`` has what is needed of it. Of a batch there are
    no sums.
    """
    infos, views, columns = info_words(), view_words(), 0
    info_a, info_b = infos + 8 * INFO, infos + 16 * INFO
    put(returned, 0, 0)
    put(returned, 1, 0)
    put(returned, 2, 0)
    if not read(grad, infos) or (a != 0 and not read(a, info_a)) or (b != 0 and not read(b, info_b)):
        return IN_PYTHON
    if a != 0 and b != 0:
        kind = form_of(info_a, info_b)
        if kind < 0:
            return IN_PYTHON
        form |= kind
        is_column_b = is_column_weight(info_b) if form & LINEAR != 0 else is_column_major(info_b)
        columns = is_column_major(info_a) + 2 * is_column_b
    else:
        if b != 0:
            form |= VECTOR if get(info_b, DIM) == 1 else BATCHED if get(info_b, DIM) > 2 else 0
        columns = 3 if form & COLUMN != 0 else 0
    if not set_views(infos, views, form, a != 0, b != 0):
        return IN_PYTHON
    driver = driver_of(dtype_of(infos))
    if driver == INTERRUPTED:
        return RAISED
    if driver == NOT_ACCELERATED or not locate(grad, infos):
        return IN_PYTHON
    if (a != 0 and not locate(a, info_a)) or (b != 0 and not locate(b, info_b)):
        return IN_PYTHON
    if compute(driver, infos, views, form, columns, returned):
        return DONE
    delete_if(get(returned, 0))
    delete_if(get(returned, 1))
    delete_if(get(returned, 2))
    return IN_PYTHON


KERNELS = {"matmul_grad_gradients": (gradients, GRADIENTS_SIGNATURE)}
